// The input side of a product, see input.h. ops/packed_reference.py defines it.

#include "input.h"

#include <math.h>
#include <string.h>

#include "tile.h"

namespace bitfloor {

namespace {

// Entry p of a list of indices below `entries`, in the smallest type that holds them.
inline int64_t entry(const void* list, int64_t entries, int64_t p) {
    if (entries <= 256) return static_cast<const uint8_t*>(list)[p];
    if (entries <= 65536) return static_cast<const uint16_t*>(list)[p];
    return static_cast<const uint32_t*>(list)[p];
}

inline float number(const void* x, int64_t type, int64_t i) {
    if (type == 0) return static_cast<const float*>(x)[i];
    const uint16_t half = static_cast<const uint16_t*>(x)[i];
    return type == 1 ? from_half(half) : from_bfloat(half);
}

// x H of n columns, in place. Passes of increasing distance; the scale comes last.
VERSIONS void hadamard(float* __restrict x, int64_t n) {
    for (int64_t half = 1; half < n; half *= 2)
        for (int64_t at = 0; at < n; at += 2 * half) {
            float *a = x + at, *b = a + half;
            for (int64_t j = 0; j < half; ++j) {
                const float sum = a[j] + b[j], rest = a[j] - b[j];
                a[j] = sum, b[j] = rest;
            }
        }
    const float scale = (float)pow((double)n, -0.5);
    for (int64_t j = 0; j < n; ++j) x[j] = x[j] * scale;
}

}  // namespace

bool stored_index(const Plan& plan, const void* order, int32_t* index) {
    if (!plan.unit) return true;
    if (!order) return false;
    const int64_t entries = up(plan.inputs, plan.unit);
    int64_t at = 0;
    for (int64_t p = 0; p < plan.count; ++p) {
        const int64_t first = entry(order, entries, p) * plan.unit, last = least(first + plan.unit, plan.inputs);
        if (first >= plan.inputs || at + last - first > plan.stored) return false;
        for (int64_t j = first; j < last; ++j) index[at++] = (int32_t)j;
    }
    return at == plan.stored;
}

bool channel_index(const Plan& plan, const void* channels, int32_t* index) {
    if (!plan.channels) return true;
    if (!channels) return false;
    for (int64_t j = 0; j < plan.inputs; ++j) {
        const int64_t from = entry(channels, plan.inputs, j);
        if (from >= plan.inputs) return false;
        index[j] = (int32_t)from;
    }
    return true;
}

void rotate(const Plan& plan, float* x) {
    int64_t done = 0;
    for (int64_t block = plan.rotation; block; block /= 2)
        for (; done + block <= plan.inputs; done += block) hadamard(x + done, block);
}

void input_row(const Plan& plan, const int32_t* channels, const void* x, int64_t type, int64_t i, float* row) {
    const int64_t n = plan.inputs, start = i * n;
    if (type == 0 && !channels)
        memcpy(row, static_cast<const float*>(x) + start, sizeof(float) * (size_t)n);
    else if (type == 0)
        for (int64_t j = 0; j < n; ++j) row[j] = static_cast<const float*>(x)[start + channels[j]];
    else
        for (int64_t j = 0; j < n; ++j) row[j] = number(x, type, start + (channels ? channels[j] : j));
    rotate(plan, row);
}

void store_row(const Plan& plan, const int32_t* index, const uint16_t* channel_scale, const float* row, float* out) {
    int64_t column = 0;
    for (int64_t i = 0; i < plan.count_segments; ++i) {
        const Segment& s = plan.segments[i];
        float* to = out + s.at_column;
        if (index)
            for (int64_t j = 0; j < s.columns; ++j) to[j] = row[index[column + j]];
        else
            memcpy(to, row + column, sizeof(float) * (size_t)s.columns);
        if (s.scaled) {
            const uint16_t* by = channel_scale + s.at_channel;
            for (int64_t j = 0; j < s.columns; ++j)
                to[j] = to[j] * (plan.scale_type == HALF ? from_half(by[j]) : from_bfloat(by[j]));
        }
        memset(to + s.columns, 0, sizeof(float) * (size_t)(s.tiles * COLUMNS - s.columns));
        column += s.columns;
    }
}

namespace {

static const float LEAST = 1e-30f;           // what is smaller counts as nothing
static const float TO_EVEN = 12582912.0f;    // 1.5 * 2^23: what has no place beside it is rounded half to even
static const float TOP_OF_THREE = 8355000.0f;  // three digits hold +-8355711

// The largest of a block, or not a number if one of them is none.
INLINE float largest(const float* x, int64_t count) {
    float lanes[32] = {0.0f}, any[32] = {0.0f};  // not a number stays one in `any`, which a maximum would drop
    for (int64_t j = 0; j < count; j += 32)
        for (int k = 0; k < 32; ++k) {
            const float size = fabsf(x[j + k]);
            lanes[k] = size > lanes[k] ? size : lanes[k];
            any[k] += x[j + k] * 0.0f;
        }
    float top = 0.0f, odd = 0.0f;
    for (int k = 0; k < 32; ++k) top = lanes[k] > top ? lanes[k] : top, odd += any[k];
    return odd == 0.0f ? top : NAN;
}

// The digits of count x times `by`, and the sums of each digit.
INLINE void one_digit(const float* x, float by, int64_t count, int8_t* q, int32_t* sums) {
    int32_t total = 0;
    for (int64_t j = 0; j < count; ++j) {
        const int32_t rounded = (int32_t)((x[j] * by + TO_EVEN) - TO_EVEN);
        q[j] = (int8_t)rounded;
        total += rounded;
    }
    sums[0] = total;
}

INLINE void three_digits(const float* x, float by, int64_t count, int8_t* q, int64_t stride, int32_t* sums) {
    int32_t total[3] = {0, 0, 0};
    for (int64_t j = 0; j < count; ++j) {
        const float value = x[j] * by;
        const int32_t whole = (int32_t)(value + (value < 0.0f ? -0.5f : 0.5f));
        const int32_t third = ((whole + 128) & 255) - 128, rest = (whole - third) >> 8;
        const int32_t second = ((rest + 128) & 255) - 128, first = (rest - second) >> 8;
        q[j] = (int8_t)first, q[j + stride] = (int8_t)second, q[j + 2 * stride] = (int8_t)third;
        total[0] += first, total[1] += second, total[2] += third;
    }
    for (int d = 0; d < 3; ++d) sums[d] = total[d];
}

}  // namespace

VERSIONS void round_row(const Plan& plan, const float* x, int64_t digits, const Digits& out) {
    const float highest = digits == 1 ? 127.0f : TOP_OF_THREE;
    const int kind = kind_of(digits);
    for (int64_t i = 0; i < plan.count_segments; ++i) {
        const Segment& s = plan.segments[i];
        if (!s.group_tiles) continue;
        float* sums = out.sum + s.at_group;
        for (int64_t g = 0; g < s.groups; ++g) sums[g] = 0.0f;
        const int64_t padded = s.tiles * COLUMNS;
        for (int64_t at = 0, b = s.at_block[kind]; at < padded; at += s.block[kind], ++b) {
            const float* from = x + s.at_column + at;
            int8_t* to = out.q + s.at_column + at;
            const int64_t count = least(s.block[kind], padded - at);
            const float top = largest(from, count);
            const bool some = top >= LEAST;
            int32_t total[3] = {0, 0, 0};
            if (!some)
                for (int64_t d = 0; d < digits; ++d) memset(to + d * plan.padded, 0, (size_t)count);
            else if (digits == 1)
                one_digit(from, highest / top, count, to, total);
            else
                three_digits(from, highest / top, count, to, plan.padded, total);
            out.scale[b] = some ? top / highest : top == top ? 0.0f : NAN;
            for (int64_t d = 0; d < digits; ++d) out.start[d * plan.blocks[kind] + b] = -total[d] * (1 << (s.bits - 1));
            const int64_t group = s.groups == 1 ? 0 : at / s.group_size;
            const int32_t whole = digits == 1 ? total[0] : (total[0] * 256 + total[1]) * 256 + total[2];
            sums[group] = sums[group] + out.scale[b] * (float)whole;
        }
    }
}

}  // namespace bitfloor
