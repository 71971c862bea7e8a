// What a decoder does to rows of floats between its products, over an instruction set V as in product.h. V has
// mul too.

#ifndef BITFLOOR_PACKED_ROWS_H
#define BITFLOOR_PACKED_ROWS_H

#include <math.h>
#include <string.h>

#include "plan.h"
#include "tile.h"

namespace bitfloor {
namespace {

// e to the x, to about 1e-7 of itself; loops over it become vector code. Below -87 it stays at 1e-38.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float whole = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: a whole number stands in its low bits
    const float n = whole - 12582912.0f;
    const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // |r| <= log(2) / 2
    float sum = 1.0f / 5040.0f;  // the series, whose next term is below 1e-8
    sum = sum * r + 1.0f / 720.0f;
    sum = sum * r + 1.0f / 120.0f;
    sum = sum * r + 1.0f / 24.0f;
    sum = sum * r + 1.0f / 6.0f;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &whole, 4);
    bits = (bits + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return sum * power;
}

inline float folded(float* lanes) {
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

// out = weight * x / sqrt(mean of x^2 + epsilon)
inline void norm_row(const float* x, const float* weight, float epsilon, int64_t n, float* out) {
    float lanes[16] = {0.0f};
    int64_t j = 0;
    for (; j + 16 <= n; j += 16)
        for (int i = 0; i < 16; ++i) lanes[i] += x[j + i] * x[j + i];
    for (int i = 0; j < n; ++i, ++j) lanes[i] += x[j] * x[j];
    const float by = 1.0f / sqrtf(folded(lanes) / (float)n + epsilon);
    for (j = 0; j < n; ++j) out[j] = weight[j] * (x[j] * by);
}

// gate = silu(gate) * up
inline void gate_row(float* __restrict gate, const float* __restrict up, int64_t n) {
    for (int64_t j = 0; j < n; ++j) gate[j] = gate[j] / (1.0f + exponential(-gate[j])) * up[j];
}

inline float largest(const float* x, int64_t n) {
    float lanes[16];
    for (float& lane : lanes) lane = x[0];
    int64_t j = 0;
    for (; j + 16 <= n; j += 16)
        for (int i = 0; i < 16; ++i) lanes[i] = x[j + i] > lanes[i] ? x[j + i] : lanes[i];
    for (; j < n; ++j) lanes[0] = x[j] > lanes[0] ? x[j] : lanes[0];
    float top = lanes[0];
    for (float lane : lanes) top = lane > top ? lane : top;
    return top;
}

// x = e^(x - top) for all of them; returns their sum.
inline float exponentials(float* x, int64_t n, float top) {
    float lanes[16] = {0.0f};
    int64_t j = 0;
    for (; j + 16 <= n; j += 16)
        for (int i = 0; i < 16; ++i) {
            const float value = exponential(x[j + i] - top);
            x[j + i] = value;
            lanes[i] += value;
        }
    for (int i = 0; j < n; ++i, ++j) lanes[i] += x[j] = exponential(x[j] - top);
    return folded(lanes);
}

template <class V>
struct Rows {
    using F = typename V::F;

    // -- dense matrices: four rows of the matrix at a time share x -----------------------------------------------------

    static F numbers(const void* from, int64_t type, int64_t at, int64_t count) {
        if (type == 0) return V::load(static_cast<const float*>(from) + at, count);
        const uint16_t* half = static_cast<const uint16_t*>(from) + at;
        uint16_t whole[16] = {0};
        if (count < 16) memcpy(whole, half, sizeof(uint16_t) * (size_t)count), half = whole;
        return type == 1 ? V::halves(half) : V::bfloats(half);
    }
    static float total(F sum) {
        float lanes[16];
        V::store(lanes, sum, 16);
        return folded(lanes);
    }
    static void dense(const DenseJob& job, int64_t first, int64_t last) {
        static const int64_t R = 4;
        for (int64_t row = first; row < last; row += R) {
            const int64_t rows = least(R, last - row);
            for (int64_t m = 0; m < job.m; ++m) {
                const float* x = job.x + m * job.inputs;
                F sum[R];
                for (int64_t r = 0; r < R; ++r) sum[r] = V::zero();
                for (int64_t j = 0; j < job.inputs; j += 16) {
                    const int64_t count = least(16, job.inputs - j);
                    const F own = V::load(x + j, count);
                    for (int64_t r = 0; r < R; ++r)  // a row that is none is the last one once more
                        sum[r] = V::fma(numbers(job.weight, job.type, (row + least(r, rows - 1)) * job.inputs + j, count),
                                        own, sum[r]);
                }
                for (int64_t r = 0; r < rows; ++r)
                    job.y[m * job.rows + row + r] = total(sum[r]) + (job.bias ? job.bias[row + r] : 0.0f);
            }
        }
    }

    // -- attention -----------------------------------------------------------------------------------------------------

    // Up to Q queries of one key head at a time share what is read of the cache.
    static const int64_t Q = 4;

    struct Query {
        const float* q;
        float* out;
        float* scores;        // of the positions from `base` on
        int64_t begin, end;   // positions that it sees
    };

    template <int N>
    static void scores(const Attention& a, const float* keys, const Query* of, int64_t base, int64_t end) {
        for (int64_t at = base; at < end; at += 16) {
            const float* block = keys + at * a.head_dim;
            F even[N], odd[N];
            for (int n = 0; n < N; ++n) even[n] = odd[n] = V::zero();
            int64_t d = 0;
            for (; d + 2 <= a.head_dim; d += 2) {
                const F k0 = V::load(block + d * 16, 16), k1 = V::load(block + d * 16 + 16, 16);
                for (int n = 0; n < N; ++n) {
                    even[n] = V::fma(V::set(of[n].q[d]), k0, even[n]);
                    odd[n] = V::fma(V::set(of[n].q[d + 1]), k1, odd[n]);
                }
            }
            for (int n = 0; n < N; ++n)
                V::store(of[n].scores + at - base, V::mul(V::add(even[n], odd[n]), V::set(a.scaling)), 16);
        }
    }
    // `width` columns of 16 of the values, weighted.
    template <int N, int W>
    static void mix(const Attention& a, const float* values, const Query* of, int64_t base, const float* by) {
        F sum[N][W];
        int64_t begin = of[0].begin, end = of[0].end;
        for (int n = 0; n < N; ++n) {
            begin = least(begin, of[n].begin), end = of[n].end > end ? of[n].end : end;
            for (int w = 0; w < W; ++w) sum[n][w] = V::zero();
        }
        for (int64_t at = begin; at < end; ++at) {
            F own[W];
            for (int w = 0; w < W; ++w) own[w] = V::load(values + at * a.value_dim + 16 * w, 16);
            for (int n = 0; n < N; ++n) {
                const F p = V::set(of[n].scores[at - base]);
                for (int w = 0; w < W; ++w) sum[n][w] = V::fma(p, own[w], sum[n][w]);
            }
        }
        for (int n = 0; n < N; ++n)
            for (int w = 0; w < W; ++w) V::store(of[n].out + 16 * w, V::mul(sum[n][w], V::set(by[n])), 16);
    }
    template <int N>
    static void some(const Attention& a, int64_t head, Query* of) {
        const float* keys = a.keys + head * a.head_dim * a.positions;
        const float* values = a.values + head * a.value_dim * a.positions;
        int64_t base = of[0].begin, end = of[0].end;
        for (int n = 1; n < N; ++n) base = least(base, of[n].begin), end = of[n].end > end ? of[n].end : end;
        base = base / 16 * 16;
        scores<N>(a, keys, of, base, end);
        float by[N];
        for (int n = 0; n < N; ++n) {
            float* own = of[n].scores + of[n].begin - base;
            const int64_t count = of[n].end - of[n].begin;
            by[n] = 1.0f / exponentials(own, count, largest(own, count));
            // What others see and this one does not.
            for (int64_t i = base; i < of[n].begin; ++i) of[n].scores[i - base] = 0.0f;
            for (int64_t i = of[n].end; i < end; ++i) of[n].scores[i - base] = 0.0f;
        }
        for (int64_t d = 0; d < a.value_dim; d += 32) {
            Query moved[N];
            for (int n = 0; n < N; ++n) moved[n] = of[n], moved[n].out += d;
            if (a.value_dim - d >= 32)
                mix<N, 2>(a, values + d, moved, base, by);
            else
                mix<N, 1>(a, values + d, moved, base, by);
        }
    }

    // Items: for every key head, for every row, its queries.
    static void attend(const Attention& a, int64_t first, int64_t last) {
        const int64_t room = up(a.positions, 16) * 16;
        float* space = static_cast<float*>(scratch(4 * Q * (room + a.value_dim), 1));
        if (!space) {
            a.failed->store(true);
            return;
        }
        float* outs = space + Q * room;
        const int64_t share = a.heads / a.kv_heads, per_head = share * a.rows;
        for (int64_t item = first; item < last;) {
            const int64_t head = item / per_head, count = least(least(Q, last - item), (head + 1) * per_head - item);
            Query of[Q];
            float* to[Q];
            for (int64_t n = 0; n < count; ++n) {
                const int64_t within = item + n - head * per_head, row = within / share;
                const int64_t query = head * share + within % share, position = a.start + row;
                const int64_t begin = a.window && position >= a.window ? position - a.window + 1 : 0;
                const int64_t at = (row * a.heads + query) * a.head_dim;
                of[n] = {a.q + at, outs + n * a.value_dim, space + n * room, begin, position + 1};
                to[n] = a.out + at;
            }
            if (count == 4)
                some<4>(a, head, of);
            else if (count == 3)
                some<3>(a, head, of);
            else if (count == 2)
                some<2>(a, head, of);
            else
                some<1>(a, head, of);
            for (int64_t n = 0; n < count; ++n) memcpy(to[n], of[n].out, sizeof(float) * (size_t)a.head_dim);
            item += count;
        }
    }
};

}  // namespace
}  // namespace bitfloor

#endif
