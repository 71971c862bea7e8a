// The kernels for AVX-512 with VNNI: a line of codes is a register, a row is a lane of 32 bits.

#include "plan.h"

#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#endif

#include "product.h"
#include "rows.h"
#include "unpack.h"

namespace bitfloor {
namespace {

static const int64_t AHEAD = 8192;  // bytes that the int8 product asks for in advance

// One accumulator for every power of two that fields in place count too often. Where codes are short
// these are many, and the upper half of a byte is moved down before it is multiplied.
template <int B, int D>
struct Slots {
    static constexpr Fields all = fields(B);
    static constexpr bool upper(Field field) { return (B == 1 || (B == 2 && D > 1)) && field.at >= 4; }
    static constexpr int at(Field field) { return upper(field) ? field.at - 4 : field.at; }
    static constexpr int ratio_of(Field field) { return at(field) - field.low; }
    static constexpr int of(int field) {  // its accumulator
        int found = 0;
        for (int i = 0; i < field; ++i) {
            if (ratio_of(all.of[i]) == ratio_of(all.of[field])) return of(i);
            bool first = true;
            for (int k = 0; k < i; ++k) first = first && ratio_of(all.of[k]) != ratio_of(all.of[i]);
            found += first ? 1 : 0;
        }
        return found;
    }
    static constexpr int count() {
        int most = 0;
        for (int i = 0; i < all.count; ++i) most = of(i) + 1 > most ? of(i) + 1 : most;
        return most;
    }
    static constexpr int ratio(int slot) {
        for (int i = 0; i < all.count; ++i)
            if (of(i) == slot) return ratio_of(all.of[i]);
        return 0;
    }
};

// Which two bytes of a stream of zero-points hold that of a row, and how far up.
template <int B>
struct alignas(64) Spread {
    uint32_t bytes[16], shift[16];
    constexpr Spread() : bytes(), shift() {
        for (int r = 0; r < 16; ++r) {
            const uint32_t byte = r * B / 8, next = byte + 1 < 2 * B ? byte + 1 : byte;
            bytes[r] = 0x80800000u | next << 8 | byte;
            shift[r] = r * B % 8;
        }
    }
};

struct Wide {
    static constexpr bool BLOCKED = true;
    using F = __m512;

    static F zero() { return _mm512_setzero_ps(); }
    static F set(float value) { return _mm512_set1_ps(value); }
    static __mmask16 first(int64_t count) { return (__mmask16)((1u << count) - 1); }
    static F load(const float* from, int64_t count) { return _mm512_maskz_loadu_ps(first(count), from); }
    static void store(float* to, F value, int64_t count) { _mm512_mask_storeu_ps(to, first(count), value); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F halves(const uint16_t* from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }
    static F bfloats(const uint16_t* from) {
        return _mm512_castsi512_ps(
            _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16));
    }
    template <int B>
    static F zeros(const uint8_t* from) {
        alignas(64) static constexpr Spread<B> at = {};
        __m512i v = _mm512_broadcast_i32x4(_mm_maskz_loadu_epi8((__mmask16)((1u << 2 * B) - 1), from));
        v = _mm512_shuffle_epi8(v, _mm512_load_si512(at.bytes));
        v = _mm512_srlv_epi32(v, _mm512_load_si512(at.shift));
        return _mm512_cvtepi32_ps(_mm512_and_si512(v, _mm512_set1_epi32((1 << B) - 1)));
    }
    static F bytes(const uint32_t* from, int at) {
        const __m512i shifted = _mm512_srlv_epi32(_mm512_loadu_si512(from), _mm512_set1_epi32(8 * at));
        return _mm512_cvtepi32_ps(_mm512_and_si512(shifted, _mm512_set1_epi32(255)));
    }

    // One tile, all digits: q of a digit is `stride` behind that of the one before.
    template <int B, int D, size_t... I>
    static inline __attribute__((always_inline)) void tile(const uint8_t* codes, const int8_t* q, int64_t stride,
                                                           __m512i (*sums)[D], std::index_sequence<I...>) {
        __m512i lines[B], uppers[B];
#pragma GCC unroll 8
        for (int line = 0; line < B; ++line) {
            _mm_prefetch((const char*)codes + line * LINE + AHEAD, _MM_HINT_T0);
            lines[line] = _mm512_loadu_si512(codes + line * LINE);
            __asm__("" : "+v"(lines[line]));  // loaded once: else the load is folded into every AND
            uppers[line] = _mm512_srli_epi16(lines[line], 4);
        }
        auto step = [&](auto number) __attribute__((always_inline)) {
            constexpr Field f = Slots<B, D>::all.of[decltype(number)::value];
            constexpr int slot = Slots<B, D>::of(decltype(number)::value);
            __m512i field = Slots<B, D>::upper(f) ? uppers[f.line] : lines[f.line];
            if (f.width < 8)
                field = _mm512_and_si512(field, _mm512_set1_epi8((char)(((1 << f.width) - 1) << Slots<B, D>::at(f))));
#pragma GCC unroll 3
            for (int d = 0; d < D; ++d) {
                int32_t quad;
                memcpy(&quad, q + d * stride + 4 * f.quad, 4);
                sums[slot][d] = _mm512_dpbusd_epi32(sums[slot][d], field, _mm512_set1_epi32(quad));
            }
        };
        (step(std::integral_constant<int, (int)I>{}), ...);
    }
    template <int B, int D, size_t... S>
    static inline __attribute__((always_inline)) __m512i total(__m512i (*sums)[D], int d, std::index_sequence<S...>) {
        __m512i found = _mm512_setzero_si512();
        // Exact: every term of a slot is a multiple of two to its ratio.
        ((found = _mm512_add_epi32(found, _mm512_srai_epi32(sums[S][d], Slots<B, D>::ratio((int)S)))), ...);
        return found;
    }
    // KNOWN tiles, or as many as there are; starts of digits are `blocks` apart.
    template <int B, int KNOWN, int D>
    static inline __attribute__((always_inline)) void dot(const uint8_t* codes, const int8_t* q, int64_t stride,
                                                          int64_t tiles, const int32_t* start, int64_t blocks, F* out) {
        constexpr int S = Slots<B, D>::count();
        constexpr auto all = std::make_index_sequence<Slots<B, D>::all.count>{};
        __m512i sums[S][D];
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s)  // slot 0 has ratio 0
#pragma GCC unroll 3
            for (int d = 0; d < D; ++d) sums[s][d] = s ? _mm512_setzero_si512() : _mm512_set1_epi32(start[d * blocks]);
        if (KNOWN) {
#pragma GCC unroll 4
            for (int t = 0; t < KNOWN; ++t) tile<B, D>(codes + t * B * LINE, q + t * COLUMNS, stride, sums, all);
        } else {
            for (int64_t t = 0; t < tiles; ++t) tile<B, D>(codes + t * B * LINE, q + t * COLUMNS, stride, sums, all);
        }
#pragma GCC unroll 3
        for (int d = 0; d < D; ++d) out[d] = _mm512_cvtepi32_ps(total<B, D>(sums, d, std::make_index_sequence<S>{}));
    }

    using Quad = __m512i;
    template <int B>
    static inline __attribute__((always_inline)) void decoded(const uint8_t* codes, Quad* quads) {
        constexpr Fields all = fields(B);
#pragma GCC unroll 8
        for (int quad = 0; quad < 8; ++quad) quads[quad] = _mm512_setzero_si512();
#pragma GCC unroll 12
        for (int f = 0; f < all.count; ++f) {
            const Field field = all.of[f];
            const __m512i line = _mm512_loadu_si512(codes + field.line * LINE);
            const __m512i bits = _mm512_and_si512(_mm512_srli_epi32(line, field.at),
                                                  _mm512_set1_epi8((char)((1 << field.width) - 1)));
            quads[field.quad] = _mm512_or_si512(quads[field.quad], _mm512_slli_epi32(bits, field.low));
        }
    }
    // The sums of T tiles together, or of two APART: those of the second behind those of the first.
    template <int T, int D, bool APART>
    static inline __attribute__((always_inline)) void dot_quads(const Quad* quads, const int8_t* q, int64_t stride,
                                                                const int32_t* start, int64_t blocks, F* out) {
        constexpr int step = APART ? 1 : 2, other = APART ? 8 : 1;
#pragma GCC unroll 3
        for (int d = 0; d < D; ++d) {
            __m512i one = _mm512_set1_epi32(start[d * blocks]);
            __m512i two = APART ? _mm512_set1_epi32(start[d * blocks + 1]) : _mm512_setzero_si512();
#pragma GCC unroll 8
            for (int quad = 0; quad < 4 * T * step; quad += step) {
                int32_t a, b;
                memcpy(&a, q + d * stride + 4 * quad, 4);
                memcpy(&b, q + d * stride + 4 * (quad + other), 4);
                one = _mm512_dpbusd_epi32(one, quads[quad], _mm512_set1_epi32(a));
                two = _mm512_dpbusd_epi32(two, quads[quad + other], _mm512_set1_epi32(b));
            }
            out[d] = _mm512_cvtepi32_ps(APART ? one : _mm512_add_epi32(one, two));
            if (APART) out[D + d] = _mm512_cvtepi32_ps(two);
        }
    }
};

}  // namespace

const Kernels* avx512_kernels() {
    static const Kernels found = {Product<Wide>::all, unpack_rows, Rows<Wide>::dense,
                                  Rows<Wide>::attend, norm_row, gate_row};
    const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx2") &&
                      __builtin_cpu_supports("fma");
    return here ? &found : nullptr;
}

}  // namespace bitfloor

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
namespace bitfloor {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace bitfloor
#endif
