// What is done to x once, whatever multiplies it.

#ifndef BITFLOOR_PACKED_INPUT_H
#define BITFLOOR_PACKED_INPUT_H

#include "plan.h"

namespace bitfloor {

// Input channel of every stored column [stored]; false for an order that does not name them.
bool stored_index(const Plan& plan, const void* order, int32_t* index);

// Row i of x in the order of `channels` and rotated: row [inputs]. `spare` [inputs] is written to.
bool input_row(const Plan& plan, const void* channels, const void* x, int64_t type, int64_t i, float* row, float* spare);

// In stored order, with channel scales, segments padded with zeros: out [padded].
void store_row(const Plan& plan, const int32_t* index, const uint16_t* channel_scale, const float* row, float* out);

// Symmetric int8 of blocks of columns: q [padded], scale and start [blocks], sum [groups].
void quantize_row(const Plan& plan, const float* x, int8_t* q, float* scale, int32_t* start, float* sum);

}  // namespace bitfloor

#endif
