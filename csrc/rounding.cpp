// Fake quantization for learned rounding: the forward, the codes, and the update with its sums, each in one pass.
//
// src/bitfloor/ops/rounding_reference.py defines every value computed here, but for the sign of a zero; ops/native.py calls it.
// Matrices are dense, row by row: weight, shift, grad, out [rows, columns]; scale, zero, towards, clipped
// [rows, groups], with groups of group_size columns, of which the last may be short. shift may be null. Rows first to
// last - 1 are treated, so that callers can share rows between threads; no value depends on how they do.

#include "common.h"

static const int64_t TILE = 256;  // columns whose products are kept at once; a multiple of LANES

namespace {

struct Shape {
    int64_t columns, groups, group_size;
    float top;  // largest code

    Shape(int64_t columns_, int64_t group_size_, int64_t bits)
        : columns(columns_),
          groups((columns_ + group_size_ - 1) / group_size_),
          group_size(group_size_),
          top(static_cast<float>((INT64_C(1) << bits) - 1)) {}

    INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
    int64_t begin(int64_t group) const { return group * group_size; }
    int64_t count(int64_t group) const { return least(group_size, columns - group * group_size); }
};

}  // namespace

// The code before it is clamped to [0, top].
template <bool SHIFTED>
INLINE float unclamped(float weight, float shift, float scale, float offset) {
    float x = (weight + offset) / scale;
    if (SHIFTED) x = x + shift;
    return rounded(x);
}

template <bool SHIFTED>
INLINE void fake_quantize_group(const float* __restrict weight, const float* __restrict shift, float scale, float zero,
                                float* __restrict out, int64_t count, float top) {
    const float offset = zero * scale;
    for (int64_t j = 0; j < count; ++j) {
        const float code = unclamped<SHIFTED>(weight[j], SHIFTED ? shift[j] : 0.0f, scale, offset);
        out[j] = (clamped(code, top) - zero) * scale;
    }
}

template <bool SHIFTED>
INLINE void codes_group(const float* __restrict weight, const float* __restrict shift, float scale, float zero,
                        uint8_t* __restrict out, int64_t count, float top) {
    const float offset = zero * scale;
    for (int64_t j = 0; j < count; ++j) {
        const float code = unclamped<SHIFTED>(weight[j], SHIFTED ? shift[j] : 0.0f, scale, offset);
        out[j] = static_cast<uint8_t>(static_cast<int32_t>(clamped(code, top)));
    }
}

// Products of up to TILE columns, and their shift moved.
template <bool SHIFTED>
INLINE void step_tile(const float* __restrict weight, float* __restrict shift, const float* __restrict grad,
                      float scale, float zero, float move, float* __restrict towards, float* __restrict clipped,
                      int64_t count, float top) {
    const float offset = zero * scale;
    for (int64_t j = 0; j < count; ++j) {
        const float code = unclamped<SHIFTED>(weight[j], SHIFTED ? shift[j] : 0.0f, scale, offset);
        const bool inside = (code >= 0.0f) & (code <= top);
        const float g = grad[j], exact = weight[j] / scale;
        towards[j] = g * ((clamped(code, top) - zero) - (inside ? exact : 0.0f));
        clipped[j] = inside ? 0.0f : -g;
        if (SHIFTED) {
            const float up = (inside & (g > 0.0f)) ? move : 0.0f, down = (inside & (g < 0.0f)) ? move : 0.0f;
            shift[j] = shift[j] - (up - down);
        }
    }
}

template <bool SHIFTED>
INLINE void step_group(const float* weight, float* shift, const float* grad, float scale, float zero, float move,
                       float* towards, float* clipped, int64_t count, float top) {
    float towards_lanes[LANES] = {0.0f}, clipped_lanes[LANES] = {0.0f};
    float towards_tile[TILE], clipped_tile[TILE];
    for (int64_t at = 0; at < count; at += TILE) {
        const int64_t n = Shape::least(TILE, count - at);
        step_tile<SHIFTED>(weight + at, SHIFTED ? shift + at : shift, grad + at, scale, zero, move, towards_tile,
                           clipped_tile, n, top);
        add_lanes(towards_lanes, towards_tile, n);
        add_lanes(clipped_lanes, clipped_tile, n);
    }
    *towards = folded(towards_lanes);
    *clipped = folded(clipped_lanes);
}

PUBLIC int64_t bitfloor_abi(void) { return ABI; }

// out = (clamp(round((weight + zero * scale) / scale + shift), 0, 2^bits - 1) - zero) * scale
PUBLIC VERSIONS void bitfloor_fake_quantize(const float* weight, const float* shift, const float* scale,
                                            const float* zero, float* out, int64_t first, int64_t last,
                                            int64_t columns, int64_t group_size, int64_t bits) {
    const Shape shape(columns, group_size, bits);
    for (int64_t row = first; row < last; ++row) {
        for (int64_t group = 0; group < shape.groups; ++group) {
            const int64_t at = row * columns + shape.begin(group), k = row * shape.groups + group;
            const int64_t n = shape.count(group);
            if (shift)
                fake_quantize_group<true>(weight + at, shift + at, scale[k], zero[k], out + at, n, shape.top);
            else
                fake_quantize_group<false>(weight + at, shift, scale[k], zero[k], out + at, n, shape.top);
        }
    }
}

// out = clamp(round((weight + zero * scale) / scale + shift), 0, 2^bits - 1)
PUBLIC VERSIONS void bitfloor_codes(const float* weight, const float* shift, const float* scale, const float* zero,
                                    uint8_t* out, int64_t first, int64_t last, int64_t columns, int64_t group_size,
                                    int64_t bits) {
    const Shape shape(columns, group_size, bits);
    for (int64_t row = first; row < last; ++row) {
        for (int64_t group = 0; group < shape.groups; ++group) {
            const int64_t at = row * columns + shape.begin(group), k = row * shape.groups + group;
            const int64_t n = shape.count(group);
            if (shift)
                codes_group<true>(weight + at, shift + at, scale[k], zero[k], out + at, n, shape.top);
            else
                codes_group<false>(weight + at, shift, scale[k], zero[k], out + at, n, shape.top);
        }
    }
}

// shift -= rate * sign(grad) * sign(scale) where the code was not clamped, in place; and per group
// towards = sum grad * (code - zero - (not clamped) * weight / scale), clipped = -sum of grad where clamped.
PUBLIC VERSIONS void bitfloor_sign_step(const float* weight, float* shift, const float* scale, const float* zero,
                                        const float* grad, float rate, float* towards, float* clipped, int64_t first,
                                        int64_t last, int64_t columns, int64_t group_size, int64_t bits) {
    const Shape shape(columns, group_size, bits);
    for (int64_t row = first; row < last; ++row) {
        for (int64_t group = 0; group < shape.groups; ++group) {
            const int64_t at = row * columns + shape.begin(group), k = row * shape.groups + group;
            const int64_t n = shape.count(group);
            const float move = scale[k] > 0.0f ? rate : -rate;
            if (shift)
                step_group<true>(weight + at, shift + at, grad + at, scale[k], zero[k], move, towards + k, clipped + k,
                                 n, shape.top);
            else
                step_group<false>(weight + at, shift, grad + at, scale[k], zero[k], move, towards + k, clipped + k, n,
                                  shape.top);
        }
    }
}
