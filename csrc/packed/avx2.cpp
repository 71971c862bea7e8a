// The kernels for AVX2: a line of codes is two registers of eight rows.

#include "plan.h"

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "product.h"
#include "rows.h"
#include "unpack.h"

namespace bitfloor {
namespace {

static const int64_t AHEAD = 8192;  // bytes that the int8 product asks for in advance

struct Narrow {
    static constexpr bool BLOCKED = false;
    struct F {
        __m256 a, b;  // rows 0 to 7, 8 to 15
    };

    static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static F set(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
    static F load(const float* from, int64_t count) {
        if (count == ROWS) return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
        float whole[16] = {0.0f};
        memcpy(whole, from, sizeof(float) * count);
        return {_mm256_loadu_ps(whole), _mm256_loadu_ps(whole + 8)};
    }
    static void store(float* to, F value, int64_t count) {
        float whole[16];
        float* at = count == ROWS ? to : whole;
        _mm256_storeu_ps(at, value.a);
        _mm256_storeu_ps(at + 8, value.b);
        if (count != ROWS) memcpy(to, whole, sizeof(float) * count);
    }
    static F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)}; }
    static F mul(F a, F b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
    static F add(F a, F b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
    static F sub(F a, F b) { return {_mm256_sub_ps(a.a, b.a), _mm256_sub_ps(a.b, b.b)}; }
    static F integers(__m256i a, __m256i b) { return {_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)}; }
    static F halves(const uint16_t* from) {
        return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)),
                _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + 8)))};
    }
    static __m256 bfloat(const uint16_t* from) {
        return _mm256_castsi256_ps(
            _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16));
    }
    static F bfloats(const uint16_t* from) { return {bfloat(from), bfloat(from + 8)}; }
    // Eight values of `bits` bits fill `bits` bytes, whatever the width.
    static inline __attribute__((always_inline)) __m256i eight(const uint8_t* from, int64_t bits) {
        uint64_t stream = 0;
        memcpy(&stream, from, bits);
        const __m256i step = _mm256_mullo_epi32(_mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0), _mm256_set1_epi32((int)bits));
        const __m256i low = _mm256_srlv_epi32(_mm256_set1_epi32((int)(uint32_t)stream), step);
        const __m256i over = _mm256_sub_epi32(_mm256_set1_epi32(32), step);
        const __m256i high = _mm256_set1_epi32((int)(uint32_t)(stream >> 32));
        // Below bit 32 the high half comes from the left, from there on it is all there is; other shifts give 0.
        const __m256i joined = _mm256_or_si256(_mm256_sllv_epi32(high, over),
                                               _mm256_srlv_epi32(high, _mm256_sub_epi32(step, _mm256_set1_epi32(32))));
        return _mm256_and_si256(_mm256_or_si256(low, joined), _mm256_set1_epi32((1 << bits) - 1));
    }
    template <int B>
    static F zeros(const uint8_t* from) {
        return integers(eight(from, B), eight(from + B, B));
    }
    static F bytes(const uint32_t* from, int at) {
        const __m256i mask = _mm256_set1_epi32(255);
        const __m128i by = _mm_cvtsi32_si128(8 * at);
        const __m256i a = _mm256_srl_epi32(_mm256_loadu_si256((const __m256i*)from), by);
        const __m256i b = _mm256_srl_epi32(_mm256_loadu_si256((const __m256i*)(from + 8)), by);
        return integers(_mm256_and_si256(a, mask), _mm256_and_si256(b, mask));
    }

    // Products of bytes are added in pairs to 16 bits, which must hold them: codes of up to four bits can be added up
    // over a tile, wider ones not as long, and those of eight bits go in two halves.
    template <int B, int D>
    static inline __attribute__((always_inline)) void tile(const uint8_t* codes, const int8_t* q, int64_t stride,
                                                           __m256i* sums) {
        constexpr Fields all = fields(B);
        constexpr int together = B <= 4 ? 8 : B == 5 ? 4 : 2;
        const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15);
        __m256i lines[B], quads[8];
#pragma GCC unroll 8
        for (int line = 0; line < B; ++line) lines[line] = _mm256_loadu_si256((const __m256i*)(codes + line * LINE));
#pragma GCC unroll 8
        for (int quad = 0; quad < 8; ++quad) quads[quad] = _mm256_setzero_si256();
#pragma GCC unroll 12
        for (int f = 0; f < all.count; ++f) {
            const Field field = all.of[f];
            const __m256i mask = _mm256_set1_epi8((char)((1 << field.width) - 1));
            const __m256i bits = _mm256_and_si256(_mm256_srli_epi32(lines[field.line], field.at), mask);
            quads[field.quad] = _mm256_or_si256(quads[field.quad], _mm256_slli_epi32(bits, field.low));
        }
#pragma GCC unroll 3
        for (int d = 0; d < D; ++d) {
            __m256i high = _mm256_setzero_si256(), pairs = high;
#pragma GCC unroll 8
            for (int quad = 0; quad < 8; ++quad) {
                int32_t four;
                memcpy(&four, q + d * stride + 4 * quad, 4);
                const __m256i x = _mm256_set1_epi32(four);
                if (B == 8) {
                    const __m256i upper = _mm256_and_si256(_mm256_srli_epi32(quads[quad], 4), low);
                    pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(_mm256_and_si256(quads[quad], low), x));
                    high = _mm256_add_epi16(high, _mm256_maddubs_epi16(upper, x));
                    continue;
                }
                pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(quads[quad], x));
                if (quad % together == together - 1) {
                    sums[d] = _mm256_add_epi32(sums[d], _mm256_madd_epi16(pairs, ones));
                    pairs = _mm256_setzero_si256();
                }
            }
            if (B == 8)
                sums[d] = _mm256_add_epi32(
                    sums[d], _mm256_add_epi32(_mm256_madd_epi16(pairs, ones), _mm256_madd_epi16(high, _mm256_set1_epi16(16))));
        }
    }
    template <int B, int, int D>
    static inline __attribute__((always_inline)) void dot(const uint8_t* codes, const int8_t* q, int64_t stride,
                                                          int64_t tiles, const int32_t* start, int64_t blocks, F* out) {
        __m256i a[D], b[D];
        for (int d = 0; d < D; ++d) a[d] = b[d] = _mm256_set1_epi32(start[d * blocks]);
        for (int64_t t = 0; t < tiles; ++t) {
            const uint8_t* from = codes + t * B * LINE;
#pragma GCC unroll 8
            for (int line = 0; line < B; ++line) _mm_prefetch((const char*)from + line * LINE + AHEAD, _MM_HINT_T0);
            tile<B, D>(from, q + t * COLUMNS, stride, a);
            tile<B, D>(from + 32, q + t * COLUMNS, stride, b);
        }
        for (int d = 0; d < D; ++d) out[d] = integers(a[d], b[d]);
    }
};

}  // namespace

const Kernels* avx2_kernels() {
    static const Kernels found = {Product<Narrow>::all, unpack_rows, Rows<Narrow>::dense,
                                  Rows<Narrow>::attend, norm_row, gate_row};
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &found : nullptr;
}

}  // namespace bitfloor

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
namespace bitfloor {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace bitfloor
#endif
