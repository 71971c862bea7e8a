// Dense rows, to the last bit those of docs/format.md: (code * scale + shift) * channel_scale, rounded after each.
// Compiled once for every instruction set, by its compiler.

#ifndef BITFLOOR_PACKED_UNPACK_H
#define BITFLOOR_PACKED_UNPACK_H

#include "plan.h"
#include "tile.h"

namespace bitfloor {
namespace {

struct Affine {
    float scale, shift;
};

inline Affine affine(const Dense& dense, const Segment& s, int64_t rb, int64_t r, int64_t group) {
    const Plan& plan = *dense.plan;
    const auto number = plan.scale_type == HALF ? from_half : from_bfloat;
    const float scale = number(dense.parts.scale[(rb * plan.groups + s.at_group + group) * ROWS + r]);
    if (s.zero_form == OFFSET)
        return {scale, number(dense.parts.offset[(rb * plan.offset_groups + s.at_offset + group) * ROWS + r])};
    float zero = 0.5f * (float)s.constant;
    if (s.zero_form == PACKED)
        zero = (float)stream_zero(dense.parts.zero + rb * plan.zero_bytes + s.at_zero + group * 2 * s.bits, s.bits, r);
    return {scale, -zero * scale};
}

// Columns `from` to `to` of a tile's row.
inline void spread(const uint8_t* codes, Affine by, float* out, int64_t from, int64_t to) {
    if (to - from == COLUMNS) {
        for (int64_t j = 0; j < COLUMNS; ++j) out[j] = (float)codes[j] * by.scale + by.shift;
        return;
    }
    for (int64_t j = from; j < to; ++j) out[j] = (float)codes[j] * by.scale + by.shift;
}

// Rows r0 to r1 of a row block.
template <int B>
inline void unpack_segment(const Dense& dense, const Segment& s, int64_t start, int64_t rb, int64_t r0, int64_t r1,
                           float* out) {
    const Plan& plan = *dense.plan;
    const uint8_t* codes = dense.parts.codes + rb * plan.code_bytes + s.at_code;
    const auto number = plan.scale_type == HALF ? from_half : from_bfloat;
    Affine by[ROWS] = {};
    int64_t known[ROWS];
    for (int64_t r = 0; r < ROWS; ++r) known[r] = -1;
    for (int64_t tile = 0; tile < s.tiles; ++tile) {
        uint32_t quads[8][16];
        decode<B>(codes + tile * LINE * B, quads);
        const int64_t first = tile * COLUMNS, count = least(COLUMNS, s.columns - first);
        float factor[COLUMNS] = {};
        if (s.scaled)
            for (int64_t j = 0; j < count; ++j) factor[j] = number(dense.parts.channel_scale[s.at_channel + first + j]);
        for (int64_t r = r0; r < r1; ++r) {
            uint8_t own[COLUMNS];
            for (int64_t q = 0; q < QUADS; ++q) memcpy(own + 4 * q, &quads[q][r], 4);
            float local[COLUMNS];
            for (int64_t j = 0; j < count;) {
                const int64_t group = (first + j) / s.group_size;
                const int64_t end = least(count, (group + 1) * s.group_size - first);
                if (known[r] != group) by[r] = affine(dense, s, rb, r, group), known[r] = group;
                spread(own, by[r], local, j, end);
                j = end;
            }
            if (s.scaled)
                for (int64_t j = 0; j < count; ++j) local[j] = local[j] * factor[j];
            float* row = out + (r - r0) * plan.inputs;
            if (dense.index)
                for (int64_t j = 0; j < count; ++j) row[dense.index[start + first + j]] += local[j];
            else
                memcpy(row + start + first, local, sizeof(float) * count);
        }
    }
}

inline void unpack_rows(const Dense& dense, int64_t first, int64_t last) {
    const Plan& plan = *dense.plan;
    for (int64_t i = first; i < last;) {
        const int64_t row = dense.ids ? dense.ids[i] : dense.first + i;
        const int64_t rb = row / ROWS, r = row % ROWS, count = dense.ids ? 1 : least(ROWS - r, last - i);
        int64_t start = 0;
        for (int64_t k = 0; k < plan.count_segments; ++k) {
            const Segment& s = plan.segments[k];
#define BITFLOOR_UNPACK(B) unpack_segment<B>(dense, s, start, rb, r, r + count, dense.out + i * plan.inputs)
            BITFLOOR_FOR_WIDTH(s.bits, BITFLOOR_UNPACK)
#undef BITFLOOR_UNPACK
            start += s.columns;
        }
        i += count;
    }
}

}  // namespace
}  // namespace bitfloor

#endif
