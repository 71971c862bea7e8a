// Random calls of the C interface of the packed kernels, with every buffer as large as it must be and no larger. Built
// with address and undefined-behaviour sanitizers by test_packed_fuzz.py; `packed_fuzz ROUNDS SEED`. Forms that are none
// must be refused, and all sets of kernels must agree.

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

extern "C" {
int64_t bitfloor_packed_level(void);
int64_t bitfloor_packed_plan(const int64_t* form, int64_t count, void* out, int64_t size);
int64_t bitfloor_packed_input(const void* plan, const void* channels, const void* order, const uint16_t* channel_scale,
                              const void* x, int64_t x_type, int64_t m, float* out);
int64_t bitfloor_packed_product(const void* plan, const void* const* parts, const float* x, const float* bias, float* y,
                                int64_t m, int64_t integers, int64_t level, int64_t threads);
int64_t bitfloor_packed_linear(const void* plan, const void* const* parts, const void* x, int64_t x_type,
                               const float* bias, float* y, int64_t m, int64_t integers, int64_t level, int64_t threads);
int64_t bitfloor_packed_rows(const void* plan, const void* const* parts, const int64_t* ids, int64_t first,
                             int64_t count, float* out, int64_t level, int64_t threads);
int64_t bitfloor_packed_huge(void* at, int64_t bytes);
int64_t bitfloor_packed_read(const void* at, int64_t bytes, int64_t threads);
}

static uint64_t state;
static int64_t below(int64_t n) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return n > 0 ? (int64_t)((state >> 11) % (uint64_t)n) : 0;
}
static int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Exactly so many bytes, at an address that is a multiple of `unit` and no more: what is read before or behind shows.
struct Bytes {
    uint8_t* whole;
    uint8_t* at;
    explicit Bytes(int64_t size, int64_t unit) {
        const int64_t before = unit * below(64 / unit);
        whole = static_cast<uint8_t*>(malloc((size_t)(before + size) + 1));
        at = whole + before;
        for (int64_t i = 0; i < size; ++i) at[i] = (uint8_t)below(256);
    }
    Bytes(const Bytes&) = delete;
    ~Bytes() { free(whole); }
};

static int64_t index_bytes(int64_t entries) { return entries <= 256 ? 1 : entries <= 65536 ? 2 : 4; }
static void put(uint8_t* list, int64_t entries, int64_t p, int64_t value) {
    memcpy(list + p * index_bytes(entries), &value, (size_t)index_bytes(entries));
}
static void moderate(uint8_t* values, int64_t count, bool bfloat) {  // 16-bit floats around 0.1, of both signs
    for (int64_t i = 0; i < count; ++i) {
        const uint16_t v = (uint16_t)((bfloat ? 0x3d80 : 0x2c00) | below(bfloat ? 128 : 1024) | below(2) << 15);
        memcpy(values + 2 * i, &v, 2);
    }
}
static int fail(const char* what) {
    fprintf(stderr, "%s\n", what);
    return 1;
}

static int64_t pick(const std::vector<int64_t>& from) { return from[(size_t)below((int64_t)from.size())]; }

static int nonsense() {
    std::vector<int64_t> form((size_t)below(40));
    for (auto& n : form) n = below(3) ? below(9) : (int64_t)(state * 0x9e3779b97f4a7c15ull) >> below(60);
    const int64_t needed = bitfloor_packed_plan(form.data(), (int64_t)form.size(), nullptr, 0);
    if (needed < 0) return fail("a negative size");
    if (!needed) return 0;
    Bytes plan(needed, 8);
    bitfloor_packed_plan(form.data(), (int64_t)form.size(), plan.at, needed - 1);  // does not fit: not written
    return bitfloor_packed_plan(form.data(), (int64_t)form.size(), plan.at, needed) != needed;
}

static int round_of(bool huge) {
    const std::vector<int64_t> widths = {1, 2, 3, 4, 5, 6, 8}, sizes = {1, 7, 16, 31, 32, 64, 96, 128, 160, 100000};
    const int64_t rows = huge ? 4000 + below(40) : 1 + below(70), count = huge ? 1 : 1 + below(5);
    const bool ordered = below(2), bfloat = below(2), channels = below(2);
    std::vector<int64_t> segments;
    int64_t stored = 0, codes = 0, groups = 0, zeros = 0, offsets = 0, scaled = 0, padded = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t columns = huge ? 3000 + below(70) : 1 + below(300), bits = pick(widths), size = pick(sizes);
        const int64_t zero = below(3), by_channel = below(2), own = up(columns, size);
        const int64_t segment[6] = {columns, bits, size, zero, zero == 2 ? below(20) - 5 : 0, by_channel};
        segments.insert(segments.end(), segment, segment + 6);
        stored += columns, padded += 32 * up(columns, 32), codes += 64 * bits * up(columns, 32), groups += own;
        zeros += zero == 0 ? 2 * bits * own : 0, offsets += zero == 1 ? own : 0, scaled += by_channel ? columns : 0;
    }
    const int64_t unit = ordered ? 1 + below(3) : 0, entries = ordered ? up(stored, unit) : 0;
    const int64_t inputs = stored, rotation = below(2) ? 0 : (int64_t)2 << below(10);
    std::vector<int64_t> form = {rows, inputs, unit, entries, rotation, channels, bfloat};
    form.insert(form.end(), segments.begin(), segments.end());
    const int64_t needed = bitfloor_packed_plan(form.data(), (int64_t)form.size(), nullptr, 0);
    if (needed <= 0) return fail("a good form was refused");
    Bytes plan(needed, 8);
    if (bitfloor_packed_plan(form.data(), (int64_t)form.size(), plan.at, needed) != needed) return fail("a plan");

    const int64_t blocks = up(rows, 16);
    Bytes code(blocks * codes, 1), scale(blocks * groups * 32, 2), zero(blocks * zeros, 1), offset(blocks * offsets * 32, 2);
    Bytes by_channel(2 * scaled, 2), order(entries * index_bytes(entries), 4), channel(inputs * index_bytes(inputs), 4);
    moderate(scale.at, blocks * groups * 16, bfloat), moderate(offset.at, blocks * offsets * 16, bfloat);
    moderate(by_channel.at, scaled, bfloat);
    for (int64_t p = 0; p < entries; ++p) put(order.at, entries, p, p);
    for (int64_t j = 0; j < inputs; ++j) put(channel.at, inputs, j, inputs - 1 - j);
    const void* parts[7] = {code.at, scale.at, zero.at, offset.at, by_channel.at, ordered ? order.at : nullptr,
                            channels ? channel.at : nullptr};

    const int64_t m = huge ? 1 : below(9), type = below(3);
    Bytes x(m * inputs * (type ? 2 : 4), type ? 2 : 4), inner(4 * m * padded, 4), bias(4 * rows, 4);
    if (type)
        moderate(x.at, m * inputs, type == 2);
    else
        for (int64_t i = 0; i < m * inputs; ++i) reinterpret_cast<float*>(x.at)[i] = (float)(below(2001) - 1000) * 1e-3f;
    for (int64_t i = 0; i < rows; ++i) reinterpret_cast<float*>(bias.at)[i] = (float)below(7);
    float* in = reinterpret_cast<float*>(inner.at);
    const auto* factors = reinterpret_cast<const uint16_t*>(by_channel.at);
    if (bitfloor_packed_input(plan.at, channels ? channel.at : nullptr, parts[5], factors, x.at, type, m, in))
        return fail("a good input was refused");
    for (int64_t integers = 0; integers < 2; ++integers) {
        std::vector<float> first;
        for (int64_t level = 0; level <= bitfloor_packed_level(); ++level) {
            Bytes out(4 * m * rows, 4);
            float* y = reinterpret_cast<float*>(out.at);
            const auto* shift = below(2) ? reinterpret_cast<const float*>(bias.at) : nullptr;
            if (bitfloor_packed_product(plan.at, parts, in, shift, y, m, integers, level, 1 + below(4)))
                return fail("a good product was refused");
            Bytes both(4 * m * rows, 4);
            float* same = reinterpret_cast<float*>(both.at);
            if (bitfloor_packed_linear(plan.at, parts, x.at, type, shift, same, m, integers, level, 1 + below(4)) ||
                memcmp(same, y, (size_t)(4 * m * rows)))
                return fail("one call and two do not agree");
            double top = 1e-30, worst = 0;
            for (int64_t i = 0; i < m * rows; ++i) {
                const float value = y[i] - (shift ? shift[i % rows] : 0.0f);
                if (level == 0) first.push_back(value);
                top = fmax(top, fabs(first[(size_t)i])), worst = fmax(worst, fabs(value - first[(size_t)i]));
            }
            if (!(worst <= 1e-4 * (top + 10))) return fail("two sets of kernels do not agree");
        }
    }
    for (int64_t level = 0; level <= bitfloor_packed_level(); ++level) {
        const int64_t n = huge ? 3 : below(20), start = below(rows), some = below(rows - start + 1);
        std::vector<int64_t> ids;
        for (int64_t i = 0; i < n; ++i) ids.push_back(below(rows));
        Bytes list(8 * n, 8), out(4 * n * inputs, 4), range(4 * some * inputs, 4);
        if (n) memcpy(list.at, ids.data(), (size_t)(8 * n));
        const auto* at = reinterpret_cast<const int64_t*>(list.at);
        if (bitfloor_packed_rows(plan.at, parts, at, 0, n, reinterpret_cast<float*>(out.at), level, 2) ||
            bitfloor_packed_rows(plan.at, parts, nullptr, start, some, reinterpret_cast<float*>(range.at), level, 3))
            return fail("good rows were refused");
    }
    // What makes no sense is refused, and nothing is touched.
    const int64_t wrong[1] = {rows};
    if (!bitfloor_packed_rows(plan.at, parts, wrong, 0, 1, nullptr, 0, 1)) return fail("a row that is none");
    if (!bitfloor_packed_rows(plan.at, parts, nullptr, rows, 1, nullptr, 0, 1)) return fail("rows behind the last");
    if (!bitfloor_packed_product(plan.at, parts, in, nullptr, nullptr, 9, 0, 0, 1)) return fail("nine rows");
    if (!bitfloor_packed_product(plan.at, parts, in, nullptr, nullptr, -1, 0, 0, 1)) return fail("fewer than no rows");
    if (!bitfloor_packed_input(plan.at, channel.at, parts[5], factors, x.at, 3, m, in)) return fail("a type that is none");
    if (ordered && unit == 1) {
        memset(order.at, 0xff, (size_t)(entries * index_bytes(entries)));
        const bool none = entries != 256 && entries != 65536;
        if (none && !bitfloor_packed_input(plan.at, channel.at, order.at, factors, x.at, type, m, in))
            return fail("an order that names no channel");
    }
    if (below(4) == 0) bitfloor_packed_huge(code.at, blocks * codes), bitfloor_packed_read(code.at, blocks * codes, 2);
    return 0;
}

int main(int count, char** words) {
    const int64_t rounds = count > 1 ? atoll(words[1]) : 100;
    state = count > 2 ? (uint64_t)atoll(words[2]) * 2654435761u + 1 : 88172645463325252ull;
    for (int64_t i = 0; i < rounds; ++i)
        if (nonsense() || round_of(i % 50 == 49)) return fprintf(stderr, "in round %lld\n", (long long)i), 1;
    return 0;
}
