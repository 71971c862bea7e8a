// The kernels in plain C++, for every processor.

#include "product.h"
#include "rows.h"
#include "unpack.h"

namespace bitfloor {
namespace {

struct Plain {
    struct F {
        float of[16];
    };
    static const int64_t TABLE = 128;  // of 16 for every four bits of a dword

    template <class Each>
    static F made(Each each) {
        F found;
        for (int i = 0; i < 16; ++i) found.of[i] = each(i);
        return found;
    }
    static F zero() { return set(0.0f); }
    static F set(float value) {
        return made([=](int) { return value; });
    }
    static F load(const float* from, int64_t count) {
        return made([=](int i) { return i < count ? from[i] : 0.0f; });
    }
    static void store(float* to, const F& value, int64_t count) {
        for (int64_t i = 0; i < count; ++i) to[i] = value.of[i];
    }
    static F fma(const F& a, const F& b, const F& c) {
        return made([&](int i) { return a.of[i] * b.of[i] + c.of[i]; });
    }
    static F mul(const F& a, const F& b) {
        return made([&](int i) { return a.of[i] * b.of[i]; });
    }
    static F add(const F& a, const F& b) {
        return made([&](int i) { return a.of[i] + b.of[i]; });
    }
    static F sub(const F& a, const F& b) {
        return made([&](int i) { return a.of[i] - b.of[i]; });
    }
    static F halves(const uint16_t* from) {
        return made([=](int i) { return from_half(from[i]); });
    }
    static F bfloats(const uint16_t* from) {
        return made([=](int i) { return from_bfloat(from[i]); });
    }
    template <int B>
    static F zeros(const uint8_t* from) {
        return made([=](int i) { return (float)stream_zero(from, B, i); });
    }
    static F bytes(const uint32_t* from, int at) {
        return made([=](int i) { return (float)(from[i] >> 8 * at & 255); });
    }

    // by[j][t]: what bit t of byte j adds. A bit that is set counts half of it, one that is not minus half.
    static void tables(const float (*by)[8], float* out) {
        for (int half = 0; half < 8; ++half) {
            const float* w = by[half / 2] + half % 2 * 4;
            for (int code = 0; code < 16; ++code) {
                float sum = 0.0f;
                for (int t = 0; t < 4; ++t) sum += code >> t & 1 ? 0.5f * w[t] : -0.5f * w[t];
                out[half * 16 + code] = sum;
            }
        }
    }
    template <int R>
    static void lines(const uint8_t* codes, int64_t stride, int64_t count, const float* tables, F* sum) {
        for (int r = 0; r < R; ++r) sum[r] = zero();
        for (int64_t line = 0; line < count; ++line)
            for (int r = 0; r < R; ++r) {
                uint32_t of[16];
                memcpy(of, codes + r * stride + line * LINE, LINE);
                for (int i = 0; i < 16; ++i) {
                    const float* from = tables + line * TABLE;
                    float total = 0.0f;
                    for (int half = 0; half < 8; ++half) total += from[half * 16 + (of[i] >> 4 * half & 15)];
                    sum[r].of[i] += total;
                }
            }
    }
    template <int B, int>
    static F dot(const uint8_t* codes, const int8_t* q, int64_t tiles, int32_t start) {
        int32_t sum[16];
        for (int i = 0; i < 16; ++i) sum[i] = start;
        for (int64_t t = 0; t < tiles; ++t) {
            uint32_t quads[8][16];
            decode<B>(codes + t * LINE * B, quads);
            for (int quad = 0; quad < 8; ++quad)
                for (int j = 0; j < 4; ++j) {
                    const int32_t x = q[t * COLUMNS + 4 * quad + j];
                    for (int i = 0; i < 16; ++i) sum[i] += (int32_t)(quads[quad][i] >> 8 * j & 255) * x;
                }
        }
        return made([&](int i) { return (float)sum[i]; });
    }
};

}  // namespace

const Kernels* portable_kernels() {
    static const Kernels found = {Product<Plain>::in_float, Product<Plain>::in_int8, unpack_rows, Rows<Plain>::dense,
                                  Rows<Plain>::attend,        norm_row,                gate_row};
    return &found;
}

}  // namespace bitfloor
