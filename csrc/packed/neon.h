// What the kernels are over for NEON: a line of codes is four registers of four rows. DOT: the processor has SDOT, four
// products of bytes a lane at once; without it they are widened, multiplied and added in pairs.

#ifndef BITFLOOR_PACKED_NEON_H
#define BITFLOOR_PACKED_NEON_H

#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#include "product.h"
#include "rows.h"
#include "unpack.h"

namespace bitfloor {
namespace {

static const int64_t AHEAD = 1024;  // bytes that the int8 product asks for in advance

// Which two bytes of a stream of zero-points hold that of a row, and how far up. 255 selects none.
template <int B>
struct alignas(16) Spread {
    uint8_t bytes[64];
    int32_t shift[16];
    constexpr Spread() : bytes(), shift() {
        for (int r = 0; r < 16; ++r) {
            const int byte = r * B / 8, next = byte + 1 < 2 * B ? byte + 1 : byte;
            bytes[4 * r] = (uint8_t)byte, bytes[4 * r + 1] = (uint8_t)next;
            bytes[4 * r + 2] = bytes[4 * r + 3] = 255;
            shift[r] = -(r * B % 8);
        }
    }
};

template <bool DOT>
struct Neon {
    static constexpr bool BLOCKED = false;
    struct F {
        float32x4_t of[4];  // rows 0 to 3, 4 to 7, ...
    };
    template <class Each>
    static inline __attribute__((always_inline)) F made(const Each& each) {
        F found;
        found.of[0] = each(0), found.of[1] = each(1), found.of[2] = each(2), found.of[3] = each(3);
        return found;
    }
    static F zero() { return set(0.0f); }
    static F set(float value) {
        return made([=](int) { return vdupq_n_f32(value); });
    }
    static F load(const float* from, int64_t count) {
        float whole[16] = {0.0f};
        const float* at = from;
        if (count != ROWS) memcpy(whole, from, sizeof(float) * (size_t)count), at = whole;
        return made([=](int i) { return vld1q_f32(at + 4 * i); });
    }
    static void store(float* to, const F& value, int64_t count) {
        float whole[16];
        float* at = count == ROWS ? to : whole;
        for (int i = 0; i < 4; ++i) vst1q_f32(at + 4 * i, value.of[i]);
        if (count != ROWS) memcpy(to, whole, sizeof(float) * (size_t)count);
    }
    static F fma(const F& a, const F& b, const F& c) {
        return made([&](int i) { return vfmaq_f32(c.of[i], a.of[i], b.of[i]); });
    }
    static F mul(const F& a, const F& b) {
        return made([&](int i) { return vmulq_f32(a.of[i], b.of[i]); });
    }
    static F add(const F& a, const F& b) {
        return made([&](int i) { return vaddq_f32(a.of[i], b.of[i]); });
    }
    static F sub(const F& a, const F& b) {
        return made([&](int i) { return vsubq_f32(a.of[i], b.of[i]); });
    }
    static F halves(const uint16_t* from) {
        return made([=](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + 4 * i))); });
    }
    static F bfloats(const uint16_t* from) {
        return made([=](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from + 4 * i), 16)); });
    }
    template <int B>
    static F zeros(const uint8_t* from) {
        static constexpr Spread<B> at = {};
        uint8_t stream[16] = {0};
        memcpy(stream, from, 2 * B);
        const uint8x16_t whole = vld1q_u8(stream);
        const uint32x4_t mask = vdupq_n_u32((1 << B) - 1);
        return made([=](int i) {
            const uint32x4_t two = vreinterpretq_u32_u8(vqtbl1q_u8(whole, vld1q_u8(at.bytes + 16 * i)));
            return vcvtq_f32_u32(vandq_u32(vshlq_u32(two, vld1q_s32(at.shift + 4 * i)), mask));
        });
    }
    static F bytes(const uint32_t* from, int at) {
        const int32x4_t by = vdupq_n_s32(-8 * at);
        return made([=](int i) {
            return vcvtq_f32_u32(vandq_u32(vshlq_u32(vld1q_u32(from + 4 * i), by), vdupq_n_u32(255)));
        });
    }

    // Sums of four rows: SDOT adds into one register, pairs of products into two.
    struct Sum {
        int32x4_t a, b;
        int32x4_t whole() const { return DOT ? a : vpaddq_s32(a, b); }  // a: halves of rows 0 and 1, b: of 2 and 3
    };
    // x holds the four columns of 4 quads; its lane LANE is multiplied.
    template <int LANE>
    static inline __attribute__((always_inline)) void multiply(Sum& sum, int8x16_t codes, int8x16_t x) {
        if constexpr (DOT) {
            sum.a = vdotq_laneq_s32(sum.a, codes, x, LANE);
        } else {
            const int8x16_t four = vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(x), LANE));
            sum.a = vpadalq_s16(sum.a, vmull_s8(vget_low_s8(codes), vget_low_s8(four)));
            sum.b = vpadalq_s16(sum.b, vmull_high_s8(codes, four));
        }
    }

    // One field of a register of codes, where it belongs in its code.
    template <int B, int NUMBER>
    static inline __attribute__((always_inline)) uint8x16_t field(const uint8x16_t* lines) {
        constexpr Field f = fields(B).of[NUMBER];
        uint8x16_t found = lines[f.line];
        if constexpr (f.at > 0) found = vshrq_n_u8(found, f.at);
        if constexpr (f.at + f.width < 8) found = vandq_u8(found, vdupq_n_u8((1 << f.width) - 1));
        if constexpr (f.low > 0) found = vshlq_n_u8(found, f.low);
        return found;
    }
    // Codes of a quad of columns of four rows as signed bytes; of eight bits 128 less, which is what the start takes off.
    template <int B, int QUAD, size_t... I>
    static inline __attribute__((always_inline)) int8x16_t quad(const uint8x16_t* lines, std::index_sequence<I...>) {
        constexpr Fields all = fields(B);
        uint8x16_t found = vdupq_n_u8(0);
        bool first = true;
        auto join = [&](auto number) __attribute__((always_inline)) {
            constexpr int n = decltype(number)::value;
            if constexpr (all.of[n].quad == QUAD) {
                found = first ? field<B, n>(lines) : vorrq_u8(found, field<B, n>(lines));
                first = false;
            }
        };
        (join(std::integral_constant<int, (int)I>{}), ...);
        if constexpr (B == 8) found = veorq_u8(found, vdupq_n_u8(128));
        return vreinterpretq_s8_u8(found);
    }
    // Rows 4 * i to 4 * i + 3 of a tile, with D digits of x that are `stride` apart.
    template <int B, int D, size_t... Q>
    static inline __attribute__((always_inline)) void tile(const uint8_t* codes, const int8x16_t (*x)[2], Sum* sums,
                                                           std::index_sequence<Q...>) {
        uint8x16_t lines[B];
        for (int line = 0; line < B; ++line) lines[line] = vld1q_u8(codes + line * LINE);
        auto step = [&](auto number) __attribute__((always_inline)) {
            constexpr int q = decltype(number)::value;
            const int8x16_t own = quad<B, q>(lines, std::make_index_sequence<fields(B).count>{});
            for (int d = 0; d < D; ++d) multiply<q % 4>(sums[d], own, x[d][q / 4]);
        };
        (step(std::integral_constant<int, (int)Q>{}), ...);
    }
    // Digits of x are `stride` apart, their starts `blocks`.
    template <int B, int, int D>
    static inline __attribute__((always_inline)) void dot(const uint8_t* codes, const int8_t* q, int64_t stride,
                                                          int64_t tiles, const int32_t* start, int64_t blocks, F* out) {
        Sum sums[4][D];
        for (int i = 0; i < 4; ++i)
            for (int d = 0; d < D; ++d) sums[i][d].a = sums[i][d].b = vdupq_n_s32(0);
        for (int64_t t = 0; t < tiles; ++t) {
            const uint8_t* from = codes + t * B * LINE;
            int8x16_t x[D][2];
            for (int d = 0; d < D; ++d)
                for (int half = 0; half < 2; ++half) x[d][half] = vld1q_s8(q + d * stride + t * COLUMNS + 16 * half);
            for (int line = 0; line < B; ++line) __builtin_prefetch(from + line * LINE + AHEAD);
            for (int i = 0; i < 4; ++i) tile<B, D>(from + 16 * i, x, sums[i], std::make_index_sequence<8>{});
        }
        for (int d = 0; d < D; ++d) {
            // It is -middle * sum of x, and the middle of eight bits is the 128 that quad() took off.
            const int32x4_t begin = vdupq_n_s32(B == 8 ? 0 : start[d * blocks]);
            out[d] = made([&](int i) { return vcvtq_f32_s32(vaddq_s32(sums[i][d].whole(), begin)); });
        }
    }
};

}  // namespace
}  // namespace bitfloor

#endif
