// Memory, activations and the GEMV kernels of the layout spike.
#pragma once
#include <immintrin.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "layout.hpp"

// ---------------------------------------------------------------- small tools
static uint64_t rng_state = 0x9e3779b97f4a7c15ull;
static uint64_t rnd() {
  rng_state ^= rng_state << 13, rng_state ^= rng_state >> 7, rng_state ^= rng_state << 17;
  return rng_state;
}
static double uni() { return double(rnd() >> 11) * 0x1p-53; }
static uint16_t to_half(float f) { return uint16_t(_cvtss_sh(f, 0)); }
static float from_half(uint16_t h) { return _cvtsh_ss(h); }
static double now(clockid_t c) {
  timespec t;
  clock_gettime(c, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}
static size_t up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// 2 MB aligned memory with or without huge pages, with slack for reads past the end (prefetch, wide loads).
static uint8_t* arena(size_t bytes, bool huge) {
  size_t n = up(bytes + (64 << 10), 2 << 20);
  auto* raw = (uint8_t*)mmap(nullptr, n + (2 << 20), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) std::perror("mmap"), std::exit(1);
  auto* p = (uint8_t*)up(size_t(raw), 2 << 20);
  madvise(p, n, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  for (size_t i = 0; i < n; i += 4096) p[i] = 0;
  return p;
}

// ---------------------------------------------------------------- activations
// int8, symmetric per group, fp32 scale; sum[g] = sum of the int8 values. `perm` is the column order that the
// row-major 2-bit kernel needs: [256-column chunk][field p][64 bytes], column = 256*chunk + 4*i + p.
struct Act {
  int cols = 0, group = 0, n = 0;
  std::vector<int8_t> q, perm;
  std::vector<float> scale, sum;
  double total = 0;  // sum of scale*sum over all groups
};

// The quantiser a real call would run (timed on its own). Groups are multiples of 32 columns.
static void quantize(const float* x, int cols, int group, int8_t* q, float* scale, float* sum) {
  for (int g = 0; g * group < cols; ++g) {
    const int a = g * group, b = std::min(cols, a + group);
    __m512 m = _mm512_setzero_ps();
    for (int k = a; k < b; k += 16) m = _mm512_max_ps(m, _mm512_abs_ps(_mm512_loadu_ps(x + k)));
    const float top = _mm512_reduce_max_ps(m), inv = top > 0 ? 127.f / top : 0.f;
    __m512i s = _mm512_setzero_si512();
    for (int k = a; k < b; k += 16) {
      __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k), _mm512_set1_ps(inv)));
      s = _mm512_add_epi32(s, v);
      _mm_storeu_si128((__m128i*)(q + k), _mm512_cvtsepi32_epi8(v));
    }
    scale[g] = top / 127.f, sum[g] = float(_mm512_reduce_add_epi32(s));
  }
}
static Act make_act(const std::vector<float>& x, int group) {
  Act a;
  a.cols = int(x.size()), a.group = group, a.n = int(up(a.cols, group)) / group;
  a.q.assign(up(a.cols, 256) + 64, 0), a.perm = a.q;
  a.scale.assign(up(a.n, 16) + 16, 0), a.sum = a.scale;
  quantize(x.data(), a.cols, group, a.q.data(), a.scale.data(), a.sum.data());
  for (int g = 0; g < a.n; ++g) a.total += double(a.scale[g]) * a.sum[g];
  for (size_t i = 0; i + 64 < a.q.size(); ++i) a.perm[i / 256 * 256 + i % 4 * 64 + i % 256 / 4] = a.q[i];
  return a;
}

// ---------------------------------------------------------------- weights and kernels
struct Mat {
  int rows = 0, cols = 0;  // cols: for segments, padded columns of both segments together
  int n1 = 0, n4 = 0;      // segments: padded columns at 1 and at 4 bits
  const uint8_t *codes = nullptr, *zeros = nullptr;
  const uint16_t* scales = nullptr;
  int ahead = 4096;        // prefetch distance in bytes
};
// Two activation sets: `a` for uniform weights or the 1-bit segment, `b` for the 4-bit segment.
struct Input {
  Act a, b;
  std::vector<uint16_t> bf16;
};
using Kernel = void (*)(const Mat&, const Input&, float*, int row_block_begin, int row_block_end);

static inline __m512 half16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

// 16 zeros as int32: uint8 in memory, or the packed B-bit form (2*B bytes) expanded here.
template <int B, bool PACKED>
[[gnu::always_inline]] inline __m512i load_zeros(const uint8_t* z, size_t index) {
  if constexpr (!PACKED) return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(z + index * 16)));
  alignas(64) static constexpr auto tab = [] {
    struct { int32_t shuf[16], shift[16]; } t{};
    for (int r = 0; r < 16; ++r) {
      int byte = r * B / 8, next = byte + 1 < 2 * B ? byte + 1 : byte;
      t.shuf[r] = int32_t(0x80800000u | unsigned(next) << 8 | unsigned(byte)), t.shift[r] = r * B % 8;
    }
    return t;
  }();
  __m512i v = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(z + index * 2 * B)));
  v = _mm512_shuffle_epi8(v, _mm512_load_si512(tab.shuf));
  v = _mm512_srlv_epi32(v, _mm512_load_si512(tab.shift));
  return _mm512_and_si512(v, _mm512_set1_epi32((1 << B) - 1));
}

// Uniform B bits, groups of 32*T columns (the last group may be short), fp16 scale and integer zero.
template <int B, int T, bool PF, bool ZPACKED>
static void gemv_uniform(const Mat& w, const Input& in, float* y, int rb0, int rb1) {
  const Act& x = in.a;
  const int tiles = w.cols / kCols, groups = (tiles + T - 1) / T;
  for (int rb = rb0; rb < rb1; ++rb) {
    const uint8_t* c = w.codes + size_t(rb) * tiles * B * kLine;
    __m512 sum = _mm512_setzero_ps();
    for (int g = 0; g < groups; ++g) {
      const size_t m = size_t(rb) * groups + g;
      const int here = g + 1 < groups ? T : tiles - g * T;
      if constexpr (PF) {
        _mm_prefetch((const char*)(w.scales + m * 16) + 1024, _MM_HINT_T0);
        if (ZPACKED || g % 4 == 0) _mm_prefetch((const char*)w.zeros + m * (ZPACKED ? 2 * B : 16) + 512, _MM_HINT_T0);
      }
      __m512 acc = _mm512_cvtepi32_ps(group_dot<B, T, PF>(c + size_t(g) * T * B * kLine, x.q.data() + g * T * kCols,
                                                          here, w.ahead));
      __m512 z = _mm512_cvtepi32_ps(load_zeros<B, ZPACKED>(w.zeros, m));
      acc = _mm512_fnmadd_ps(z, _mm512_set1_ps(x.sum[g]), acc);
      sum = _mm512_fmadd_ps(_mm512_mul_ps(half16(w.scales + m * 16), _mm512_set1_ps(x.scale[g])), acc, sum);
    }
    _mm512_store_ps(y + rb * kRows, sum);
  }
}

// Segments: n1 columns at 1 bit (w = mean + alpha*(2c-1)), then n4 columns at 4 bits (w = s*(c - z)), all per row.
// Metadata per row block: fp16 mean[16], alpha[16], s[16]; uint8 z[16]. Activation groups of 128 columns.
template <bool PF>
static void gemv_segments(const Mat& w, const Input& in, float* y, int rb0, int rb1) {
  constexpr int T = 4;
  const int t1 = w.n1 / kCols, t4 = w.n4 / kCols, bytes1 = t1 * kLine, bytes = bytes1 + t4 * 4 * kLine;
  for (int rb = rb0; rb < rb1; ++rb) {
    const uint8_t* c = w.codes + size_t(rb) * bytes;
    __m512 s1 = _mm512_setzero_ps(), s4 = s1;
    auto seg = [&]<int B>(std::integral_constant<int, B>, const uint8_t* p, const Act& x, int tiles, __m512& sum)
        __attribute__((always_inline)) {
      for (int g = 0; g * T < tiles; ++g) {
        __m512i a = group_dot<B, T, PF>(p + size_t(g) * T * B * kLine, x.q.data() + g * T * kCols,
                                        std::min(T, tiles - g * T), w.ahead);
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a), _mm512_set1_ps(x.scale[g]), sum);
      }
    };
    seg(std::integral_constant<int, 1>{}, c, in.a, t1, s1);
    seg(std::integral_constant<int, 4>{}, c + bytes1, in.b, t4, s4);
    const uint16_t* m = w.scales + size_t(rb) * 48;
    const __m512 mean = half16(m), alpha = half16(m + 16), s = half16(m + 32);
    const __m512 z = _mm512_cvtepi32_ps(load_zeros<4, false>(w.zeros, rb));
    __m512 v = _mm512_mul_ps(_mm512_sub_ps(mean, alpha), _mm512_set1_ps(float(in.a.total)));
    v = _mm512_fmadd_ps(_mm512_add_ps(alpha, alpha), s1, v);
    v = _mm512_fmadd_ps(s, _mm512_fnmadd_ps(z, _mm512_set1_ps(float(in.b.total)), s4), v);
    _mm512_store_ps(y + rb * kRows, v);
  }
}

// Row-major dense helper: ssx[g] = scale*x.scale for one row; returns scale*zero*x.scale*x.sum, summed per lane.
static inline __m512 row_meta(const uint16_t* s, const uint8_t* z, const Act& x, int groups, float* ssx) {
  __m512 corr = _mm512_setzero_ps();
  for (int g = 0; g < groups; g += 16) {
    const __mmask16 k = groups - g >= 16 ? 0xffff : __mmask16((1u << (groups - g)) - 1);
    __m512 v = _mm512_mul_ps(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(k, s + g)), _mm512_loadu_ps(&x.scale[g]));
    __m512 zf = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(k, z + g)));
    corr = _mm512_fmadd_ps(_mm512_mul_ps(v, zf), _mm512_loadu_ps(&x.sum[g]), corr);
    _mm512_storeu_ps(ssx + g, v);
  }
  return corr;
}

// Row-major little-endian bit stream, 2 bits, g64, the best form we know: fields used in place as above, with the
// activations permuted once per call, so a 64-byte load covers 256 columns = 4 groups (4 dword lanes each).
template <bool PF>
static void gemv_rows2(const Mat& w, const Input& in, float* y, int rb0, int rb1) {
  const Act& x = in.a;
  const int groups = w.cols / 64, stride = w.cols / 4;
  alignas(64) float ssx[512] = {};
  const __m512i lane4 = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  const __m512i zero = _mm512_setzero_si512();
  for (int r = rb0 * kRows; r < rb1 * kRows; ++r) {
    const uint8_t* c = w.codes + size_t(r) * stride;
    const __m512 corr = row_meta(w.scales + size_t(r) * groups, w.zeros + size_t(r) * groups, x, groups, ssx);
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < stride; i += 64) {
      if constexpr (PF) _mm_prefetch((const char*)c + i + w.ahead, _MM_HINT_T0);
      const __m512i v = stride - i >= 64 ? _mm512_loadu_si512(c + i)
                                         : _mm512_maskz_loadu_epi8((1ull << (stride - i)) - 1, c + i);
      const int8_t* p = x.perm.data() + 4 * i;
      auto field = [&](int f) __attribute__((always_inline)) {
        return _mm512_dpbusd_epi32(zero, _mm512_and_si512(v, _mm512_set1_epi8(char(3 << (2 * f)))),
                                   _mm512_loadu_si512(p + 64 * f));
      };
      __m512i a = _mm512_add_epi32(_mm512_add_epi32(field(0), _mm512_srai_epi32(field(1), 2)),
                                   _mm512_add_epi32(_mm512_srai_epi32(field(2), 4), _mm512_srai_epi32(field(3), 6)));
      __m512 s = _mm512_permutexvar_ps(lane4, _mm512_castps128_ps512(_mm_loadu_ps(ssx + i / 16)));
      sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(a), s, sum);
    }
    y[r] = _mm512_reduce_add_ps(_mm512_sub_ps(sum, corr));
  }
}

// Row-major little-endian bit stream at any width, g64: byte permute + vpmultishiftqb + AND + dot per 64 weights.
template <int B, bool PF>
static void gemv_rows_shift(const Mat& w, const Input& in, float* y, int rb0, int rb1) {
  const Act& x = in.a;
  const int groups = w.cols / 64, stride = w.cols / 8 * B;
  alignas(64) float ssx[512] = {};
  uint8_t pi[64], ps[64];
  for (int i = 0; i < 64; ++i) pi[i] = uint8_t(i / 8 * B + i % 8), ps[i] = uint8_t(i % 8 * B);
  const __m512i perm = _mm512_loadu_si512(pi), shift = _mm512_loadu_si512(ps), mask = _mm512_set1_epi8((1 << B) - 1);
  for (int r = rb0 * kRows; r < rb1 * kRows; ++r) {
    const uint8_t* c = w.codes + size_t(r) * stride;
    const __m512 corr = row_meta(w.scales + size_t(r) * groups, w.zeros + size_t(r) * groups, x, groups, ssx);
    __m512 sum = _mm512_setzero_ps();
    for (int g = 0; g < groups; ++g) {
      if constexpr (PF) _mm_prefetch((const char*)c + g * 8 * B + w.ahead, _MM_HINT_T0);
      __m512i v = _mm512_permutexvar_epi8(perm, _mm512_loadu_si512(c + g * 8 * B));
      v = _mm512_and_si512(_mm512_multishift_epi64_epi8(shift, v), mask);
      v = _mm512_dpbusd_epi32(_mm512_setzero_si512(), v, _mm512_loadu_si512(x.q.data() + 64 * g));
      sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(v), _mm512_set1_ps(ssx[g]), sum);
    }
    y[r] = _mm512_reduce_add_ps(_mm512_sub_ps(sum, corr));
  }
}

// Row-major bf16 weights (reinterpreted from the code bytes), no metadata.
template <bool PF>
static void gemv_bf16(const Mat& w, const Input& in, float* y, int rb0, int rb1) {
  for (int r = rb0 * kRows; r < rb1 * kRows; ++r) {
    const uint8_t* c = w.codes + size_t(r) * w.cols * 2;
    __m512 s[2] = {};
    for (int k = 0; k < w.cols; k += 64)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        if constexpr (PF) _mm_prefetch((const char*)c + 2 * k + 64 * j + w.ahead, _MM_HINT_T0);
        s[j] = _mm512_dpbf16_ps(s[j], (__m512bh)_mm512_loadu_si512(c + 2 * k + 64 * j),
                                (__m512bh)_mm512_loadu_si512(in.bf16.data() + k + 32 * j));
      }
    y[r] = _mm512_reduce_add_ps(_mm512_add_ps(s[0], s[1]));
  }
}

// The roof: a plain sequential read of the same code bytes.
template <bool PF>
static uint64_t read_loop(const uint8_t* p, size_t bytes, int ahead) {
  __m512i a[8] = {};
  for (size_t i = 0; i + 512 <= bytes; i += 512)
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      if constexpr (PF) _mm_prefetch((const char*)p + i + 64 * j + ahead, _MM_HINT_T0);
      a[j] = _mm512_xor_si512(a[j], _mm512_load_si512(p + i + 64 * j));
    }
  for (int j = 1; j < 8; ++j) a[0] = _mm512_xor_si512(a[0], a[j]);
  return uint64_t(_mm512_reduce_add_epi64(a[0]));
}
