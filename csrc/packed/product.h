// The products, over an instruction set V (portable.cpp, avx2.cpp, avx512.cpp).
//
// x is a sum of digits: whole numbers of 8 bits, block by block of columns with a float scale. One of them is what rounding to
// int8 means; three hold 23 bits of the largest x of a block, which is what float sums keep of it. Digits are multiplied with
// codes by four-way dot products, in which nothing is rounded. With the middle of the code range taken off, so that little
// cancels:
//
//     y[r] = bias[r] + sum over groups of  scale * sum(c' x) + shift * sum(x),    c' = c - 2^(b-1),  shift = offset + 2^(b-1) scale
//
// which is (2^(b-1) - zero) * scale for a zero-point. What is summed in which order depends on V and on how many rows x has,
// and on nothing else: not on threads.
//
// V has: F (16 floats, one a row) with zero, set, load, store, mul, fma, add, sub; halves, bfloats and zeros as F;
// dot<B, tiles or 0, digits>(); and BLOCKED, with it Quad (columns 4q to 4q + 3 of 16 rows), decoded<B>() and
// dot_quads<tiles, digits>().

#ifndef BITFLOOR_PACKED_PRODUCT_H
#define BITFLOOR_PACKED_PRODUCT_H

#include "plan.h"
#include "tile.h"

namespace bitfloor {
namespace {

// Weights of the digits of x, the first one last.
static const float DIGIT[3] = {1.0f, 256.0f, 65536.0f};

template <class V>
struct Product {
    using F = typename V::F;

    static int64_t height(const Job& job, int64_t rb) { return least(ROWS, job.plan->rows - rb * ROWS); }
    static F numbers(const Plan& plan, const uint16_t* at) {
        return plan.scale_type == HALF ? V::halves(at) : V::bfloats(at);
    }
    static F scale(const Job& job, const Segment& s, int64_t rb, int64_t group) {
        return numbers(*job.plan, job.parts.scale + (rb * job.plan->groups + s.at_group + group) * ROWS);
    }
    // added * scale + offset, or (added - zero) * scale
    template <int B>
    static F shift(const Job& job, const Segment& s, int64_t rb, int64_t group, F scale, float added) {
        const Plan& plan = *job.plan;
        if (s.zero_form == OFFSET)
            return V::fma(V::set(added), scale,
                          numbers(plan, job.parts.offset + (rb * plan.offset_groups + s.at_offset + group) * ROWS));
        const F zero = s.zero_form == CONSTANT
                           ? V::set(0.5f * (float)s.constant)
                           : V::template zeros<B>(job.parts.zero + rb * plan.zero_bytes + s.at_zero + group * 2 * B);
        return V::fma(V::sub(V::set(added), zero), scale, V::zero());
    }

    static void begin(const Job& job, int64_t first, int64_t last) {
        const int64_t end = least(last * ROWS, job.plan->rows);
        for (int64_t m = 0; m < job.m; ++m)
            for (int64_t r = first * ROWS; r < end; ++r) job.y[m * job.plan->rows + r] = job.bias ? job.bias[r] : 0.0f;
    }

    // -- any groups: code by code --------------------------------------------------------------------------------------

    template <int B>
    static void any(const Job& job, const Segment& s, int64_t rb) {
        const Plan& plan = *job.plan;
        const uint8_t* codes = job.parts.codes + rb * plan.code_bytes + s.at_code;
        F sum[MOST_ROWS], by = V::zero(), add = V::zero();
        for (int64_t m = 0; m < job.m; ++m) sum[m] = V::zero();
        uint32_t tile[8][16];
        int64_t known = -1;
        for (int64_t j = 0; j < s.columns; ++j) {
            if (j % COLUMNS == 0) decode<B>(codes + j / COLUMNS * LINE * B, tile);
            if (j / s.group_size != known) {
                known = j / s.group_size;
                by = scale(job, s, rb, known);
                add = shift<B>(job, s, rb, known, by, 0.0f);
            }
            const F weight = V::fma(V::bytes(tile[j % COLUMNS / 4], (int)(j % 4)), by, add);
            for (int64_t m = 0; m < job.m; ++m)
                sum[m] = V::fma(weight, V::set(job.x[m * plan.padded + s.at_column + j]), sum[m]);
        }
        for (int64_t m = 0; m < job.m; ++m) {
            float* y = job.y + m * plan.rows + rb * ROWS;
            V::store(y, V::add(V::load(y, height(job, rb)), sum[m]), height(job, rb));
        }
    }
    static void any(const Job& job, const Segment& s, int64_t rb) {
#define BITFLOOR_ANY(B) any<B>(job, s, rb)
        BITFLOOR_FOR_WIDTH(s.bits, BITFLOOR_ANY)
#undef BITFLOOR_ANY
    }

    // -- digits --------------------------------------------------------------------------------------------------------

    // `before` and the sums of digits of a block.
    static F scaled_digits(const Job& job, int64_t block, int digits, const F* sums, F before) {
        if (digits == 1) return V::fma(sums[0], V::set(job.q_scale[block]), before);
        F found = V::mul(sums[0], V::set(job.q_scale[block] * DIGIT[digits - 1]));
        for (int d = 1; d < digits; ++d)
            found = V::fma(sums[d], V::set(job.q_scale[block] * DIGIT[digits - 1 - d]), found);
        return V::add(before, found);
    }
    // Whole blocks are known when this is compiled, where that is worth it.
    template <int B, int D>
    static inline __attribute__((always_inline)) void dot(const uint8_t* codes, const int8_t* q, int64_t stride, int64_t tiles,
                                                          const int32_t* start, int64_t blocks, F* out) {
        if (V::BLOCKED && B == 1 && tiles == 4)
            V::template dot<B, 4, D>(codes, q, stride, 4, start, blocks, out);
        else if (V::BLOCKED && D == 1 && tiles == 2)
            V::template dot<B, 2, D>(codes, q, stride, 2, start, blocks, out);
        else if (V::BLOCKED && tiles == 1)
            V::template dot<B, 1, D>(codes, q, stride, 1, start, blocks, out);
        else
            V::template dot<B, 0, D>(codes, q, stride, tiles, start, blocks, out);
    }

    // The y of m rows of x, kept in registers where there is one.
    template <int B, int M, int D>
    static inline __attribute__((always_inline)) void integers(const Job& job, const Segment& s, int64_t rb, F* y) {
        const Plan& plan = *job.plan;
        const uint8_t* codes = job.parts.codes + rb * plan.code_bytes + s.at_code;
        constexpr int KIND = kind_of(D);
        const int64_t per = s.block[KIND] / COLUMNS, blocks = plan.blocks[KIND], rows = M ? M : job.m;  // tiles of a block of x
        for (int64_t group = 0; group < s.groups; ++group) {
            const int64_t begin = group * s.group_tiles, end = least(s.tiles, begin + s.group_tiles);
            const F by = scale(job, s, rb, group), add = shift<B>(job, s, rb, group, by, (float)(1 << (B - 1)));
            for (int64_t m = 0; m < rows; ++m) {
                F sum = V::zero();
                for (int64_t t = begin; t < end; t += per) {
                    const int64_t block = s.at_block[KIND] + t / per, tiles = least(per, end - t);
                    const uint8_t* from = codes + t * LINE * B;
                    const int8_t* q = job.q + m * D * plan.padded + s.at_column + t * COLUMNS;
                    F whole[D];
                    dot<B, D>(from, q, plan.padded, tiles, job.q_start + m * D * blocks + block, blocks, whole);
                    sum = scaled_digits(job, m * blocks + block, D, whole, sum);
                }
                const F all = V::set(job.q_sum[m * plan.groups + s.at_group + group]);
                y[m] = V::fma(by, sum, V::fma(add, all, y[m]));
            }
        }
    }
    template <int B, int D>
    static void integers(const Job& job, const Segment& s, int64_t rb, F* y) {
        if (job.m > 1) return integers<B, 0, D>(job, s, rb, y);
        F one = y[0];
        integers<B, 1, D>(job, s, rb, &one);
        y[0] = one;
    }
    template <int D>
    static void segment(const Job& job, const Segment& s, int64_t rb, F* y) {
#define BITFLOOR_INTEGERS(B) integers<B, D>(job, s, rb, y)
        BITFLOOR_FOR_WIDTH(s.bits, BITFLOOR_INTEGERS)
#undef BITFLOOR_INTEGERS
    }

    // -- many rows: tiles are decoded once for all of them ---------------------------------------------------------------

    // T tiles from column `at` on, in one block of x, or two in a block each (APART). `start`, or nothing: the block begins
    // with these tiles, or before.
    template <int B, int D, int T, bool APART>
    static inline __attribute__((always_inline)) void tiles_of_many(const Job& job, const uint8_t* codes, int64_t at,
                                                                    int64_t block, bool start, F by, float* y) {
        static const int32_t nothing[3] = {0, 0, 0};
        const Plan& plan = *job.plan;
        const int64_t blocks = plan.blocks[kind_of(D)];
        typename V::Quad quads[8 * T];
        for (int t = 0; t < T; ++t) V::template decoded<B>(codes + t * LINE * B, quads + 8 * t);
        for (int64_t m = 0; m < job.m; ++m) {
            F whole[2 * D];
            V::template dot_quads<T, D, APART>(quads, job.q + m * D * plan.padded + at, plan.padded,
                                               start ? job.q_start + m * D * blocks + block : nothing, start ? blocks : 1,
                                               whole);
            F found = scaled_digits(job, m * blocks + block, D, whole, V::zero());
            if (APART) found = scaled_digits(job, m * blocks + block + 1, D, whole + D, found);
            V::store(y + m * ROWS, V::fma(by, found, V::load(y + m * ROWS, ROWS)), ROWS);
        }
    }
    template <int B, int D>
    static void blocked(const Job& job, const Segment& s, int64_t rb, float* y) {
        const Plan& plan = *job.plan;
        const uint8_t* codes = job.parts.codes + rb * plan.code_bytes + s.at_code;
        constexpr int KIND = kind_of(D);
        const int64_t per = s.block[KIND] / COLUMNS;
        for (int64_t group = 0; group < s.groups; ++group) {
            const int64_t begin = group * s.group_tiles, end = least(s.tiles, begin + s.group_tiles);
            const F by = scale(job, s, rb, group), add = shift<B>(job, s, rb, group, by, (float)(1 << (B - 1)));
            for (int64_t t = begin; t < end;) {
                const int64_t block = s.at_block[KIND] + t / per, left = least(per - t % per, end - t);
                const int64_t at = s.at_column + t * COLUMNS, step = least(2, end - t);
                if (step == 2 && left > 1)
                    tiles_of_many<B, D, 2, false>(job, codes + t * LINE * B, at, block, t % per == 0, by, y);
                else if (step == 2 && per == 1)
                    tiles_of_many<B, D, 2, true>(job, codes + t * LINE * B, at, block, true, by, y);
                else
                    tiles_of_many<B, D, 1, false>(job, codes + t * LINE * B, at, block, t % per == 0, by, y);
                t += left > 1 || per == 1 ? step : 1;
            }
            for (int64_t m = 0; m < job.m; ++m) {
                const F all = V::set(job.q_sum[m * plan.groups + s.at_group + group]);
                V::store(y + m * ROWS, V::fma(add, all, V::load(y + m * ROWS, ROWS)), ROWS);
            }
        }
    }
    template <int D>
    static void blocked_segment(const Job& job, const Segment& s, int64_t rb, float* y) {
#define BITFLOOR_BLOCKED(B) blocked<B, D>(job, s, rb, y)
        BITFLOOR_FOR_WIDTH(s.bits, BITFLOOR_BLOCKED)
#undef BITFLOOR_BLOCKED
    }

    // Rows `at` on of x.
    static Job rows_of(const Job& job, int64_t at, int64_t count) {
        const Plan& plan = *job.plan;
        Job found = job;
        const int64_t blocks = plan.blocks[kind_of(job.digits)];
        found.m = count, found.x += at * plan.padded, found.y += at * plan.rows, found.q += at * job.digits * plan.padded;
        found.q_scale += at * blocks, found.q_start += at * job.digits * blocks, found.q_sum += at * plan.groups;
        return found;
    }

    static void many(const Job& job, int64_t first, int64_t last, float* y) {
        const Plan& plan = *job.plan;
        for (int64_t rb = first; rb < last; ++rb) {
            const int64_t rows = height(job, rb);
            const F bias = job.bias ? V::load(job.bias + rb * ROWS, rows) : V::zero();
            for (int64_t m = 0; m < job.m; ++m) V::store(y + m * ROWS, bias, ROWS);
            for (int64_t i = 0; i < plan.count_segments; ++i) {
                const Segment& s = plan.segments[i];
                if (!s.group_tiles) continue;
                if (job.digits == 1)
                    blocked_segment<1>(job, s, rb, y);
                else
                    blocked_segment<3>(job, s, rb, y);
            }
            for (int64_t m = 0; m < job.m; ++m)
                V::store(job.y + m * plan.rows + rb * ROWS, V::load(y + m * ROWS, ROWS), rows);
            for (int64_t i = 0; i < plan.count_segments; ++i)
                for (int64_t at = 0; !plan.segments[i].group_tiles && at < job.m; at += MOST_ROWS)
                    any(rows_of(job, at, least(MOST_ROWS, job.m - at)), plan.segments[i], rb);
        }
    }

    // Any number of rows of x.
    static void all(const Job& job, int64_t first, int64_t last) {
        if constexpr (V::BLOCKED) {
            float* y = job.m > MOST_ROWS ? static_cast<float*>(scratch(4 * ROWS * job.m, 0)) : nullptr;
            if (y) return many(job, first, last, y);
        }
        for (int64_t at = 0; at < job.m; at += MOST_ROWS)
            few(rows_of(job, at, least(MOST_ROWS, job.m - at)), first, last);
    }

    // Up to MOST_ROWS rows of x.
    static void few(const Job& job, int64_t first, int64_t last) {
        const Plan& plan = *job.plan;
        begin(job, first, last);
        for (int64_t rb = first; rb < last; ++rb) {
            F y[MOST_ROWS];
            for (int64_t i = 0; i < plan.count_segments; ++i) {
                const Segment& s = plan.segments[i];
                if (!s.group_tiles) {
                    any(job, s, rb);
                    continue;
                }
                for (int64_t m = 0; m < job.m; ++m) y[m] = V::load(job.y + m * plan.rows + rb * ROWS, height(job, rb));
                if (job.digits == 1)
                    segment<1>(job, s, rb, y);
                else
                    segment<3>(job, s, rb, y);
                for (int64_t m = 0; m < job.m; ++m) V::store(job.y + m * plan.rows + rb * ROWS, y[m], height(job, rb));
            }
        }
    }
};

}  // namespace
}  // namespace bitfloor

#endif
