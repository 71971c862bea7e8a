// What every kernel shares: versions for each instruction set, rounding half to even, and sums in a fixed order.
//
// No value depends on the instruction set: every operation is one IEEE operation (build with -ffp-contract=off and without
// -ffast-math), and sums have a fixed order, that of 16 lanes.

#ifndef BITFLOOR_COMMON_H
#define BITFLOOR_COMMON_H

#include <stdint.h>

// One version of each function per instruction set; the loader of the system picks one (needs glibc).
#if defined(__x86_64__) && defined(__GLIBC__) && \
    ((defined(__clang__) && __clang_major__ >= 15) || (!defined(__clang__) && __GNUC__ >= 8))
#define VERSIONS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VERSIONS
#endif
#define PUBLIC extern "C"
#define INLINE static inline __attribute__((always_inline))

// To be raised with every change of a signature or of a value; ABI in ops/native.py must follow.
static const int64_t ABI = 3;

static const int64_t LANES = 16;  // LANES in the references

// (x + this) - this is x rounded half to even for |x| < 2^22: what has no place in a float of this size is rounded off.
// Larger x keep their size nearly, and infinities theirs, so that they stay outside of any codes.
static const float HALF_TO_EVEN = 12582912.0f;  // 1.5 * 2^23

INLINE float rounded(float x) { return (x + HALF_TO_EVEN) - HALF_TO_EVEN; }

INLINE float clamped(float code, float top) {
    code = code < 0.0f ? 0.0f : code;
    return code > top ? top : code;
}

INLINE void add_lanes(float* __restrict lanes, const float* __restrict values, int64_t count) {
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES)
        for (int64_t lane = 0; lane < LANES; ++lane) lanes[lane] += values[j + lane];
    for (int64_t lane = 0; j + lane < count; ++lane) lanes[lane] += values[j + lane];
}

INLINE float folded(float* lanes) {
    for (int64_t half = LANES / 2; half; half /= 2)
        for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    return lanes[0];
}

#endif
