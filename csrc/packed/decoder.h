// A decoder of the Llama family as the step sees it. ops/decoder_native.py mirrors the structures.
//
//     x = embedding[id];  for every layer:  x += o(attention(rope(q(n)), rope(k(n)), v(n))),  n = norm(x)
//                                           x += down(silu(gate(n)) * up(n)),                 n = norm(x)
//     logits = head(norm(x))

#ifndef BITFLOOR_PACKED_DECODER_H
#define BITFLOOR_PACKED_DECODER_H

#include "input.h"

namespace bitfloor {

static const int64_t MOST_LAYERS = 1 << 16, MOST_POSITIONS = 1 << 26;

// A matrix, packed or dense. What it shares with the matrix before it is of the input side: the row before it is put
// into stored order, the stored row, its int8 form too.
enum Shared { NOTHING = 0, ROW = 1, STORED = 2, ROUNDED = 3 };

struct Matrix {
    const Plan* plan;         // null for a dense one
    Parts parts;              // of a packed one; the order is in `index`
    const int32_t* index;     // input channel of every stored column [stored], null for natural order
    const int32_t* channels;  // of every column before the rotation [inputs], null for natural order
    const void* dense;        // [rows, inputs], null for a packed one
    int64_t type;             // of `dense`: 0 float32, 1 float16, 2 bfloat16
    const float* bias;        // [rows] or null
    int64_t rows, inputs, shared;
};

struct Layer {
    Matrix q, k, v, o, gate, up, down;
    const float *attention_norm, *mlp_norm;  // [hidden]
    const float *q_norm, *k_norm;            // [head_dim], or null
    int64_t window;                          // positions that are attended to, 0 for all
};

struct Shape {
    int64_t hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary;
    int64_t positions;  // most tokens in the cache
    float epsilon;      // of the norms
    float scaling;      // of the products of queries and keys
    float rope_scaling; // of sines and cosines
};

struct Model {
    Shape shape;
    Matrix embedding, head;
    const float* norm;         // [hidden]
    const float* frequencies;  // of the positions [head_dim / 2]
    const Layer* layers;
};

// -- what is made of it: decoder.cpp makes and frees it, step.cpp runs it -----------------------------------------------

static const int64_t CHUNK_TOKENS = 64;  // that go through the layers together
static const int64_t TOGETHER = 3;       // most matrices that share an input

// The input side of a matrix for a chunk.
struct Prepared {
    const float* x;  // what is multiplied: `stored`, or the input itself
    float* stored;   // [m, padded]
    Digits digits;   // as in Job
};

struct Decoder {
    Model model;
    Layer* layers;
    int64_t room, value_dim;  // positions and head_dim up to multiples of 16
    float *keys, *values;     // [layers, kv_heads, room, head_dim or value_dim]
    float* space;             // all below
    float *x, *normed, *q, *k, *v, *mixed, *gate, *up;  // of a chunk
    float *turned, *sines;    // [m, widest input]; [m, head_dim]
    Prepared prepared[TOGETHER];
};

inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace bitfloor

#endif
