// Every set of kernels of this processor against the portable ones, through the C interface, on seeded random matrices.
// Built by test_packed_arm.py, for the machine that it runs on and for others under an emulator.
//
// Prints the best level, a hash of what the portable kernels computed (it must be the same on every machine), and for
// every other level the largest difference, relative to the largest output. Ends with 1 where that is too much.

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <vector>

extern "C" {
int64_t bitfloor_packed_level(void);
int64_t bitfloor_packed_plan(const int64_t* form, int64_t count, void* out, int64_t size);
int64_t bitfloor_packed_product(const void* plan, const void* const* parts, const float* x, const float* bias, float* y,
                                int64_t m, int64_t integers, int64_t level, int64_t threads);
int64_t bitfloor_packed_rows(const void* plan, const void* const* parts, const int64_t* ids, int64_t first,
                             int64_t count, float* out, int64_t level, int64_t threads);
}

static const double MOST = 1e-5;  // both sum in float32, in another order; the tolerance of test_packed.py

static uint64_t state = 88172645463325252ull;
static int64_t below(int64_t n) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (int64_t)((state >> 11) % (uint64_t)n);
}
static int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

static uint64_t hash = 14695981039346656037ull;
static void add_to_hash(const void* at, size_t size) {
    for (size_t i = 0; i < size; ++i) hash = (hash ^ static_cast<const uint8_t*>(at)[i]) * 1099511628211ull;
}

struct Segment {
    int64_t columns, bits, group_size, zero, constant, scaled;
};
struct Worst {
    double product[2] = {0, 0};  // float, int8
    bool rows = true;
};

static std::vector<uint16_t> numbers(int64_t count, bool bfloat) {  // 16-bit floats around 0.1, of both signs
    std::vector<uint16_t> found;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t fraction = below(bfloat ? 128 : 1024), sign = below(2);
        found.push_back((uint16_t)((bfloat ? 0x3d80 : 0x2c00) | fraction | sign << 15));
    }
    return found;
}
static std::vector<uint8_t> bytes(int64_t count) {
    std::vector<uint8_t> found;
    for (int64_t i = 0; i < count; ++i) found.push_back((uint8_t)below(256));
    return found;
}

// Compares on one matrix; false if the interface refuses something.
static bool compare(int64_t rows, const std::vector<Segment>& segments, bool bfloat, int64_t m, std::vector<Worst>& worst) {
    int64_t stored = 0, codes = 0, groups = 0, zeros = 0, offsets = 0, padded = 0;
    std::vector<int64_t> form = {rows, 0, 0, 0, 0, 0, bfloat};
    for (const Segment& s : segments) {
        const int64_t own = up(s.columns, s.group_size);
        const int64_t given[6] = {s.columns, s.bits, s.group_size, s.zero, s.constant, s.scaled};
        form.insert(form.end(), given, given + 6);
        stored += s.columns, padded += 32 * up(s.columns, 32), codes += 64 * s.bits * up(s.columns, 32), groups += own;
        zeros += s.zero == 0 ? 2 * s.bits * own : 0, offsets += s.zero == 1 ? own : 0;
    }
    form[1] = stored;
    const int64_t count = (int64_t)form.size(), needed = bitfloor_packed_plan(form.data(), count, nullptr, 0);
    std::vector<int64_t> plan((size_t)up(needed, 8));
    if (needed <= 0 || bitfloor_packed_plan(form.data(), count, plan.data(), needed) != needed) return false;
    const int64_t blocks = up(rows, 16);
    const auto code = bytes(blocks * codes), zero = bytes(blocks * zeros);
    const auto scale = numbers(blocks * groups * 16, bfloat), offset = numbers(blocks * offsets * 16, bfloat);
    const void* parts[6] = {code.data(), scale.data(), zero.data(), offset.data(), nullptr, nullptr};
    std::vector<float> x((size_t)(m * padded)), bias((size_t)rows);
    for (int64_t i = 0; i < m; ++i) {
        int64_t at = i * padded;
        for (const Segment& s : segments) {
            for (int64_t j = 0; j < s.columns; ++j) x[(size_t)(at + j)] = (float)(below(2001) - 1000) * 1e-3f;
            at += 32 * up(s.columns, 32);
        }
    }
    for (auto& b : bias) b = (float)below(7);
    const int64_t levels = bitfloor_packed_level() + 1;
    for (int64_t integers = 0; integers < 2; ++integers) {
        std::vector<float> first((size_t)(m * rows)), y(first.size());
        for (int64_t level = 0; level < levels; ++level) {
            float* out = level ? y.data() : first.data();
            if (bitfloor_packed_product(plan.data(), parts, x.data(), bias.data(), out, m, integers, level, 1 + level))
                return false;
            double top = 0, off = 0;
            for (size_t i = 0; i < first.size(); ++i) {
                top = fmax(top, fabs(first[i]));
                const double difference = level ? fabs((double)y[i] - first[i]) : 0;
                off = difference <= off ? off : difference;  // not a number is kept
            }
            double& most = worst[(size_t)level].product[integers];
            most = off / top <= most ? most : off / top;
        }
        add_to_hash(first.data(), 4 * first.size());
    }
    std::vector<float> dense((size_t)(rows * stored)), other(dense.size());
    for (int64_t level = 0; level < levels; ++level) {
        float* out = level ? other.data() : dense.data();
        if (bitfloor_packed_rows(plan.data(), parts, nullptr, 0, rows, out, level, 1)) return false;
        if (level && memcmp(dense.data(), out, 4 * dense.size())) worst[(size_t)level].rows = false;
    }
    add_to_hash(dense.data(), 4 * dense.size());
    return true;
}

int main() {
    const int64_t widths[] = {1, 2, 3, 4, 5, 6, 8}, sizes[] = {16, 32, 64, 96, 128, 100000};
    std::vector<Worst> worst(3);
    for (int64_t bits : widths)
        for (int64_t size : sizes)
            for (int64_t zero = 0; zero < 3; ++zero) {
                const int64_t m = below(2) ? 1 : 1 + below(8), rows = 1 + below(90), columns = 1 + below(420);
                const bool bfloat = below(2);
                if (!compare(rows, {{columns, bits, size, zero, zero == 2 ? below(40) - 9 : 0, 0}}, bfloat, m, worst))
                    return puts("a good call was refused"), 1;
            }
    for (int64_t i = 0; i < 12; ++i) {
        std::vector<Segment> mixed;
        for (int64_t n = 1 + below(4); n >= 0; --n)
            mixed.push_back({1 + below(200), widths[below(7)], sizes[below(6)], below(2), 0, 0});
        const int64_t rows = 1 + below(70), bfloat = below(2), m = 1 + below(8);  // in this order on every compiler
        if (!compare(rows, mixed, bfloat, m, worst)) return puts("a good call was refused"), 1;
    }
    // Wide enough that sums are long, and codes and inputs at their extremes.
    for (int64_t bits : widths)
        if (!compare(64, {{4096, bits, 128, 0, 0, 0}}, false, 1, worst)) return puts("a good call was refused"), 1;
    printf("level %lld\nportable %016llx\n", (long long)bitfloor_packed_level(), (unsigned long long)hash);
    bool agree = true;
    for (int64_t level = 1; level <= bitfloor_packed_level(); ++level) {
        const Worst& own = worst[(size_t)level];
        printf("%lld float %.2e int8 %.2e rows %s\n", (long long)level, own.product[0], own.product[1],
               own.rows ? "equal" : "differ");
        agree = agree && own.rows && own.product[0] <= MOST && own.product[1] <= MOST;
    }
    return agree ? 0 : 1;
}
