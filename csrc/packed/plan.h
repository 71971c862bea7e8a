// A packed matrix as the kernels see it: where the parts of every segment begin. docs/format.md defines the bytes;
// ops/form.py writes the numbers that a plan is made from.

#ifndef BITFLOOR_PACKED_PLAN_H
#define BITFLOOR_PACKED_PLAN_H

#include <stdint.h>

namespace bitfloor {

static const int64_t ROWS = 16, COLUMNS = 32, LINE = 64, QUADS = 8;
static const int64_t MOST_ROWS = 8;    // of x, for the products
static const int64_t MOST = 1 << 30;   // rows, columns, entries: no product of what is stored overflows then
static const int64_t MOST_SEGMENTS = 1 << 16;

enum ZeroForm { PACKED = 0, OFFSET = 1, CONSTANT = 2 };
enum ScaleType { HALF = 0, BFLOAT = 1 };

struct Segment {
    int64_t columns, bits, group_size, zero_form, constant, scaled;  // as given; the constant in halves
    int64_t tiles, groups;
    int64_t group_tiles;   // tiles of a group; 0 where groups do not end with tiles
    int64_t block;         // columns that share a scale of the int8 activations
    int64_t at_column;     // first padded column
    int64_t at_code;       // byte in a row block
    int64_t at_group;      // in a row block
    int64_t at_zero;       // byte in a row block
    int64_t at_offset;     // in a row block
    int64_t at_channel;    // in channel_scale
    int64_t at_block;      // first block of int8 activations
};

struct Plan {
    int64_t rows, inputs, unit, count, rotation, channels, scale_type;  // as given; unit 0 for natural order
    int64_t row_blocks, stored, padded, code_bytes, groups, zero_bytes, offset_groups, blocks;
    int64_t count_segments;
    Segment segments[1];  // and more behind it
};

inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The tensors of a matrix, each contiguous, of the shapes that its plan implies.
struct Parts {
    const uint8_t* codes;
    const uint16_t* scale;
    const uint8_t* zero;
    const uint16_t* offset;
    const uint16_t* channel_scale;
    const void* order;
};

// A product with up to MOST_ROWS rows of x.
struct Job {
    const Plan* plan;
    Parts parts;
    int64_t m;
    const float* x;        // [m, padded], channel scales and order applied, 0 in padding
    const float* bias;     // [rows] or null
    float* y;              // [m, rows]
    const int8_t* q;       // int8 activations [m, padded], else null
    const float* q_scale;  // [m, blocks]
    const int32_t* q_start;  // [m, blocks]: - middle * sum of q, where a dot product begins
    const float* q_sum;    // [m, groups]: sum of the rounded x of a group
};

// Rows of a matrix to be dense: the columns of each in natural order.
struct Dense {
    const Plan* plan;
    Parts parts;
    const int32_t* index;  // column of every stored column [stored], or null for natural order
    const int64_t* ids;    // the rows, or null for those from first on
    int64_t first, count;
    float* out;            // [count, inputs], 0 before if there is an index
};

struct Kernels {
    void (*product)(const Job& job, int64_t first, int64_t last);  // row blocks
    void (*product_int8)(const Job& job, int64_t first, int64_t last);
    void (*unpack)(const Dense& dense, int64_t first, int64_t last);  // rows of out
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();    // null where this machine, or this compiler, cannot
const Kernels* avx512_kernels();
const Kernels* neon_kernels();
const Kernels* neon_dot_kernels();

inline float middle(int64_t bits) { return 0.5f * (float)((1 << bits) - 1); }  // of the codes of a width

// task(context, first, last) for all of `count`, in ranges of whole units on up to so many threads (pool.cpp).
typedef void (*Task)(void* context, int64_t first, int64_t last);
void each_range(Task task, void* context, int64_t count, int64_t unit, int64_t threads);

// Aligned memory of this thread, kept until it ends; null if there is none.
void* scratch(int64_t bytes, int slot);

}  // namespace bitfloor

#endif
