// What is done to x once, whatever multiplies it.

#ifndef BITFLOOR_PACKED_INPUT_H
#define BITFLOOR_PACKED_INPUT_H

#include "plan.h"

namespace bitfloor {

// Input channel of every stored column [stored]; false for an order that does not name them.
bool stored_index(const Plan& plan, const void* order, int32_t* index);

// Input channel of every column before the rotation [inputs]; false for a list that does not name them.
bool channel_index(const Plan& plan, const void* channels, int32_t* index);

// Row i of x in the order of `channels`, null for natural order, and rotated: row [inputs].
void input_row(const Plan& plan, const int32_t* channels, const void* x, int64_t type, int64_t i, float* row);

// x [inputs] times the block Hadamard matrix, in place. It is its own inverse.
void rotate(const Plan& plan, float* x);

// In stored order, with channel scales, segments padded with zeros: out [padded].
void store_row(const Plan& plan, const int32_t* index, const uint16_t* channel_scale, const float* row, float* out);

// A row of x [padded] in digits, block by block of columns: see Job.
struct Digits {
    int8_t* q;       // [digits, padded]
    float* scale;    // [blocks]
    int32_t* start;  // [digits, blocks]
    float* sum;      // [groups]
};
void round_row(const Plan& plan, const float* x, int64_t digits, const Digits& out);

}  // namespace bitfloor

#endif
