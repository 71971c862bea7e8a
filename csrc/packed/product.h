// The products and the unpacking, over an instruction set V (portable.cpp, avx2.cpp, avx512.cpp).
//
// Both products write the code as its middle plus the rest c', so that little cancels:
//
//     y[r] = bias[r] + sum over groups of  scale * sum(c' x) + shift * sum(x),    shift = offset + middle * scale
//
// which is (middle - zero) * scale for a zero-point. The middle is (2^b - 1) / 2 in float, and 2^(b - 1) in int8. What is summed in which order depends on V and on nothing else: not
// on the rows of a call, not on threads.
//
// In float, sum(c' x) is looked up: a line of 64 bytes holds a few bits of every row, and what bits in the same place add
// to a row's sum depends on x alone. So a table of x by bit pattern is made once for a chunk of lines, whatever their
// width, and serves all rows. In int8 the fields of a line are multiplied in place, V::dot.
//
// V has: F (16 floats, one a row) with zero, set, load, store, fma, sub; halves, bfloats and zeros as F;
// TABLE floats of tables a line, tables(), lines(); dot<B, tiles or 0>().

#ifndef BITFLOOR_PACKED_PRODUCT_H
#define BITFLOOR_PACKED_PRODUCT_H

#include "plan.h"
#include "tile.h"

namespace bitfloor {
namespace {

static const int64_t CHUNK = 64;  // lines that have tables at a time

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

    // -- float ---------------------------------------------------------------------------------------------------------

    struct Piece {  // of a chunk, in one group
        int64_t line, lines, group;
    };
    struct Chunk {
        int64_t line, lines, count;  // first line of the segment, lines, pieces
        Piece* pieces;
        float* sums;    // [m, count]
        float* tables;  // [m, lines, TABLE]
    };

    // Tables of a tile of x.
    static void tile_tables(const float* x, int64_t bits, const LineBits* places, float* out) {
        for (int64_t line = 0; line < bits; ++line) {
            float by[4][8];
            for (int at = 0; at < 8; ++at) {
                const Bit bit = places[line].bit[at];
                for (int j = 0; j < 4; ++j) by[j][at] = (float)(1 << bit.power) * x[4 * bit.quad + j];
            }
            V::tables(by, out + line * V::TABLE);
        }
    }
    static void fill(const Job& job, const Segment& s, int64_t tile, int64_t tiles, const LineBits* places,
                     Chunk& chunk) {
        chunk.line = tile * s.bits, chunk.lines = tiles * s.bits, chunk.count = 0;
        for (int64_t t = tile; t < tile + tiles;) {
            const int64_t group = t / s.group_tiles, end = least(tile + tiles, (group + 1) * s.group_tiles);
            chunk.pieces[chunk.count++] = {(t - tile) * s.bits, (end - t) * s.bits, group};
            t = end;
        }
        for (int64_t m = 0; m < job.m; ++m) {
            const float* x = job.x + m * job.plan->padded + s.at_column + tile * COLUMNS;
            for (int64_t t = 0; t < tiles; ++t)
                tile_tables(x + t * COLUMNS, s.bits, places,
                            chunk.tables + (m * chunk.lines + t * s.bits) * V::TABLE);
            for (int64_t p = 0; p < chunk.count; ++p) {
                const Piece& piece = chunk.pieces[p];
                const float* from = x + piece.line / s.bits * COLUMNS;
                float lanes[16] = {0.0f};
                for (int64_t j = 0; j < piece.lines / s.bits * COLUMNS; j += 16)
                    for (int i = 0; i < 16; ++i) lanes[i] += from[j + i];
                for (int half = 8; half; half /= 2)
                    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
                chunk.sums[m * chunk.count + p] = lanes[0];
            }
        }
    }
    // R row blocks at once share what is loaded of the tables.
    template <int B, int R>
    static void rows(const Job& job, const Segment& s, const Chunk& chunk, int64_t rb) {
        const Plan& plan = *job.plan;
        const uint8_t* codes = job.parts.codes + rb * plan.code_bytes + s.at_code + chunk.line * LINE;
        for (int64_t m = 0; m < job.m; ++m) {
            F y[R];
            float* to = job.y + m * plan.rows + rb * ROWS;
            for (int r = 0; r < R; ++r) y[r] = V::load(to + r * ROWS, height(job, rb + r));
            for (int64_t p = 0; p < chunk.count; ++p) {
                const Piece piece = chunk.pieces[p];
                F sum[R];
                V::template lines<R>(codes + piece.line * LINE, plan.code_bytes, piece.lines,
                                     chunk.tables + (m * chunk.lines + piece.line) * V::TABLE, sum);
                const F whole = V::set(chunk.sums[m * chunk.count + p]);
                for (int r = 0; r < R; ++r) {
                    const F by = scale(job, s, rb + r, piece.group);
                    const F add = shift<B>(job, s, rb + r, piece.group, by, middle(B));
                    y[r] = V::fma(by, sum[r], V::fma(add, whole, y[r]));
                }
            }
            for (int r = 0; r < R; ++r) V::store(to + r * ROWS, y[r], height(job, rb + r));
        }
    }

    template <int B>
    static void all_rows(const Job& job, const Segment& s, const Chunk& chunk, int64_t rb, int64_t last) {
        for (; rb + 4 <= last; rb += 4) rows<B, 4>(job, s, chunk, rb);
        for (; rb < last; ++rb) rows<B, 1>(job, s, chunk, rb);
    }

    static void in_float(const Job& job, int64_t first, int64_t last) {
        const Plan& plan = *job.plan;
        begin(job, first, last);
        Chunk chunk;
        float sums[CHUNK * MOST_ROWS];
        Piece pieces[CHUNK];
        chunk.sums = sums, chunk.pieces = pieces;
        chunk.tables = static_cast<float*>(scratch(CHUNK * MOST_ROWS * V::TABLE * 4, 0));
        for (int64_t i = 0; i < plan.count_segments; ++i) {
            const Segment& s = plan.segments[i];
            if (!s.group_tiles || !chunk.tables) {
                for (int64_t rb = first; rb < last; ++rb) any(job, s, rb);
                continue;
            }
            LineBits places[8];
            for (int line = 0; line < s.bits; ++line) places[line] = line_bits((int)s.bits, line);
            const int64_t step = CHUNK / s.bits;
            for (int64_t tile = 0; tile < s.tiles; tile += step) {
                fill(job, s, tile, least(step, s.tiles - tile), places, chunk);
#define BITFLOOR_ALL_ROWS(B) all_rows<B>(job, s, chunk, first, last)
                BITFLOOR_FOR_WIDTH(s.bits, BITFLOOR_ALL_ROWS)
#undef BITFLOOR_ALL_ROWS
            }
        }
    }

    // -- int8 ----------------------------------------------------------------------------------------------------------

    // The y of m rows of x, kept in registers where there is one.
    template <int B, int M>
    static inline __attribute__((always_inline)) void integers(const Job& job, const Segment& s, int64_t rb, F* y) {
        const Plan& plan = *job.plan;
        const uint8_t* codes = job.parts.codes + rb * plan.code_bytes + s.at_code;
        const int64_t per = s.block / COLUMNS, rows = M ? M : job.m;  // tiles of a block of activations
        for (int64_t group = 0; group < s.groups; ++group) {
            const int64_t begin = group * s.group_tiles, end = least(s.tiles, begin + s.group_tiles);
            const F by = scale(job, s, rb, group), add = shift<B>(job, s, rb, group, by, (float)(1 << (B - 1)));
            for (int64_t m = 0; m < rows; ++m) {
                const int8_t* q = job.q + m * plan.padded + s.at_column;
                F sum = V::zero();
                for (int64_t t = begin; t < end; t += per) {
                    const int64_t at = m * plan.blocks + s.at_block + t / per, tiles = least(per, end - t);
                    const uint8_t* from = codes + t * LINE * B;
                    const F whole = tiles == 4 ? V::template dot<B, 4>(from, q + t * COLUMNS, 4, job.q_start[at])
                                               : V::template dot<B, 0>(from, q + t * COLUMNS, tiles, job.q_start[at]);
                    sum = V::fma(whole, V::set(job.q_scale[at]), sum);
                }
                const F all = V::set(job.q_sum[m * plan.groups + s.at_group + group]);
                y[m] = V::fma(by, sum, V::fma(add, all, y[m]));
            }
        }
    }
    template <int B>
    static void integers(const Job& job, const Segment& s, int64_t rb, F* y) {
        if (job.m > 1) return integers<B, 0>(job, s, rb, y);
        F one = y[0];
        integers<B, 1>(job, s, rb, &one);
        y[0] = one;
    }

    static void in_int8(const Job& job, int64_t first, int64_t last) {
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
#define BITFLOOR_INTEGERS(B) integers<B>(job, s, rb, y)
                BITFLOOR_FOR_WIDTH(s.bits, BITFLOOR_INTEGERS)
#undef BITFLOOR_INTEGERS
                for (int64_t m = 0; m < job.m; ++m) V::store(job.y + m * plan.rows + rb * ROWS, y[m], height(job, rb));
            }
        }
    }
};

}  // namespace
}  // namespace bitfloor

#endif
