// Layout spike: GEMV kernels that read straight from the candidate packed layout, checked against a
// double-precision scalar reference and timed next to a row-major dense stream and a plain read loop.
// Prints one JSON object. `spike pack B` packs one tile from stdin, for an independent check by run.py.
// See README.md for the question and the answer.
#include <atomic>
#include <string>
#include <thread>

#include "kernels.hpp"

// ---------------------------------------------------------------- formats
enum class Kind { uniform, segments, rows, bf16 };
struct Format {
  std::string name;
  Kind kind;
  int bits, group;
  bool zpacked;
  Kernel plain, prefetch;
};
template <int B, int T, bool Z>
static Format uniform(const char* name) {
  return {name, Kind::uniform, B, T * kCols, Z, gemv_uniform<B, T, false, Z>, gemv_uniform<B, T, true, Z>};
}
template <int B>
static Format rows_shift(const char* name) {
  return {name, Kind::rows, B, 64, false, gemv_rows_shift<B, false>, gemv_rows_shift<B, true>};
}
static const std::vector<Format> formats = {
    uniform<1, 4, false>("tile1_g128"),
    uniform<2, 2, false>("tile2_g64"),
    uniform<2, 2, true>("tile2_g64_zpacked"),
    {"tile1+4_rowwise", Kind::segments, 0, 128, false, gemv_segments<false>, gemv_segments<true>},
    uniform<3, 4, false>("tile3_g128"),
    uniform<3, 4, true>("tile3_g128_zpacked"),
    uniform<4, 4, false>("tile4_g128"),
    uniform<5, 4, false>("tile5_g128"),
    uniform<6, 4, false>("tile6_g128"),
    uniform<8, 4, false>("tile8_g128"),
    {"rows2_g64_inplace", Kind::rows, 2, 64, false, gemv_rows2<false>, gemv_rows2<true>},
    rows_shift<2>("rows2_g64_multishift"),
    rows_shift<3>("rows3_g64_multishift"),
    {"rows_bf16", Kind::bf16, 16, 0, false, gemv_bf16<false>, gemv_bf16<true>},
};

struct Sizes {
  size_t codes, scales /* fp16 values */, zeros;
  int n1, n4;
  size_t total() const { return codes + 2 * scales + zeros; }
};
static Sizes sizes(const Format& f, int rows, int cols) {
  const size_t groups = f.group ? up(cols, f.group) / f.group : 0, r = rows;
  if (f.kind == Kind::bf16) return {r * cols * 2, 0, 0, 0, 0};
  if (f.kind == Kind::segments) {
    const int true4 = int(std::lround(cols * 0.2)), n4 = int(up(true4, 32)), n1 = int(up(cols - true4, 32));
    return {r * n1 / 8 + r * n4 / 2, 3 * r, r, n1, n4};
  }
  return {r * cols * f.bits / 8, r * groups, f.zpacked ? r / 16 * groups * 2 * f.bits : r * groups, 0, 0};
}
static Input make_input(const Format& f, int cols, const std::vector<float>& x) {
  Input in;
  if (f.kind == Kind::bf16) {
    for (float v : x) {
      uint32_t u;
      std::memcpy(&u, &v, 4);
      in.bf16.push_back(uint16_t((u + 0x8000) >> 16));
    }
  } else if (f.kind == Kind::segments) {  // x is already gathered: 80% then 20%, each padded with zeros
    const Sizes n = sizes(f, 16, cols);
    const int true4 = int(std::lround(cols * 0.2));
    std::vector<float> a(x.begin(), x.end() - true4), b(x.end() - true4, x.end());
    a.resize(n.n1, 0.f), b.resize(n.n4, 0.f);
    in.a = make_act(a, 128), in.b = make_act(b, 128);
  } else {
    in.a = make_act(x, f.group);
  }
  return in;
}

// ---------------------------------------------------------------- double-precision reference
// Codes of `rows` rows in row-major order from a tiled buffer whose row blocks are `stride` bytes apart.
template <int B>
static void decode(const uint8_t* p, int rows, int cols, size_t stride, std::vector<int>& out) {
  uint8_t tile[kRows * kCols];
  out.resize(size_t(rows) * cols);
  for (int rb = 0; rb < rows / kRows; ++rb)
    for (int t = 0; t < cols / kCols; ++t) {
      unpack_tile<B>(p + rb * stride + size_t(t) * B * kLine, tile);
      for (int i = 0; i < kRows * kCols; ++i)
        out[size_t(rb * kRows + i / kCols) * cols + t * kCols + i % kCols] = tile[i];
    }
}
static void decode_any(int bits, const uint8_t* p, int rows, int cols, size_t stride, std::vector<int>& out) {
  switch (bits) {
    case 1: return decode<1>(p, rows, cols, stride, out);
    case 2: return decode<2>(p, rows, cols, stride, out);
    case 3: return decode<3>(p, rows, cols, stride, out);
    case 4: return decode<4>(p, rows, cols, stride, out);
    case 5: return decode<5>(p, rows, cols, stride, out);
    case 6: return decode<6>(p, rows, cols, stride, out);
    default: return decode<8>(p, rows, cols, stride, out);
  }
}
static int stream_bits(const uint8_t* p, size_t bit, int n) {  // little-endian bit stream
  int v = 0;
  for (int i = 0; i < n; ++i) v |= (p[(bit + i) / 8] >> ((bit + i) % 8) & 1) << i;
  return v;
}
static std::vector<double> reference(const Format& f, const Mat& m, const Input& in) {
  std::vector<double> y(m.rows);
  std::vector<int> c, c4;
  const size_t stride = m.n1 * 2 + m.n4 * 8;  // bytes per row block of the segments form
  if (f.kind == Kind::uniform) decode_any(f.bits, m.codes, m.rows, m.cols, size_t(m.cols) * f.bits * 2, c);
  if (f.kind == Kind::segments) {
    decode<1>(m.codes, m.rows, m.n1, stride, c);
    decode<4>(m.codes + m.n1 * 2, m.rows, m.n4, stride, c4);
  }
  auto xq = [](const Act& a, int k) { return double(a.scale[k / a.group]) * a.q[k]; };
  for (int r = 0; r < m.rows; ++r) {
    const int rb = r / 16, i = r % 16;
    double sum = 0;
    if (f.kind == Kind::bf16) {
      auto wide = [](uint16_t h) {
        uint32_t u = uint32_t(h) << 16;
        float v;
        std::memcpy(&v, &u, 4);
        return double(v);
      };
      for (int k = 0; k < m.cols; ++k) sum += wide(((const uint16_t*)m.codes)[r * m.cols + k]) * wide(in.bf16[k]);
    } else if (f.kind == Kind::segments) {
      const uint16_t* s = m.scales + rb * 48;
      for (int k = 0; k < m.n1; ++k)
        sum += (from_half(s[i]) + double(from_half(s[16 + i])) * (2 * c[r * m.n1 + k] - 1)) * xq(in.a, k);
      for (int k = 0; k < m.n4; ++k)
        sum += double(from_half(s[32 + i])) * (c4[r * m.n4 + k] - m.zeros[r]) * xq(in.b, k);
    } else {
      const int groups = int(up(m.cols, f.group)) / f.group;
      for (int k = 0; k < m.cols; ++k) {
        const int g = k / f.group, at = f.kind == Kind::rows ? r * groups + g : (rb * groups + g) * 16 + i;
        const uint8_t* packed = m.zeros + (rb * groups + g) * 2 * f.bits;
        const int z = f.zpacked ? stream_bits(packed, i * f.bits, f.bits) : m.zeros[at];
        const int code = f.kind == Kind::uniform
                             ? c[size_t(r) * m.cols + k]
                             : stream_bits(m.codes + size_t(r) * m.cols * f.bits / 8, size_t(k) * f.bits, f.bits);
        sum += double(from_half(m.scales[at])) * (code - z) * xq(in.a, k);
      }
    }
    y[r] = sum;
  }
  return y;
}

// mode 0: random; 1..4: all codes at maximum, x = +-127 exactly, zeros at 0 (1, 2) or at maximum (3, 4).
static double check(const Format& f, int rows, int cols, int mode) {
  const Sizes n = sizes(f, rows, cols);
  uint8_t *c = arena(n.codes, false), *s = arena(n.scales * 2, false), *z = arena(n.zeros, false);
  const int zmax = f.kind == Kind::segments ? 15 : (1 << f.bits) - 1;
  for (size_t i = 0; i < n.codes; ++i) c[i] = mode ? 0xff : uint8_t(rnd());
  for (size_t i = 0; i < n.zeros; ++i)
    z[i] = uint8_t((mode == 0 ? rnd() : mode < 3 ? 0 : 0xff) & (f.zpacked ? 0xff : zmax));
  for (size_t i = 0; i < n.scales; ++i) ((uint16_t*)s)[i] = to_half(float(0.001 + 0.02 * uni()));
  if (f.kind == Kind::bf16)
    for (size_t i = 0; i < n.codes; i += 2) c[i + 1] = uint8_t(0x3c | (rnd() & 0x82));  // moderate exponents
  std::vector<float> x(cols);
  for (int k = 0; k < cols; ++k) {
    const double normal = std::sqrt(-2 * std::log(1 - uni())) * std::cos(6.283185307179586 * uni());
    x[k] = float(mode == 0 ? normal * (k % 97 ? 1 : 20) : mode % 2 ? 127 : (k / 4 % 2 ? -127 : 127));
  }
  const Input in = make_input(f, cols, x);
  const Mat m{rows, cols, n.n1, n.n4, c, z, (const uint16_t*)s, 4096};
  const auto ref = reference(f, m, in);
  double top = 1e-30, worst = 0;
  for (double v : ref) top = std::max(top, std::abs(v));
  // When every code equals its zero the true result is 0: compare with the size of the terms instead.
  if (mode >= 3) top = std::max(top, 127.0 * 0.01 * cols);
  std::vector<float> mem(rows + 16);
  float* y = (float*)up(size_t(mem.data()), 64);
  for (Kernel k : {f.plain, f.prefetch}) {
    k(m, in, y, 0, rows / 16);
    for (int r = 0; r < rows; ++r) worst = std::max(worst, std::abs(y[r] - ref[r]) / top);
  }
  for (uint8_t* p : {c, s, z}) munmap(p, 1 << 21);
  return worst;
}

template <int B>
static std::string roundtrip() {
  uint8_t codes[512], packed[64 * B], back[512];
  bool ok = true;
  for (int rep = 0; rep < 100; ++rep) {
    for (auto& v : codes) v = rep == 0 ? (1 << B) - 1 : uint8_t(rnd() >> 20) & ((1 << B) - 1);
    pack_tile<B>(codes, packed), unpack_tile<B>(packed, back);
    ok &= !std::memcmp(codes, back, 512);
  }
  char buf[200];
  std::snprintf(buf, sizeof buf,
                "{\"bits\": %d, \"fragments\": %d, \"accumulators\": %d, \"ops_per_64_weights\": %g, "
                "\"roundtrip\": %s}",
                B, Layout<B>::n, Layout<B>::nslots(), Layout<B>::ops_per_64(), ok ? "true" : "false");
  return buf;
}
template <int B>
static int pack_stdin() {
  uint8_t codes[512], packed[64 * B];
  if (std::fread(codes, 1, 512, stdin) != 512) return 1;
  pack_tile<B>(codes, packed);
  return std::fwrite(packed, 1, sizeof packed, stdout) != sizeof packed;
}

// ---------------------------------------------------------------- timing
struct Time {
  std::vector<double> wall, cpu;  // seconds per call, one entry per sample
};
static double best(const std::vector<double>& v) { return *std::min_element(v.begin(), v.end()); }
static double median(std::vector<double> v) {
  std::nth_element(v.begin(), v.begin() + v.size() / 2, v.end());
  return v[v.size() / 2];
}
// Takes `samples` samples of `calls` calls. Two threads meet at a spinning barrier after every call; cpu is the
// busier thread's CPU time (spinning included). Call numbers run on, so that a caller can walk through memory.
template <class F>
static void measure(int threads, int samples, int calls, F fn, Time& out) {
  std::atomic<int> arrived{0};
  std::vector<double> cpu[2], wall;
  auto work = [&](int tid) {
    int step = 0;
    auto meet = [&] {
      if (threads == 1) return;
      arrived.fetch_add(1), ++step;
      for (int spin = 0; arrived.load(std::memory_order_acquire) < threads * step; ++spin)
        spin < 5000 ? _mm_pause() : std::this_thread::yield();
    };
    for (int s = 0; s < samples; ++s) {
      meet();
      const double w = now(CLOCK_MONOTONIC), t = now(CLOCK_THREAD_CPUTIME_ID);
      for (int i = 0; i < calls; ++i) fn(s * calls + i, tid), meet();
      cpu[tid].push_back((now(CLOCK_THREAD_CPUTIME_ID) - t) / calls);
      if (tid == 0) wall.push_back((now(CLOCK_MONOTONIC) - w) / calls);
    }
  };
  if (threads == 1) {
    work(0);
  } else {
    std::thread other([&] { work(1); });
    work(0);
    other.join();
  }
  for (int s = 0; s < samples; ++s) {
    out.wall.push_back(wall[s]);
    out.cpu.push_back(threads == 1 ? cpu[0][s] : std::max(cpu[0][s], cpu[1][s]));
  }
}

struct Run {
  std::string name;
  const Format* f;  // null: read loop
  bool huge, pf;
  int threads, rows, cols, ahead;
  Time time;
};

int main(int argc, char** argv) {
  if (argc == 3 && std::string(argv[1]) == "pack") switch (std::atoi(argv[2])) {
      case 1: return pack_stdin<1>();
      case 2: return pack_stdin<2>();
      case 3: return pack_stdin<3>();
      case 4: return pack_stdin<4>();
      case 5: return pack_stdin<5>();
      case 6: return pack_stdin<6>();
      case 8: return pack_stdin<8>();
      default: return 2;
    }
  const double seconds = argc > 1 ? std::atof(argv[1]) : 120;  // time for the measurements
  const size_t footprint = size_t(256) << 20, read_bytes = 16 << 20;

  std::printf("{\"layout\": [%s,\n%s,\n%s,\n%s,\n%s,\n%s,\n%s],\n\"checks\": [", roundtrip<1>().c_str(),
              roundtrip<2>().c_str(), roundtrip<3>().c_str(), roundtrip<4>().c_str(), roundtrip<5>().c_str(),
              roundtrip<6>().c_str(), roundtrip<8>().c_str());
  bool first = true;
  for (auto& f : formats) {
    double random = 0, extreme = 0;
    for (int cols : {576, 1536, 11008}) {
      const int rows = cols > 4096 ? 32 : 64;
      random = std::max(random, check(f, rows, cols, 0));
      for (int mode = 1; mode <= 4 && f.kind != Kind::bf16; ++mode)
        extreme = std::max(extreme, check(f, rows, cols, mode));
    }
    std::printf("%s{\"format\": \"%s\", \"random\": %.2e, \"saturation\": %.2e}", first ? "" : ",\n", f.name.c_str(),
                random, extreme);
    first = false;
  }
  std::printf("],\n");

  // One set of arenas per page kind, read by every format: random codes, valid fp16 scales, zeros 0 or 1.
  // Every DRAM call reads on from where the previous call, of whatever format, stopped: what it touches was last
  // touched a whole footprint of traffic ago.
  uint8_t *codes[2], *scales[2], *zeros[2];
  const size_t nc = footprint + (96 << 20), ns = (64 << 20) + (8 << 20), nz = (32 << 20) + (8 << 20);
  for (int h = 0; h < 2; ++h) {
    codes[h] = arena(nc, h), scales[h] = arena(ns, h), zeros[h] = arena(nz, h);
    for (size_t i = 0; i < nc; i += 8) *(uint64_t*)(codes[h] + i) = rnd();
    for (size_t i = 0; i < ns; i += 2) *(uint16_t*)(scales[h] + i) = uint16_t(0x2000 | (rnd() & 0x3ff));
    for (size_t i = 0; i < nz; ++i) zeros[h][i] = uint8_t(rnd() & 1);
  }

  std::vector<Run> runs;
  auto add = [&](const Format* f, bool huge, bool pf, int threads, int rows, int cols, int ahead) {
    runs.push_back({f ? f->name : "read", f, huge, pf, threads, rows, cols, ahead, {}});
  };
  for (int threads : {1, 2})
    for (bool huge : {true, false})
      for (bool pf : {true, false}) {
        add(nullptr, huge, pf, threads, 4096, 11008, 8192);
        for (auto& f : formats) add(&f, huge, pf, threads, 4096, 11008, 8192);
        for (auto& f : formats)
          for (int cols : {1536, 576}) add(&f, huge, pf, threads, 2112 - cols, cols, 8192);
      }
  for (int threads : {1, 2})
    for (int ahead : {2048, 4096, 16384}) {
      add(nullptr, true, true, threads, 4096, 11008, ahead);
      for (int i : {1, 3, 6}) add(&formats[i], true, true, threads, 4096, 11008, ahead);
    }

  std::vector<float> x(11008), ymem(4096 + 16);
  for (auto& v : x) v = float(uni() * 2 - 1);
  float* y = (float*)up(size_t(ymem.data()), 64);
  std::vector<Input> inputs;
  for (auto& r : runs)
    inputs.push_back(r.f ? make_input(*r.f, r.cols, std::vector<float>(x.begin(), x.begin() + r.cols)) : Input{});
  volatile uint64_t sink = 0;
  size_t at[2][3] = {};  // position in the code, scale and zero arenas
  const double end = now(CLOCK_MONOTONIC) + seconds;
  int reps = 0;
  for (; reps < 3 || now(CLOCK_MONOTONIC) < end; ++reps)
    for (size_t i = 0; i < runs.size(); ++i) {
      Run& r = runs[i];
      const bool cached = r.cols < 4096;
      const Sizes n = r.f ? sizes(*r.f, r.rows, r.cols) : Sizes{read_bytes, 0, 0, 0, 0};
      const size_t step[3] = {up(n.codes, 64), up(2 * n.scales, 64), up(n.zeros, 64)};
      const size_t limit[3] = {footprint, 64 << 20, 32 << 20};
      const int blocks = r.rows / 16, half = blocks / 2 & ~1;  // split in 32-row units
      const int samples = cached ? 2 : 6, calls = cached ? 50 : 1;
      size_t* pos = at[r.huge];
      measure(r.threads, samples, calls, [&](int call, int tid) {
        size_t p[3] = {};
        if (!cached)
          for (int k = 0; k < 3; ++k) p[k] = (pos[k] + call * step[k]) % limit[k] / 64 * 64;
        const uint8_t* c = codes[r.huge] + p[0];
        if (!r.f) {
          const size_t part = read_bytes / r.threads;
          c += tid * part;
          sink = sink + (r.pf ? read_loop<true>(c, part, r.ahead) : read_loop<false>(c, part, r.ahead));
          return;
        }
        const Mat m{r.rows, r.cols, n.n1, n.n4, c, zeros[r.huge] + p[2], (const uint16_t*)(scales[r.huge] + p[1]),
                    r.ahead};
        (r.pf ? r.f->prefetch : r.f->plain)(m, inputs[i], y, tid ? half : 0, r.threads == 1 || tid ? blocks : half);
      }, r.time);
      if (!cached)
        for (int k = 0; k < 3; ++k) pos[k] = (pos[k] + samples * step[k]) % limit[k];
    }

  std::printf("\"rounds\": %d,\n\"runs\": [", reps);
  for (size_t i = 0; i < runs.size(); ++i) {
    const Run& r = runs[i];
    const double bytes = r.f ? double(sizes(*r.f, r.rows, r.cols).total()) : double(read_bytes);
    std::printf("%s{\"format\": \"%s\", \"rows\": %d, \"cols\": %d, \"threads\": %d, \"huge_pages\": %s, "
                "\"prefetch\": %d, \"bytes\": %.0f, \"us_wall\": %.4f, \"us_wall_median\": %.4f, \"us_cpu\": %.4f}",
                i ? ",\n" : "", r.name.c_str(), r.rows, r.cols, r.threads, r.huge ? "true" : "false",
                r.pf ? r.ahead : 0, bytes, best(r.time.wall) * 1e6, median(r.time.wall) * 1e6, best(r.time.cpu) * 1e6);
  }
  std::printf("],\n\"activation_quantization_us\": {");
  first = true;
  for (int cols : {576, 1536, 11008}) {
    Act a = make_act(std::vector<float>(x.begin(), x.begin() + cols), 64);
    Time t;
    measure(1, 200, 20, [&](int, int) { quantize(x.data(), cols, 64, a.q.data(), a.scale.data(), a.sum.data()); }, t);
    std::printf("%s\"%d\": %.3f", first ? "" : ", ", cols, best(t.wall) * 1e6);
    first = false;
  }
  std::printf("}}\n");
}
