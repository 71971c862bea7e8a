// Tile layout under test: one tile = 16 rows x 32 columns = 64*b bytes = b lines of 64 bytes.
//
// A line is 16 dwords; dword r belongs to output row r; byte j of a dword holds codes of the columns
// k = 4*q + j, where q = 0..7 is the "quad" within the tile. Which bits of which line hold quad q is
// the same for every (r, j), so a layout is a list of fragments:
//     bits [pos, pos+width) of the byte in `line` hold code bits [bit, bit+width) of quad `quad`.
// The same table drives the scalar pack/unpack (the oracle) and the unrolled VNNI kernel.
#pragma once
#include <immintrin.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

constexpr int kRows = 16, kCols = 32, kLine = 64;

struct Frag {
  uint8_t line, pos, width, quad, bit;
  constexpr int ratio() const { return pos - bit; }  // field value = 2^ratio times the code's share
};

// Fragments of every width, sorted by line. B = bits per code.
template <int B>
constexpr auto fragments() {
  if constexpr (B == 1 || B == 2 || B == 4 || B == 8) {
    std::array<Frag, 8> f{};
    constexpr int per = 8 / B;
    for (int q = 0; q < 8; ++q) f[q] = {uint8_t(q / per), uint8_t(q % per * B), uint8_t(B), uint8_t(q), 0};
    return f;
  } else if constexpr (B == 3) {
    return std::array<Frag, 10>{{{0, 0, 3, 0, 0}, {0, 3, 3, 1, 0}, {0, 6, 2, 6, 0},
                                 {1, 0, 3, 2, 0}, {1, 3, 3, 3, 0}, {1, 6, 2, 7, 0},
                                 {2, 0, 3, 4, 0}, {2, 3, 3, 5, 0}, {2, 6, 1, 6, 2}, {2, 7, 1, 7, 2}}};
  } else if constexpr (B == 5) {
    return std::array<Frag, 12>{{{0, 0, 5, 0, 0}, {0, 5, 3, 5, 0}, {1, 0, 5, 1, 0}, {1, 5, 3, 6, 0},
                                 {2, 0, 5, 2, 0}, {2, 5, 3, 7, 0}, {3, 0, 5, 3, 0}, {3, 5, 2, 5, 3},
                                 {3, 7, 1, 7, 4}, {4, 0, 5, 4, 0}, {4, 5, 1, 7, 3}, {4, 6, 2, 6, 3}}};
  } else {
    static_assert(B == 6);
    std::array<Frag, 12> f{};
    for (int l = 0; l < 6; ++l) {
      f[2 * l] = {uint8_t(l), 0, 6, uint8_t(l), 0};
      f[2 * l + 1] = {uint8_t(l), 6, 2, uint8_t(6 + l / 3), uint8_t(l % 3 * 2)};
    }
    return f;
  }
}

template <int B>
struct Layout {
  static constexpr auto frags = fragments<B>();
  static constexpr int n = int(frags.size());

  // Every bit of every line is used once and every code bit is stored once: the map is a bijection.
  static constexpr bool dense() {
    bool mem[B][8] = {}, code[8][B] = {};
    int used = 0;
    for (auto f : frags)
      for (int i = 0; i < f.width; ++i, ++used) {
        if (mem[f.line][f.pos + i] || code[f.quad][f.bit + i]) return false;
        mem[f.line][f.pos + i] = code[f.quad][f.bit + i] = true;
      }
    return used == 8 * B;
  }
  static_assert(dense());

  // One accumulator ("slot") per distinct ratio. Slot 0 has ratio 0.
  static constexpr int slot(int i) {
    int s = 0;
    for (int k = 0; k < i; ++k) {
      if (frags[k].ratio() == frags[i].ratio()) return slot(k);
      bool first = true;
      for (int m = 0; m < k; ++m) first &= frags[m].ratio() != frags[k].ratio();
      s += first;
    }
    return s;
  }
  static constexpr int nslots() {
    int s = 0;
    for (int i = 0; i < n; ++i) s = slot(i) + 1 > s ? slot(i) + 1 : s;
    return s;
  }
  static constexpr int slot_ratio(int s) {
    for (int i = 0; i < n; ++i)
      if (slot(i) == s) return frags[i].ratio();
    return 0;
  }
  // Vector operations (AND + dot) per 64 weights; a fragment that fills its byte needs no AND.
  static constexpr double ops_per_64() { return (B == 8 ? 1.0 : 2.0) * n / 8; }
};

// Scalar oracle: codes[16][32] <-> 64*B bytes.
template <int B>
void pack_tile(const uint8_t* codes, uint8_t* out) {
  std::memset(out, 0, kLine * B);
  for (auto f : Layout<B>::frags)
    for (int r = 0; r < kRows; ++r)
      for (int j = 0; j < 4; ++j)
        out[f.line * kLine + 4 * r + j] |=
            ((codes[r * kCols + 4 * f.quad + j] >> f.bit) & ((1 << f.width) - 1)) << f.pos;
}

template <int B>
void unpack_tile(const uint8_t* in, uint8_t* codes) {
  std::memset(codes, 0, kRows * kCols);
  for (auto f : Layout<B>::frags)
    for (int r = 0; r < kRows; ++r)
      for (int j = 0; j < 4; ++j)
        codes[r * kCols + 4 * f.quad + j] |=
            ((in[f.line * kLine + 4 * r + j] >> f.pos) & ((1 << f.width) - 1)) << f.bit;
}

// Vector kernel step: acc[slot] += sum over the tile of field * x, fields taken in place with AND.
template <int B>
[[gnu::always_inline]] inline void tile_dot(const uint8_t* c, const int8_t* x, __m512i* acc) {
  using L = Layout<B>;
  __m512i line[B];
  for (int l = 0; l < B; ++l) {
    line[l] = _mm512_load_si512(c + l * kLine);
    asm("" : "+v"(line[l]));  // load each line once: GCC would fold the load into every AND and be load-bound
  }
  [&]<size_t... F>(std::index_sequence<F...>) __attribute__((always_inline)) {
    auto step = [&]<size_t I>(std::integral_constant<size_t, I>) __attribute__((always_inline)) {
      constexpr Frag f = L::frags[I];
      constexpr int s = L::slot(I);
      __m512i v = line[f.line];
      if constexpr (f.width < 8) v = _mm512_and_si512(v, _mm512_set1_epi8(char(((1 << f.width) - 1) << f.pos)));
      int32_t quad;
      std::memcpy(&quad, x + 4 * f.quad, 4);
      acc[s] = _mm512_dpbusd_epi32(acc[s], v, _mm512_set1_epi32(quad));
    };
    (step(std::integral_constant<size_t, F>{}), ...);
  }(std::make_index_sequence<L::n>{});
}

// Exact integer sum of one group (up to T tiles) for 16 rows. Two banks of accumulators shorten the dependency
// chains of the widths with few slots. PF: software prefetch `ahead` bytes down the code stream.
template <int B, int T, bool PF>
[[gnu::always_inline]] inline __m512i group_dot(const uint8_t* c, const int8_t* x, int tiles, int ahead) {
  using L = Layout<B>;
  constexpr int S = L::nslots(), banks = S <= 2 ? 2 : 1;
  __m512i acc[2][S];
#pragma GCC unroll 16
  for (int s = 0; s < 2 * S; ++s) acc[s / S][s % S] = _mm512_setzero_si512();
  auto one = [&](int t, int bank) __attribute__((always_inline)) {
    if constexpr (PF)
      for (int l = 0; l < B; ++l) _mm_prefetch((const char*)c + ahead + (t * B + l) * kLine, _MM_HINT_T0);
    tile_dot<B>(c + t * B * kLine, x + t * kCols, acc[bank]);
  };
  if (tiles == T) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) one(t, t % banks);
  } else {
    for (int t = 0; t < tiles; ++t) one(t, 0);  // the last, short group of a row
  }
  // Exact: every term of slot s is a multiple of 2^ratio, so the arithmetic shift loses nothing.
  __m512i sum = _mm512_setzero_si512();
  [&]<size_t... I>(std::index_sequence<I...>) __attribute__((always_inline)) {
    ((sum = _mm512_add_epi32(sum, _mm512_srai_epi32(banks == 2 ? _mm512_add_epi32(acc[0][I], acc[1][I]) : acc[0][I],
                                                    std::integral_constant<int, L::slot_ratio(int(I))>::value))), ...);
  }(std::make_index_sequence<S>{});
  return sum;
}
