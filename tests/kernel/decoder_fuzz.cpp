// Random decoders through the C interface, with every buffer as large as it must be and no larger, as packed_fuzz.cpp
// does it for products. All sets of kernels must agree, whatever the cuts between calls; what is no decoder must be
// refused. `decoder_fuzz ROUNDS SEED`, built by test_packed_fuzz.py.

#include "decoder.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <vector>

using namespace bitfloor;

extern "C" {
int64_t bitfloor_packed_level(void);
int64_t bitfloor_packed_plan(const int64_t* form, int64_t count, void* out, int64_t size);
int64_t bitfloor_packed_index(const void* plan, const void* order, const void* channels, int32_t* index, int32_t* before);
int64_t bitfloor_decoder_make(const Model* model, void** out);
int64_t bitfloor_decoder_free(void* decoder);
int64_t bitfloor_decoder_run(void* decoder, const int64_t* ids, int64_t start, int64_t count, float* logits,
                             int64_t integers, int64_t level, int64_t threads);
}

static uint64_t state;
static int64_t below(int64_t n) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return n > 0 ? (int64_t)((state >> 11) % (uint64_t)n) : 0;
}
static int fail(const char* what) {
    fprintf(stderr, "%s\n", what);
    return 1;
}

// Buffers of exactly so many bytes, each at an address that is a multiple of its unit and no more.
struct Buffers {
    std::vector<void*> all;
    uint8_t* bytes(int64_t size, int64_t unit) {
        const int64_t before = unit * below(64 / unit);
        uint8_t* whole = static_cast<uint8_t*>(malloc((size_t)(before + size) + 1));
        all.push_back(whole);
        for (int64_t i = 0; i < size; ++i) whole[before + i] = (uint8_t)below(256);
        return whole + before;
    }
    float* floats(int64_t count, float base) {
        float* found = reinterpret_cast<float*>(bytes(4 * count, 4));
        for (int64_t i = 0; i < count; ++i) found[i] = base + (float)(below(2001) - 1000) * 2e-4f;
        return found;
    }
    uint16_t* halves(int64_t count) {  // around 0.01, of both signs
        uint16_t* found = reinterpret_cast<uint16_t*>(bytes(2 * count, 2));
        for (int64_t i = 0; i < count; ++i) found[i] = (uint16_t)(0x2000 | below(1024) | below(2) << 15);
        return found;
    }
    ~Buffers() {
        for (void* own : all) free(own);
    }
};

static int64_t pick(const std::vector<int64_t>& from) { return from[(size_t)below((int64_t)from.size())]; }

static Matrix dense_matrix(Buffers& b, int64_t rows, int64_t inputs) {
    Matrix found = {};
    found.rows = rows, found.inputs = inputs, found.type = below(2);
    found.dense = found.type ? (void*)b.halves(rows * inputs) : (void*)b.floats(rows * inputs, 0.0f);
    if (below(2)) found.bias = b.floats(rows, 0.0f);
    return found;
}

static Matrix packed_matrix(Buffers& b, int64_t rows, int64_t inputs, bool by_channel) {
    const bool ordered = below(3) == 0, channels = below(3) == 0;
    const int64_t rotation = below(2) ? 0 : (int64_t)2 << below(6);
    std::vector<int64_t> form = {rows, inputs, ordered ? 1 : 0, ordered ? inputs : 0, rotation, channels, 0};
    int64_t left = inputs, codes = 0, groups = 0, zeros = 0, offsets = 0, scaled = 0;
    while (left) {
        const int64_t columns = below(2) ? left : 1 + below(left), bits = pick({1, 2, 3, 4, 5, 6, 8});
        const int64_t size = pick({7, 16, 32, 64, 128, 100000}), zero = below(3), own = up(columns, size);
        const int64_t with = by_channel && below(2);
        for (int64_t n : {columns, bits, size, zero, zero == 2 ? below(9) : 0, with}) form.push_back(n);
        left -= columns, codes += 64 * bits * up(columns, 32), groups += own, scaled += with ? columns : 0;
        zeros += zero == 0 ? 2 * bits * own : 0, offsets += zero == 1 ? own : 0;
    }
    const int64_t size = bitfloor_packed_plan(form.data(), (int64_t)form.size(), nullptr, 0), blocks = up(rows, 16);
    Matrix found = {};
    void* plan = b.bytes(size, 8);
    bitfloor_packed_plan(form.data(), (int64_t)form.size(), plan, size);
    found.plan = static_cast<const Plan*>(plan), found.rows = rows, found.inputs = inputs;
    found.parts = {b.bytes(blocks * codes, 1), b.halves(blocks * groups * 16), b.bytes(blocks * zeros, 1),
                   b.halves(blocks * offsets * 16), b.halves(scaled), nullptr};
    const int64_t wide = inputs <= 256 ? 1 : 2;
    uint8_t *order = b.bytes(inputs * wide, 2), *before = b.bytes(inputs * wide, 2);
    for (int64_t j = 0; j < inputs; ++j) {
        const int64_t last = inputs - 1 - j;
        memcpy(order + j * wide, &last, (size_t)wide), memcpy(before + j * wide, &last, (size_t)wide);
    }
    int32_t* index = ordered ? reinterpret_cast<int32_t*>(b.bytes(4 * inputs, 4)) : nullptr;
    int32_t* by = channels ? reinterpret_cast<int32_t*>(b.bytes(4 * inputs, 4)) : nullptr;
    bitfloor_packed_index(plan, order, before, index, by);
    found.index = index, found.channels = by;
    if (below(2)) found.bias = b.floats(rows, 0.0f);
    return found;
}

static Matrix matrix(Buffers& b, int64_t rows, int64_t inputs, bool by_channel = true) {
    return below(5) ? packed_matrix(b, rows, inputs, by_channel) : dense_matrix(b, rows, inputs);
}

// The same matrix, which shares all or part of the input side, or nothing.
static Matrix after(Buffers& b, const Matrix& before, int64_t rows) {
    if (!before.plan || rows != before.rows || below(2)) return matrix(b, rows, before.inputs);
    Matrix found = before;
    found.shared = below(4);
    return found;
}

static int refused(const Model& good, const std::vector<Layer>& layers) {
    void* out = nullptr;
    for (int64_t i = 0; i < 20; ++i) {
        Model model = good;
        std::vector<Layer> other = layers;
        model.layers = other.data();
        Layer& last = other.back();
        switch (i) {
            case 0: model.shape.hidden += 1; break;
            case 1: model.shape.head_dim -= 1; break;
            case 2: model.shape.positions = 0; break;
            case 3: model.shape.positions = (int64_t)1 << 60; break;
            case 4: model.shape.layers = -1; break;
            case 5: model.shape.heads = 0; break;
            case 6: model.shape.vocabulary += 1; break;
            case 7: model.norm = nullptr; break;
            case 8: model.frequencies = nullptr; break;
            case 9: last.mlp_norm = nullptr; break;
            case 10: last.window = -1; break;
            case 11: last.q.shared = 1; break;
            case 12: last.up.shared = 4; break;
            case 13: last.down.plan = nullptr, last.down.dense = nullptr; break;
            case 14: last.o.rows += 16; break;
            case 15: last.gate.inputs = 0; break;
            case 16: model.layers = nullptr; break;
            case 17: last.k.type = 3, last.k.plan = nullptr, last.k.dense = &out; break;
            case 18: model.shape.kv_heads = model.shape.heads + 1; break;
            default: model.shape.intermediate = (int64_t)1 << 40;
        }
        if (!bitfloor_decoder_make(&model, &out)) return fail("what is no decoder was made");
    }
    return bitfloor_decoder_make(nullptr, &out) && bitfloor_decoder_make(&good, nullptr) ? 0 : fail("nothing was made");
}

static int round_of(bool large) {
    Buffers b;
    Shape s = {};
    s.kv_heads = 1 + below(3), s.heads = s.kv_heads * (1 + below(5)), s.head_dim = 2 + 2 * below(large ? 64 : 12);
    s.hidden = 1 + below(large ? 300 : 70), s.intermediate = 1 + below(large ? 500 : 90), s.layers = 1 + below(3);
    s.vocabulary = 1 + below(100), s.positions = 1 + below(large ? 200 : 100);
    s.epsilon = 1e-5f, s.scaling = 0.3f, s.rope_scaling = 1.0f;
    std::vector<Layer> layers((size_t)s.layers);
    for (Layer& l : layers) {
        l.q = matrix(b, s.heads * s.head_dim, s.hidden);
        l.k = after(b, l.q, s.kv_heads * s.head_dim), l.v = after(b, l.k, s.kv_heads * s.head_dim);
        l.o = matrix(b, s.hidden, s.heads * s.head_dim);
        l.gate = matrix(b, s.intermediate, s.hidden), l.up = after(b, l.gate, s.intermediate);
        l.down = matrix(b, s.hidden, s.intermediate);
        l.attention_norm = b.floats(s.hidden, 1.0f), l.mlp_norm = b.floats(s.hidden, 1.0f);
        if (below(2)) l.q_norm = b.floats(s.head_dim, 1.0f), l.k_norm = b.floats(s.head_dim, 1.0f);
        l.window = below(2) ? 0 : 1 + below(20);
    }
    Model model = {s, {}, {}, b.floats(s.hidden, 1.0f), b.floats(s.head_dim / 2, 0.5f), layers.data()};
    model.embedding = matrix(b, s.vocabulary, s.hidden), model.head = model.embedding;
    if (below(2)) model.head = matrix(b, s.vocabulary, s.hidden);
    if (refused(model, layers)) return 1;
    std::vector<int64_t> ids((size_t)s.positions);
    for (int64_t& id : ids) id = below(s.vocabulary);
    float* logits = b.floats(s.vocabulary, 0.0f);
    for (int64_t integers = 0; integers < 2; ++integers) {
        std::vector<float> first;
        for (int64_t level = 0; level <= bitfloor_packed_level(); ++level) {
            void* decoder = nullptr;
            if (bitfloor_decoder_make(&model, &decoder)) return fail("a good decoder was refused");
            for (int64_t at = 0; at < s.positions;) {
                const int64_t count = 1 + below(least(s.positions - at, below(2) ? 3 : 200));
                int64_t* list = reinterpret_cast<int64_t*>(b.bytes(8 * count, 8));
                memcpy(list, ids.data() + at, (size_t)(8 * count));
                if (bitfloor_decoder_run(decoder, list, at, count, logits, integers, level, 1 + below(4)))
                    return fail("a good run was refused");
                at += count;
            }
            const int64_t wrong[1] = {s.vocabulary}, right[1] = {0};
            if (!bitfloor_decoder_run(decoder, wrong, 0, 1, logits, 0, level, 1) ||
                !bitfloor_decoder_run(decoder, right, s.positions, 1, nullptr, 0, level, 1) ||
                !bitfloor_decoder_run(decoder, right, s.positions, 1, logits, 0, level, 1) ||
                !bitfloor_decoder_run(decoder, right, -1, 1, logits, 0, level, 1) ||
                !bitfloor_decoder_run(decoder, right, 0, 0, logits, 0, level, 1) ||
                !bitfloor_decoder_run(decoder, right, 0, INT64_MAX, logits, 0, level, 1) ||
                !bitfloor_decoder_run(nullptr, right, 0, 1, logits, 0, level, 1))
                return fail("a run that makes no sense was made");
            bitfloor_decoder_free(decoder);
            double top = 1e-3, worst = 0;
            for (int64_t i = 0; i < s.vocabulary; ++i) {
                if (level == 0) first.push_back(logits[i]);
                top = fmax(top, fabs(first[(size_t)i])), worst = fmax(worst, fabs(logits[i] - first[(size_t)i]));
            }
            // What is rounded to int8 can fall to the other side of a border, and what follows from it too.
            if (!(worst <= (integers ? 0.2 : 2e-3) * top)) return fail("two sets of kernels do not agree");
        }
    }
    return 0;
}

int main(int count, char** words) {
    const int64_t rounds = count > 1 ? atoll(words[1]) : 100;
    state = count > 2 ? (uint64_t)atoll(words[2]) * 2654435761u + 1 : 88172645463325252ull;
    for (int64_t i = 0; i < rounds; ++i)
        if (round_of(i % 10 == 9)) return fprintf(stderr, "in round %lld\n", (long long)i), 1;
    return bitfloor_decoder_free(nullptr) ? 1 : 0;
}
