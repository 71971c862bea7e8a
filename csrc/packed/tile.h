// Tiles: which bits of which line hold the codes of a quad of columns. The numbers are those of core/bitpack.py.

#ifndef BITFLOOR_PACKED_TILE_H
#define BITFLOOR_PACKED_TILE_H

#include <stdint.h>
#include <string.h>

namespace bitfloor {

// Bits low ... low + width - 1 of the codes of `quad` stand at bit `at` of every byte of `line`.
struct Field {
    int line, quad, low, width, at;
};

struct Fields {
    int count;
    Field of[12];
};

constexpr Fields fields(int bits) {
    if (bits == 3)
        return {10,
                {{0, 0, 0, 3, 0}, {0, 1, 0, 3, 3}, {0, 6, 0, 2, 6}, {1, 2, 0, 3, 0}, {1, 3, 0, 3, 3}, {1, 7, 0, 2, 6},
                 {2, 4, 0, 3, 0}, {2, 5, 0, 3, 3}, {2, 6, 2, 1, 6}, {2, 7, 2, 1, 7}}};
    if (bits == 5)
        return {12,
                {{0, 0, 0, 5, 0}, {0, 5, 0, 3, 5}, {1, 1, 0, 5, 0}, {1, 6, 0, 3, 5}, {2, 2, 0, 5, 0}, {2, 7, 0, 3, 5},
                 {3, 3, 0, 5, 0}, {3, 5, 3, 2, 5}, {3, 7, 4, 1, 7}, {4, 4, 0, 5, 0}, {4, 7, 3, 1, 5}, {4, 6, 3, 2, 6}}};
    if (bits == 6)
        return {12,
                {{0, 0, 0, 6, 0}, {0, 6, 0, 2, 6}, {1, 1, 0, 6, 0}, {1, 6, 2, 2, 6}, {2, 2, 0, 6, 0}, {2, 6, 4, 2, 6},
                 {3, 3, 0, 6, 0}, {3, 7, 0, 2, 6}, {4, 4, 0, 6, 0}, {4, 7, 2, 2, 6}, {5, 5, 0, 6, 0}, {5, 7, 4, 2, 6}}};
    Fields found = {8, {}};
    const int per = 8 / bits;
    for (int q = 0; q < 8; ++q) found.of[q] = {q / per, q, 0, bits, q % per * bits};
    return found;
}

// The codes of a tile: byte 4 * row + j of out[quad] is the code of that row and column 4 * quad + j.
template <int B>
static inline void decode(const uint8_t* tile, uint32_t out[8][16]) {
    constexpr Fields all = fields(B);
    uint32_t lines[B][16];
    memcpy(lines, tile, sizeof lines);
    memset(out, 0, 8 * 16 * sizeof(uint32_t));
#pragma GCC unroll 12
    for (int f = 0; f < all.count; ++f) {
        const Field field = all.of[f];
        const uint32_t mask = 0x01010101u * ((1u << field.width) - 1);
        for (int r = 0; r < 16; ++r) out[field.quad][r] |= ((lines[field.line][r] >> field.at) & mask) << field.low;
    }
}

// Call f(integral_constant) for every width: `call<2>()` and so on.
#define BITFLOOR_FOR_WIDTH(bits, CALL) \
    switch (bits) {                    \
        case 1: CALL(1); break;        \
        case 2: CALL(2); break;        \
        case 3: CALL(3); break;        \
        case 4: CALL(4); break;        \
        case 5: CALL(5); break;        \
        case 6: CALL(6); break;        \
        default: CALL(8); break;       \
    }

// 16-bit floats
static inline float from_half(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    uint32_t bits;
    if (exponent == 31) {
        bits = sign | 0x7f800000u | fraction << 13;
    } else if (exponent) {
        bits = sign | (exponent + 112) << 23 | fraction << 13;
    } else {
        const float small = (float)fraction * 5.9604644775390625e-8f;  // 2^-24, exact
        memcpy(&bits, &small, 4);
        bits |= sign;
    }
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline float from_bfloat(uint16_t b) {
    const uint32_t bits = (uint32_t)b << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// Zero-point of row r in a stream of 16 at B bits each.
static inline int stream_zero(const uint8_t* stream, int64_t bits, int64_t r) {
    const int64_t bit = r * bits, byte = bit / 8;
    int value = stream[byte] >> bit % 8;
    if (bit % 8 + bits > 8) value |= stream[byte + 1] << (8 - bit % 8);
    return value & ((1 << bits) - 1);
}

}  // namespace bitfloor

#endif
