// A packed matrix as the kernels see it: where the parts of every segment begin. docs/format.md defines the bytes;
// ops/form.py writes the numbers that a plan is made from.

#ifndef BITFLOOR_PACKED_PLAN_H
#define BITFLOOR_PACKED_PLAN_H

#include <stdint.h>

#include <atomic>

// One version of a function for every instruction set; the loader chooses. The thread sanitizer does not start with those.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_THREAD__) && \
    ((defined(__clang__) && __clang_major__ >= 15) || (!defined(__clang__) && __GNUC__ >= 8))
#define VERSIONS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VERSIONS
#endif
#define INLINE static inline __attribute__((always_inline))

namespace bitfloor {

static const int64_t ROWS = 16, COLUMNS = 32, LINE = 64, QUADS = 8;
static const int64_t MOST_ROWS = 8;    // of x, for the products
static const int64_t MOST = 1 << 30;   // rows, columns, entries: no product of what is stored overflows then
static const int64_t MOST_SEGMENTS = 1 << 16;

// Why a function of the C interface did nothing.
enum Reason { DONE = 0, BAD_PLAN = 1, BAD_ORDER = 2, BAD_ROW = 3, NO_MEMORY = 4, BAD_CALL = 5 };

enum ZeroForm { PACKED = 0, OFFSET = 1, CONSTANT = 2 };
enum ScaleType { HALF = 0, BFLOAT = 1 };

struct Segment {
    int64_t columns, bits, group_size, zero_form, constant, scaled;  // as given; the constant in halves
    int64_t tiles, groups;
    int64_t group_tiles;   // tiles of a group; 0 where groups do not end with tiles
    int64_t block[2];      // columns that share a scale of x in digits, see kind_of
    int64_t at_column;     // first padded column
    int64_t at_code;       // byte in a row block
    int64_t at_group;      // in a row block
    int64_t at_zero;       // byte in a row block
    int64_t at_offset;     // in a row block
    int64_t at_channel;    // in channel_scale
    int64_t at_block[2];   // first block of x in digits
};

struct Plan {
    int64_t rows, inputs, unit, count, rotation, channels, scale_type;  // as given; unit 0 for natural order
    int64_t row_blocks, stored, padded, code_bytes, groups, zero_bytes, offset_groups, blocks[2];
    int64_t count_segments;
    Segment segments[1];  // and more behind it
};

inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Which blocks: 0 for one digit, which int8 activations are, 1 for three.
constexpr int kind_of(int64_t digits) { return digits > 1; }

// The tensors of a matrix, each contiguous, of the shapes that its plan implies.
struct Parts {
    const uint8_t* codes;
    const uint16_t* scale;
    const uint8_t* zero;
    const uint16_t* offset;
    const uint16_t* channel_scale;
    const void* order;
};

// A product with m rows of x.
struct Job {
    const Plan* plan;
    Parts parts;
    int64_t m;
    int64_t digits;          // of x: 1 or 3
    const float* x;          // [m, padded], channel scales and order applied, 0 in padding
    const float* bias;       // [rows] or null
    float* y;                // [m, rows]
    const int8_t* q;         // [m, digits, padded], the digit that counts most first
    const float* q_scale;    // [m, blocks], of the last digit; each before it counts 256 times as much
    const int32_t* q_start;  // [m, digits, blocks]: - middle * sum of q, where a dot product begins
    const float* q_sum;      // [m, groups]: sum of the x of a group, as their digits have it
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

// A product with a matrix that is not packed.
struct DenseJob {
    const void* weight;  // [rows, inputs]
    int64_t type;        // 0 float32, 1 float16, 2 bfloat16
    int64_t rows, inputs, m;
    const float *x, *bias;  // [m, inputs]; [rows] or null
    float* y;               // [m, rows]
};

// Rows of queries at the positions from `start` on, and the cache of a layer.
struct Attention {
    int64_t heads, kv_heads, head_dim, value_dim;  // value_dim is head_dim up to a multiple of 16
    int64_t positions, start, rows, window;        // room in the cache, a multiple of 16; window 0 sees everything
    float scaling;
    const float* q;       // [rows, heads, head_dim]
    const float* keys;    // [kv_heads, positions / 16, head_dim, 16]
    const float* values;  // [kv_heads, positions, value_dim]
    float* out;           // [rows, heads, head_dim]
    std::atomic<bool>* failed;
};

struct Kernels {
    void (*product)(const Job& job, int64_t first, int64_t last);  // row blocks
    void (*unpack)(const Dense& dense, int64_t first, int64_t last);  // rows of out
    void (*dense)(const DenseJob& job, int64_t first, int64_t last);  // rows
    void (*attend)(const Attention& attention, int64_t first, int64_t last);  // of rows * heads
    void (*norm)(const float* x, const float* weight, float epsilon, int64_t n, float* out);
    void (*gate)(float* gate, const float* up, int64_t n);
};

const Kernels* kernels(int64_t level);  // the best of this machine up to a level: 0 portable, 1 AVX2, 2 AVX-512

const Kernels* portable_kernels();
const Kernels* avx2_kernels();    // null where this machine, or this compiler, cannot
const Kernels* avx512_kernels();
const Kernels* neon_kernels();
const Kernels* neon_dot_kernels();

inline float middle(int64_t bits) { return 0.5f * (float)((1 << bits) - 1); }  // of the codes of a width

// task(context, first, last) for all of `count`, in ranges of whole units on up to so many threads (pool.cpp).
typedef void (*Task)(void* context, int64_t first, int64_t last);
void each_range(Task task, void* context, int64_t count, int64_t unit, int64_t threads);

// each(first, last), likewise; never for an empty range.
template <class Each>
void in_ranges(int64_t count, int64_t unit, int64_t threads, const Each& each) {
    const Task task = [](void* context, int64_t first, int64_t last) {
        if (first < last) (*static_cast<const Each*>(context))(first, last);
    };
    each_range(task, const_cast<Each*>(&each), count, unit, threads);
}

// Aligned memory of this thread, kept until it ends; null if there is none.
void* scratch(int64_t bytes, int slot);

}  // namespace bitfloor

#endif
