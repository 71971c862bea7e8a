// The column loops of GPTQ and of coordinate descent, and the search for a grid.
//
// src/bitfloor/ops/sweeps_reference.py and search_reference.py define every value computed here, but for the sign of a
// zero; ops/native.py calls it. The loops take matrices column by column: [columns, rows], rows contiguous. Rows first to
// last - 1 are treated, so that callers can share rows between threads; no value depends on how they do.

#include <cmath>

#include "common.h"

static const int64_t STRIP = 64;  // rows treated at once: a strip of a block of columns stays in the nearest cache

// to[r] = to[r] + factor * by[r], product and sum rounded one after the other
INLINE void add_multiple(float* __restrict to, const float* __restrict by, float factor, int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
        const float product = factor * by[r];
        to[r] = to[r] + product;
    }
}

INLINE void gptq_strip(float* work, const float* local, const float* scale, const float* shift, const float* tops,
                       uint8_t* codes, float* errors, int64_t columns, int64_t rows, int64_t count) {
    for (int64_t j = 0; j < columns; ++j) {
        const float pivot = local[j * columns + j], top = tops[j];
        const float* __restrict w = work + j * rows;
        const float* __restrict s = scale + j * rows;
        const float* __restrict o = shift + j * rows;
        float* __restrict e = errors + j * rows;
        uint8_t* __restrict c = codes + j * rows;
        for (int64_t r = 0; r < count; ++r) {
            const float code = clamped(rounded((w[r] - o[r]) / s[r]), top);
            const float product = code * s[r];
            e[r] = (w[r] - (product + o[r])) / pivot;
            c[r] = static_cast<uint8_t>(code == code ? static_cast<int32_t>(code) : 0);
        }
        for (int64_t k = j + 1; k < columns; ++k) add_multiple(work + k * rows, e, -local[j * columns + k], count);
    }
}

// work: weights, changed to what they were when their column was fixed; scale, shift [columns, rows]; tops [columns];
// local [columns, columns] upper triangle of the factor; codes and errors [columns, rows] are written.
PUBLIC VERSIONS void bitfloor_gptq_columns(float* work, const float* local, const float* scale, const float* shift,
                                           const float* tops, uint8_t* codes, float* errors, int64_t first, int64_t last,
                                           int64_t columns, int64_t rows) {
    for (int64_t at = first; at < last; at += STRIP) {
        const int64_t count = last - at < STRIP ? last - at : STRIP;
        gptq_strip(work + at, local, scale + at, shift + at, tops, codes + at, errors + at, columns, rows, count);
    }
}

INLINE void descend_strip(float* codes, float* slope, float* error, const float* local, const float* pivots,
                          const float* scale, float top, int64_t columns, int64_t rows, int64_t count) {
    float moved[STRIP];
    for (int64_t j = 0; j < columns; ++j) {
        const float pivot = pivots[j];
        const float* g = slope + j * rows;  // changed below, through another pointer
        float* __restrict c = codes + j * rows;
        float* __restrict e = error + j * rows;
        bool any = false;
        for (int64_t r = 0; r < count; ++r) {
            const float best = clamped(rounded(c[r] - (g[r] / pivot) / scale[r]), top);
            moved[r] = (best - c[r]) * scale[r];
            c[r] = best;
            e[r] = e[r] + moved[r];
            any |= moved[r] != 0.0f;
        }
        if (any)
            for (int64_t k = 0; k < columns; ++k) add_multiple(slope + k * rows, moved, local[j * columns + k], count);
    }
}

// codes (whole numbers), slope and error [columns, rows] of one group, all changed in place; local [columns, columns];
// pivots [columns], infinite for a column that stays as it is; scale [rows].
PUBLIC VERSIONS void bitfloor_descend_columns(float* codes, float* slope, float* error, const float* local,
                                              const float* pivots, const float* scale, float top, int64_t first,
                                              int64_t last, int64_t columns, int64_t rows) {
    for (int64_t at = first; at < last; at += STRIP) {
        const int64_t count = last - at < STRIP ? last - at : STRIP;
        descend_strip(codes + at, slope + at, error + at, local, pivots, scale + at, top, columns, rows, count);
    }
}

static const int64_t PIECE = 256;  // columns whose terms are kept at once; a multiple of LANES

INLINE float rounding_error(const float* __restrict weight, const float* __restrict importance, float scale, float zero,
                            float top, int64_t columns) {
    float lanes[LANES] = {0.0f}, terms[PIECE];
    const float whole = std::floor(zero), part = zero - whole;
    for (int64_t at = 0; at < columns; at += PIECE) {
        const int64_t count = columns - at < PIECE ? columns - at : PIECE;
        for (int64_t j = 0; j < count; ++j) {
            const float w = weight[at + j];
            const float code = clamped(rounded(w / scale + part) + whole, top) - zero;
            const float product = code * scale;
            const float off = w - product;
            const float square = off * off;
            terms[j] = square * importance[at + j];
        }
        add_lanes(lanes, terms, count);
    }
    return folded(lanes);
}

INLINE void fit_sums(const float* __restrict weight, const float* __restrict importance, float scale, float zero,
                     float top, int64_t columns, float* above, float* below) {
    float over[LANES] = {0.0f}, under[LANES] = {0.0f}, a[PIECE], b[PIECE];
    const float whole = std::floor(zero), part = zero - whole;
    for (int64_t at = 0; at < columns; at += PIECE) {
        const int64_t count = columns - at < PIECE ? columns - at : PIECE;
        for (int64_t j = 0; j < count; ++j) {
            const float w = weight[at + j], h = importance[at + j];
            const float code = clamped(rounded(w / scale + part) + whole, top) - zero;
            const float hw = h * w, square = code * code;
            a[j] = hw * code;
            b[j] = h * square;
        }
        add_lanes(over, a, count);
        add_lanes(under, b, count);
    }
    *above = folded(over);
    *below = folded(under);
}

// weight [rows, columns] and importance [columns], row by row here; scale, zero and error [rows, groups] hold the best
// so far and are changed where one of the candidates [count, rows, groups] is better; tops [groups].
PUBLIC VERSIONS void bitfloor_best_grid(const float* weight, const float* importance, const float* tops,
                                        const float* scales, const float* zeros, int64_t count, float* scale, float* zero,
                                        float* error, int64_t first, int64_t last, int64_t rows, int64_t columns,
                                        int64_t group_size) {
    const int64_t groups = (columns + group_size - 1) / group_size;
    for (int64_t row = first; row < last; ++row)
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t begin = group * group_size, k = row * groups + group;
            const int64_t n = columns - begin < group_size ? columns - begin : group_size;
            for (int64_t c = 0; c < count; ++c) {
                const int64_t at = c * rows * groups + k;
                const float found = rounding_error(weight + row * columns + begin, importance + begin, scales[at],
                                                   zeros[at], tops[group], n);
                if (found < error[k]) {
                    error[k] = found;
                    scale[k] = scales[at];
                    zero[k] = zeros[at];
                }
            }
        }
}

// above = sum importance * weight * code, below = sum importance * code^2 [rows, groups], codes less their zero-point.
PUBLIC VERSIONS void bitfloor_fit_sums(const float* weight, const float* importance, const float* tops,
                                       const float* scale, const float* zero, float* above, float* below, int64_t first,
                                       int64_t last, int64_t columns, int64_t group_size) {
    const int64_t groups = (columns + group_size - 1) / group_size;
    for (int64_t row = first; row < last; ++row)
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t begin = group * group_size, k = row * groups + group;
            const int64_t n = columns - begin < group_size ? columns - begin : group_size;
            fit_sums(weight + row * columns + begin, importance + begin, scale[k], zero[k], tops[group], n, above + k,
                     below + k);
        }
}
