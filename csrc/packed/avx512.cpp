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

// One accumulator for every power of two that fields in place count too often.
template <int B>
struct Slots {
    static constexpr Fields all = fields(B);
    static constexpr int of(int field) {  // its accumulator
        int found = 0;
        for (int i = 0; i < field; ++i) {
            if (all.of[i].ratio() == all.of[field].ratio()) return of(i);
            bool first = true;
            for (int k = 0; k < i; ++k) first = first && all.of[k].ratio() != all.of[i].ratio();
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
            if (of(i) == slot) return all.of[i].ratio();
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
    using F = __m512;
    static const int64_t TABLE = 128;  // of 16 for every four bits of a dword

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

    static void tables(const float (*by)[8], float* out) {
        __m512 half[4];  // one half in lanes whose bit t is set, else minus one half
        static const uint16_t set_bits[4] = {0xaaaa, 0xcccc, 0xf0f0, 0xff00};
        for (int t = 0; t < 4; ++t) half[t] = _mm512_mask_blend_ps(set_bits[t], set(-0.5f), set(0.5f));
        for (int i = 0; i < 8; ++i) {
            const float* w = by[i / 2] + i % 2 * 4;
            const F sum = fma(half[1], set(w[1]), _mm512_mul_ps(half[0], set(w[0])));
            _mm512_store_ps(out + i * 16, fma(half[3], set(w[3]), fma(half[2], set(w[2]), sum)));
        }
    }

    // An index of four bits selects from a register: what stands above them in a lane does not matter.
    template <int R>
    static inline __attribute__((always_inline)) void lines(const uint8_t* codes, int64_t stride, int64_t count,
                                                            const float* tables, F* sum) {
        F even[R], odd[R];
        for (int r = 0; r < R; ++r) even[r] = odd[r] = zero();
        for (int64_t line = 0; line < count; ++line) {
            __m512i of[R];
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const uint8_t* from = codes + r * stride + line * LINE;
                of[r] = _mm512_loadu_si512(from);
                _mm_prefetch((const char*)from + R * stride, _MM_HINT_T1);  // the same line of the next row blocks
            }
            const float* table = tables + line * TABLE;
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) {
                const F own = _mm512_load_ps(table + i * 16);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    const F found = _mm512_permutexvar_ps(i ? _mm512_srli_epi32(of[r], 4 * i) : of[r], own);
                    if (i % 2)
                        odd[r] = add(odd[r], found);
                    else
                        even[r] = add(even[r], found);
                }
            }
        }
        for (int r = 0; r < R; ++r) sum[r] = add(even[r], odd[r]);
    }

    template <int B, size_t... I>
    static inline __attribute__((always_inline)) void tile(const uint8_t* codes, const int8_t* q, __m512i* sums,
                                                           std::index_sequence<I...>) {
        __m512i lines[B];
#pragma GCC unroll 8
        for (int line = 0; line < B; ++line) {
            lines[line] = _mm512_loadu_si512(codes + line * LINE);
            __asm__("" : "+v"(lines[line]));  // loaded once: else the load is folded into every AND
        }
        auto step = [&](auto number) __attribute__((always_inline)) {
            constexpr Field f = Slots<B>::all.of[decltype(number)::value];
            constexpr int slot = Slots<B>::of(decltype(number)::value);
            __m512i field = lines[f.line];
            if (f.width < 8) field = _mm512_and_si512(field, _mm512_set1_epi8((char)(((1 << f.width) - 1) << f.at)));
            int32_t quad;
            memcpy(&quad, q + 4 * f.quad, 4);
            sums[slot] = _mm512_dpbusd_epi32(sums[slot], field, _mm512_set1_epi32(quad));
        };
        (step(std::integral_constant<int, (int)I>{}), ...);
    }
    template <int B, size_t... S>
    static inline __attribute__((always_inline)) __m512i total(const __m512i* sums, std::index_sequence<S...>) {
        __m512i found = _mm512_setzero_si512();
        // Exact: every term of a slot is a multiple of two to its ratio.
        ((found = _mm512_add_epi32(found, _mm512_srai_epi32(sums[S], Slots<B>::ratio((int)S)))), ...);
        return found;
    }
    template <int B>
    static inline __attribute__((always_inline)) void next(const uint8_t* codes, const int8_t* q, __m512i* sums) {
#pragma GCC unroll 8
        for (int line = 0; line < B; ++line) _mm_prefetch((const char*)codes + line * LINE + AHEAD, _MM_HINT_T0);
        tile<B>(codes, q, sums, std::make_index_sequence<Slots<B>::all.count>{});
    }
    // KNOWN tiles, or as many as there are.
    template <int B, int KNOWN>
    static inline __attribute__((always_inline)) F dot(const uint8_t* codes, const int8_t* q, int64_t tiles,
                                                         int32_t start) {
        constexpr int S = Slots<B>::count();
        __m512i sums[S];
#pragma GCC unroll 8
        for (int s = 0; s < S; ++s) sums[s] = s ? _mm512_setzero_si512() : _mm512_set1_epi32(start);  // ratio 0
        if (KNOWN) {
#pragma GCC unroll 4
            for (int t = 0; t < KNOWN; ++t) next<B>(codes + t * B * LINE, q + t * COLUMNS, sums);
        } else {
            for (int64_t t = 0; t < tiles; ++t) next<B>(codes + t * B * LINE, q + t * COLUMNS, sums);
        }
        return _mm512_cvtepi32_ps(total<B>(sums, std::make_index_sequence<S>{}));
    }
};

}  // namespace

const Kernels* avx512_kernels() {
    static const Kernels found = {Product<Wide>::in_float, Product<Wide>::in_int8, unpack_rows, Rows<Wide>::dense,
                                  Rows<Wide>::attend,        norm_row,                gate_row};
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
