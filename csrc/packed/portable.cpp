// The kernels in plain C++, for every processor.

#include "product.h"
#include "rows.h"
#include "unpack.h"

namespace bitfloor {
namespace {

struct Plain {
    static constexpr bool BLOCKED = false;
    struct F {
        float of[16];
    };
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

    template <int B, int, int D>
    static void dot(const uint8_t* codes, const int8_t* q, int64_t stride, int64_t tiles, const int32_t* start,
                    int64_t blocks, F* out) {
        int32_t sum[D][16];
        for (int d = 0; d < D; ++d)
            for (int i = 0; i < 16; ++i) sum[d][i] = start[d * blocks];
        for (int64_t t = 0; t < tiles; ++t) {
            uint32_t quads[8][16];
            decode<B>(codes + t * LINE * B, quads);
            for (int quad = 0; quad < 8; ++quad)
                for (int j = 0; j < 4; ++j)
                    for (int d = 0; d < D; ++d) {
                        const int32_t x = q[d * stride + t * COLUMNS + 4 * quad + j];
                        for (int i = 0; i < 16; ++i) sum[d][i] += (int32_t)(quads[quad][i] >> 8 * j & 255) * x;
                    }
        }
        for (int d = 0; d < D; ++d) out[d] = made([&](int i) { return (float)sum[d][i]; });
    }
};

}  // namespace

const Kernels* portable_kernels() {
    static const Kernels found = {Product<Plain>::all, unpack_rows, Rows<Plain>::dense,
                                  Rows<Plain>::attend, norm_row, gate_row};
    return &found;
}

}  // namespace bitfloor
