// The C interface of the packed kernels; ops/packed_native.py calls it. Every function that reads a plan takes one that
// bitfloor_packed_plan made, and returns 0 or the reason why it did nothing.

#include <stddef.h>
#include <string.h>

#include "input.h"
#include "plan.h"

#define PUBLIC extern "C" __attribute__((visibility("default")))

namespace bitfloor {

// To be raised with every change of a signature or of a value; ABI in ops/packed_native.py must follow.
static const int64_t PACKED_ABI = 3;

static const int64_t HEADER = 7, EACH = 6;         // numbers of a form: of the matrix, and of every segment
static const int64_t SMALL = 64 << 10;             // bytes of codes that are not worth a thread

// The sets of this kind of processor: plain C++, and two that a processor may have or not.
static const Kernels* second() { return avx2_kernels() ? avx2_kernels() : neon_kernels(); }
static const Kernels* third() { return avx512_kernels() ? avx512_kernels() : neon_dot_kernels(); }

const Kernels* kernels(int64_t level) {
    static const Kernels* const found[3] = {portable_kernels(), second(), third()};
    for (int64_t i = level < 2 ? level : 2; i > 0; --i)
        if (found[i]) return found[i];
    return found[0];
}

static bool is_width(int64_t bits) { return bits >= 1 && bits <= 8 && bits != 7; }

static int64_t whole_block(int64_t group_size, bool one) {
    if (one || group_size % 128 == 0) return 128;
    return group_size % 64 == 0 ? 64 : 32;
}

// What is rounded to int8 has smaller blocks where codes are wide: there it is the larger part of the error.
static int64_t int8_block(int64_t bits) { return bits == 1 ? 128 : bits < 4 ? 64 : 32; }

static bool read_segment(const int64_t* from, Segment& s) {
    s.columns = from[0], s.bits = from[1], s.group_size = from[2];
    s.zero_form = from[3], s.constant = from[4], s.scaled = from[5];
    if (s.columns < 1 || s.columns > MOST || !is_width(s.bits) || s.group_size < 1 || s.zero_form < PACKED ||
        s.zero_form > CONSTANT || s.scaled < 0 || s.scaled > 1)
        return false;
    s.tiles = up(s.columns, COLUMNS);
    const bool one = s.group_size >= s.columns;
    s.groups = one ? 1 : up(s.columns, s.group_size);
    s.group_tiles = one ? s.tiles : s.group_size % COLUMNS ? 0 : s.group_size / COLUMNS;
    s.block[1] = whole_block(s.group_size, one);
    s.block[0] = least(s.block[1], int8_block(s.bits));
    return true;
}

static bool read_header(const int64_t* form, Plan& plan) {
    plan.rows = form[0], plan.inputs = form[1], plan.unit = form[2], plan.count = form[3], plan.rotation = form[4];
    plan.channels = form[5], plan.scale_type = form[6];
    const int64_t n = plan.rotation;
    return plan.rows >= 1 && plan.rows <= MOST && plan.inputs >= 1 && plan.inputs <= MOST && plan.unit >= 0 &&
           plan.unit <= MOST && plan.count >= 0 && plan.count <= MOST && n >= 0 && n <= 1024 && (n & (n - 1)) == 0 &&
           n != 1 && plan.channels >= 0 && plan.channels <= 1 && plan.scale_type >= HALF && plan.scale_type <= BFLOAT &&
           (plan.unit > 0) == (plan.count > 0);
}

}  // namespace bitfloor

using namespace bitfloor;

PUBLIC int64_t bitfloor_packed_abi(void) { return PACKED_ABI; }

// The best set of kernels of this machine: 0 portable, 1 AVX2 or NEON, 2 AVX-512 or NEON with SDOT.
PUBLIC int64_t bitfloor_packed_level(void) { return third() ? 2 : second() ? 1 : 0; }

// Writes the plan of a form of `count` numbers to `out`, if `size` bytes hold it. Returns its size, or 0 for a form that
// is none.
PUBLIC int64_t bitfloor_packed_plan(const int64_t* form, int64_t count, void* out, int64_t size) {
    if (!form || count < HEADER + EACH || (count - HEADER) % EACH || (count - HEADER) / EACH > MOST_SEGMENTS) return 0;
    Plan plan = {};
    if (!read_header(form, plan)) return 0;
    plan.count_segments = (count - HEADER) / EACH;
    plan.row_blocks = up(plan.rows, ROWS);
    const int64_t needed = (int64_t)sizeof(Plan) + (plan.count_segments - 1) * (int64_t)sizeof(Segment);
    const bool write = out && size >= needed;
    for (int64_t i = 0; i < plan.count_segments; ++i) {
        Segment s = {};
        if (!read_segment(form + HEADER + EACH * i, s)) return 0;
        s.at_column = plan.padded, s.at_code = plan.code_bytes, s.at_group = plan.groups, s.at_zero = plan.zero_bytes;
        s.at_offset = plan.offset_groups, s.at_channel = 0;
        for (int kind = 0; kind < 2; ++kind) {
            s.at_block[kind] = plan.blocks[kind];
            plan.blocks[kind] += up(s.columns, s.block[kind]);
        }
        plan.stored += s.columns, plan.padded += s.tiles * COLUMNS, plan.code_bytes += s.tiles * LINE * s.bits;
        plan.groups += s.groups;
        if (s.zero_form == PACKED) plan.zero_bytes += 2 * s.bits * s.groups;
        if (s.zero_form == OFFSET) plan.offset_groups += s.groups;
        if (plan.stored > MOST) return 0;
        if (write) memcpy(static_cast<char*>(out) + offsetof(Plan, segments) + i * sizeof(Segment), &s, sizeof s);
    }
    if (!plan.unit && plan.stored != plan.inputs) return 0;
    if (write) {
        memcpy(out, &plan, offsetof(Plan, segments));
        Segment* segments = static_cast<Plan*>(out)->segments;
        for (int64_t i = 0, channel = 0; i < plan.count_segments; ++i)
            if (segments[i].scaled) segments[i].at_channel = channel, channel += segments[i].columns;
    }
    return needed;
}

// Input channels as int32: `index` [stored] of every stored column, `before` [inputs] of every column before the rotation.
// Nothing is written where they are in natural order.
PUBLIC int64_t bitfloor_packed_index(const Plan* plan, const void* order, const void* channels, int32_t* index,
                                     int32_t* before) {
    return stored_index(*plan, order, index) && channel_index(*plan, channels, before) ? DONE : BAD_ORDER;
}

// x [m, inputs] of x_type (0 float32, 1 float16, 2 bfloat16) to out [m, padded] float32: channels put into order,
// rotated, put into stored order, times the channel scales, 0 in the padding of segments.
PUBLIC int64_t bitfloor_packed_input(const Plan* plan, const void* channels, const void* order,
                                     const uint16_t* channel_scale, const void* x, int64_t x_type, int64_t m,
                                     float* out) {
    if (m < 0 || x_type < 0 || x_type > 2) return BAD_CALL;
    int32_t* index = static_cast<int32_t*>(scratch(4 * (plan->stored + 2 * plan->inputs), 1));
    if (!index) return NO_MEMORY;
    int32_t* by = index + plan->stored;
    if (!stored_index(*plan, order, index) || !channel_index(*plan, channels, by)) return BAD_ORDER;
    float* row = reinterpret_cast<float*>(by + plan->inputs);
    for (int64_t i = 0; i < m; ++i) {
        input_row(*plan, plan->channels ? by : nullptr, x, x_type, i, row);
        store_row(*plan, plan->unit ? index : nullptr, channel_scale, row, out + i * plan->padded);
    }
    return DONE;
}

struct Call {
    Job job;
    void (*run)(const Job&, int64_t, int64_t);
};

static void product_task(void* context, int64_t first, int64_t last) {
    const Call* call = static_cast<const Call*>(context);
    if (first < last) call->run(call->job, first, last);
}

// y [m, rows] = x [m, padded] times the matrix, plus bias [rows] or null; m is at most 8. parts: codes, scale, zero,
// offset. integers: x is rounded to int8.
PUBLIC int64_t bitfloor_packed_product(const Plan* plan, const void* const* parts, const float* x, const float* bias,
                                       float* y, int64_t m, int64_t integers, int64_t level, int64_t threads) {
    if (m < 0 || m > MOST_ROWS || level < 0) return BAD_CALL;
    if (m == 0) return DONE;
    Call call = {};
    Job& job = call.job;
    job.plan = plan, job.m = m, job.digits = integers ? 1 : 3, job.x = x, job.bias = bias, job.y = y;
    job.parts.codes = static_cast<const uint8_t*>(parts[0]), job.parts.scale = static_cast<const uint16_t*>(parts[1]);
    job.parts.zero = static_cast<const uint8_t*>(parts[2]), job.parts.offset = static_cast<const uint16_t*>(parts[3]);
    call.run = kernels(level)->product;
    const int64_t blocks = plan->blocks[kind_of(job.digits)], padded = job.digits * plan->padded;
    const int64_t numbers = (1 + job.digits) * blocks + plan->groups;  // of 32 bits, of a row
    float* q_scale = static_cast<float*>(scratch(m * (4 * numbers + padded), 1));
    if (!q_scale) return NO_MEMORY;
    float* q_sum = q_scale + m * blocks;
    int32_t* q_start = reinterpret_cast<int32_t*>(q_sum + m * plan->groups);
    int8_t* q = reinterpret_cast<int8_t*>(q_start + m * job.digits * blocks);
    for (int64_t i = 0; i < m; ++i)
        round_row(*plan, x + i * plan->padded, job.digits,
                  {q + i * padded, q_scale + i * blocks, q_start + i * job.digits * blocks, q_sum + i * plan->groups});
    job.q = q, job.q_scale = q_scale, job.q_start = q_start, job.q_sum = q_sum;
    if (plan->code_bytes * plan->row_blocks < SMALL) threads = 1;
    each_range(product_task, &call, plan->row_blocks, 2, threads);
    return DONE;
}

// Both of them, for up to 8 rows of x [m, inputs]. parts: codes, scale, zero, offset, channel_scale, order, channels.
PUBLIC int64_t bitfloor_packed_linear(const Plan* plan, const void* const* parts, const void* x, int64_t x_type,
                                      const float* bias, float* y, int64_t m, int64_t integers, int64_t level,
                                      int64_t threads) {
    if (m < 0 || m > MOST_ROWS) return BAD_CALL;
    float* stored = static_cast<float*>(scratch(4 * MOST_ROWS * plan->padded, 2));
    if (!stored) return NO_MEMORY;
    const uint16_t* channel_scale = static_cast<const uint16_t*>(parts[4]);
    const int64_t reason = bitfloor_packed_input(plan, parts[6], parts[5], channel_scale, x, x_type, m, stored);
    return reason ? reason : bitfloor_packed_product(plan, parts, stored, bias, y, m, integers, level, threads);
}

struct Unpacking {
    Dense dense;
    void (*run)(const Dense&, int64_t, int64_t);
};

static void unpack_task(void* context, int64_t first, int64_t last) {
    const Unpacking* call = static_cast<const Unpacking*>(context);
    if (first < last) call->run(call->dense, first, last);
}

// out [count, inputs]: rows `ids`, or `count` of them from `first` on. parts: codes, scale, zero, offset, channel_scale,
// order. What is stored, in natural order; not rotated back.
PUBLIC int64_t bitfloor_packed_rows(const Plan* plan, const void* const* parts, const int64_t* ids, int64_t first,
                                    int64_t count, float* out, int64_t level, int64_t threads) {
    if (count < 0 || level < 0) return BAD_CALL;
    if (!ids && (first < 0 || first > plan->rows || count > plan->rows - first)) return BAD_ROW;
    for (int64_t i = 0; ids && i < count; ++i)
        if (ids[i] < 0 || ids[i] >= plan->rows) return BAD_ROW;
    Unpacking call = {};
    Dense& dense = call.dense;
    dense.plan = plan, dense.ids = ids, dense.first = first, dense.count = count, dense.out = out;
    dense.parts.codes = static_cast<const uint8_t*>(parts[0]);
    dense.parts.scale = static_cast<const uint16_t*>(parts[1]);
    dense.parts.zero = static_cast<const uint8_t*>(parts[2]);
    dense.parts.offset = static_cast<const uint16_t*>(parts[3]);
    dense.parts.channel_scale = static_cast<const uint16_t*>(parts[4]);
    if (plan->unit) {
        int32_t* index = static_cast<int32_t*>(scratch(4 * plan->stored, 1));
        if (!index) return NO_MEMORY;
        if (!stored_index(*plan, parts[5], index)) return BAD_ORDER;
        dense.index = index;
        memset(out, 0, sizeof(float) * (size_t)count * (size_t)plan->inputs);
    }
    call.run = kernels(level)->unpack;
    if (count * plan->inputs < 32768) threads = 1;
    each_range(unpack_task, &call, count, ROWS, threads);
    return DONE;
}
