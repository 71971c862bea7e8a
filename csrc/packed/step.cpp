// One call a token, or for a prompt: a whole decoder over the packed products. See decoder.h.

#include <math.h>
#include <string.h>

#include <initializer_list>

#include "decoder.h"

#define PUBLIC extern "C" __attribute__((visibility("default")))

namespace bitfloor {

namespace {

static const int64_t SMALL_PRODUCT = 64 << 10;    // bytes of a matrix that are not worth a thread
static const int64_t SMALL_ATTENTION = 64 << 10;  // products of queries and keys
static const int64_t SMALL_ROWS = 16 << 10;       // floats

struct Run {
    Decoder& d;
    const Kernels& kernels;
    int64_t start, m;  // position of the first token of the chunk, tokens
    int64_t digits, threads;
};

// -- products ---------------------------------------------------------------------------------------------------------

// Threads for so much work.
int64_t worth(const Run& run, int64_t work, int64_t small) { return work < small ? 1 : run.threads; }

// The input side of a matrix for rows `first` to `last` of x.
void prepare(const Run& run, const Matrix& a, const float* x, const Prepared& own, int64_t first, int64_t last) {
    const Plan& plan = *a.plan;
    const bool turned = plan.rotation || plan.channels;
    for (int64_t i = first; i < last; ++i) {
        if (a.shared < STORED && own.stored == own.x) {
            float* row = run.d.turned + i * plan.inputs;
            if (turned && a.shared < ROW) input_row(plan, a.channels, x, 0, i, row);
            store_row(plan, a.index, a.parts.channel_scale, turned ? row : x + i * plan.inputs, own.stored + i * plan.padded);
        }
        const Digits& to = own.digits;
        const int64_t blocks = plan.blocks[kind_of(run.digits)];
        if (a.shared < ROUNDED)
            round_row(plan, own.x + i * plan.padded, run.digits,
                      {to.q + i * run.digits * plan.padded, to.scale + i * blocks,
                       to.start + i * run.digits * blocks, to.sum + i * plan.groups});
    }
}

// Whether what is stored is what is given.
bool as_given(const Matrix& a) {
    const Plan& plan = *a.plan;
    if (plan.unit || plan.rotation || plan.channels || plan.padded != plan.inputs) return false;
    for (int64_t i = 0; i < plan.count_segments; ++i)
        if (plan.segments[i].scaled) return false;
    return true;
}

struct Product {
    const Matrix* a;
    Prepared own;
    const float* x;
    float* y;
};

void multiply_blocks(const Run& run, const Product& p, int64_t first, int64_t last) {
    const Matrix& a = *p.a;
    if (!a.plan) {
        const DenseJob job = {a.dense, a.type, a.rows, a.inputs, run.m, p.x, a.bias, p.y};
        run.kernels.dense(job, first * ROWS, least(last * ROWS, a.rows));
        return;
    }
    const Plan& plan = *a.plan;
    const Digits& of = p.own.digits;
    const Job job = {&plan, a.parts, run.m, run.digits, p.own.x, a.bias, p.y, of.q, of.scale, of.start, of.sum};
    run.kernels.product(job, first, last);
}

// ys[i] [m, rows] = x [m, inputs] times matrix i: what they share of the input side is done once, and they share the
// threads too.
void multiply(const Run& run, std::initializer_list<const Matrix*> matrices, const float* x,
              std::initializer_list<float*> ys) {
    Product products[TOGETHER];
    int64_t count = 0, blocks = 0, bytes = 0;
    for (const Matrix* a : matrices) {
        Product& product = products[count];
        product = {a, run.d.prepared[count], x, ys.begin()[count]};
        Prepared& own = product.own;
        if (a->plan) {
            own.x = a->shared >= STORED ? products[count - 1].own.x : as_given(*a) ? x : own.stored;
            if (a->shared == ROUNDED) own = products[count - 1].own;
            in_ranges(run.m, 1, worth(run, run.m * a->inputs, SMALL_ROWS),
                      [&](int64_t first, int64_t last) { prepare(run, *a, x, own, first, last); });
            bytes += a->plan->code_bytes * a->plan->row_blocks * run.m;
        } else {
            bytes += a->rows * a->inputs * (a->type ? 2 : 4) * run.m;
        }
        blocks += up(a->rows, ROWS);
        ++count;
    }
    in_ranges(blocks, 2, worth(run, bytes, SMALL_PRODUCT), [&](int64_t first, int64_t last) {
        for (int64_t i = 0, base = 0; i < count; ++i) {
            const int64_t own = up(products[i].a->rows, ROWS);
            const int64_t from = most(first - base, 0), to = least(last - base, own);
            if (from < to) multiply_blocks(run, products[i], from, to);
            base += own;
        }
    });
}

// -- the layers -------------------------------------------------------------------------------------------------------

void norm(const Run& run, const float* x, const float* weight, float* out) {
    const Shape& s = run.d.model.shape;
    in_ranges(run.m, 1, worth(run, run.m * s.hidden, SMALL_ROWS), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i)
            run.kernels.norm(x + i * s.hidden, weight, s.epsilon, s.hidden, out + i * s.hidden);
    });
}

void add(const Run& run, const float* y) {
    const int64_t count = run.m * run.d.model.shape.hidden;
    float* __restrict x = run.d.x;
    for (int64_t j = 0; j < count; ++j) x[j] += y[j];
}

void embed(const Run& run, const int64_t* ids) {
    const Decoder& d = run.d;
    const Matrix& a = d.model.embedding;
    const int64_t hidden = d.model.shape.hidden;
    for (int64_t i = 0; i < run.m; ++i) {
        float* x = d.x + i * hidden;
        if (!a.plan) {
            const char* from = static_cast<const char*>(a.dense) + ids[i] * hidden * (a.type ? 2 : 4);
            Plan plain = {};
            plain.inputs = hidden;
            input_row(plain, nullptr, from, a.type, 0, x);
            continue;
        }
        float* row = a.plan->channels ? d.turned : x;
        Dense dense = {a.plan, a.parts, a.index, ids + i, 0, 1, row};
        if (a.index) memset(row, 0, sizeof(float) * (size_t)hidden);
        run.kernels.unpack(dense, 0, 1);
        rotate(*a.plan, row);
        for (int64_t j = 0; a.plan->channels && j < hidden; ++j) x[a.channels[j]] = row[j];
    }
}

// The sines and cosines of the chunk's positions, which all layers share: [m, head_dim], cosines first.
void turn(const Run& run) {
    const Shape& s = run.d.model.shape;
    const int64_t half = s.head_dim / 2;
    for (int64_t i = 0; i < run.m; ++i)
        for (int64_t j = 0; j < half; ++j) {
            const float angle = (float)(run.start + i) * run.d.model.frequencies[j];
            run.d.sines[i * s.head_dim + j] = cosf(angle) * s.rope_scaling;
            run.d.sines[i * s.head_dim + half + j] = sinf(angle) * s.rope_scaling;
        }
}

// Heads of a row, normed if there is a norm, turned to their position.
void turn_heads(const Run& run, float* x, int64_t heads, const float* weight, const float* sines) {
    const Shape& s = run.d.model.shape;
    const int64_t half = s.head_dim / 2;
    for (int64_t h = 0; h < heads; ++h, x += s.head_dim) {
        if (weight) run.kernels.norm(x, weight, s.epsilon, s.head_dim, x);
        for (int64_t j = 0; j < half; ++j) {
            const float a = x[j], b = x[half + j], cosine = sines[j], sine = sines[half + j];
            x[j] = a * cosine - b * sine, x[half + j] = b * cosine + a * sine;
        }
    }
}

// Turns queries and keys, and puts keys and values into the cache.
void remember(const Run& run, const Layer& layer, float* keys, float* values, int64_t first, int64_t last) {
    Decoder& d = run.d;
    const Shape& s = d.model.shape;
    for (int64_t i = first; i < last; ++i) {
        const float* sines = d.sines + i * s.head_dim;
        turn_heads(run, d.q + i * s.heads * s.head_dim, s.heads, layer.q_norm, sines);
        turn_heads(run, d.k + i * s.kv_heads * s.head_dim, s.kv_heads, layer.k_norm, sines);
        const int64_t at = run.start + i;
        for (int64_t h = 0; h < s.kv_heads; ++h) {
            const float* k = d.k + (i * s.kv_heads + h) * s.head_dim;
            float* to = keys + (h * d.room + at / 16 * 16) * s.head_dim + at % 16;
            for (int64_t j = 0; j < s.head_dim; ++j) to[j * 16] = k[j];
            float* value = values + (h * d.room + at) * d.value_dim;
            memcpy(value, d.v + (i * s.kv_heads + h) * s.head_dim, sizeof(float) * (size_t)s.head_dim);
            for (int64_t j = s.head_dim; j < d.value_dim; ++j) value[j] = 0.0f;
        }
    }
}

bool attend(const Run& run, int64_t index) {
    Decoder& d = run.d;
    const Shape& s = d.model.shape;
    const Layer& layer = d.layers[index];
    float* keys = d.keys + index * s.kv_heads * d.room * s.head_dim;
    float* values = d.values + index * s.kv_heads * d.room * d.value_dim;
    const int64_t items = run.m * s.heads, seen = run.start + run.m;
    in_ranges(run.m, 1, worth(run, items * s.head_dim, SMALL_ROWS),
              [&](int64_t first, int64_t last) { remember(run, layer, keys, values, first, last); });
    std::atomic<bool> failed{false};
    const Attention job = {s.heads, s.kv_heads, s.head_dim, d.value_dim, d.room, run.start, run.m, layer.window,
                           s.scaling, d.q, keys, values, d.mixed, &failed};
    in_ranges(items, 1, worth(run, items * s.head_dim * seen, SMALL_ATTENTION),
              [&](int64_t first, int64_t last) { run.kernels.attend(job, first, last); });
    return !failed.load();
}

bool pass(const Run& run, int64_t index) {
    Decoder& d = run.d;
    const Shape& s = d.model.shape;
    const Layer& layer = d.layers[index];
    norm(run, d.x, layer.attention_norm, d.normed);
    multiply(run, {&layer.q, &layer.k, &layer.v}, d.normed, {d.q, d.k, d.v});
    if (!attend(run, index)) return false;
    multiply(run, {&layer.o}, d.mixed, {d.normed});
    add(run, d.normed);
    norm(run, d.x, layer.mlp_norm, d.normed);
    multiply(run, {&layer.gate, &layer.up}, d.normed, {d.gate, d.up});
    in_ranges(run.m, 1, worth(run, run.m * s.intermediate, SMALL_ROWS), [&](int64_t first, int64_t last) {
        run.kernels.gate(d.gate + first * s.intermediate, d.up + first * s.intermediate, (last - first) * s.intermediate);
    });
    multiply(run, {&layer.down}, d.gate, {d.normed});
    add(run, d.normed);
    return true;
}

}  // namespace

}  // namespace bitfloor

using namespace bitfloor;

// Puts `count` tokens behind the first `start` of the cache, and writes the logits [vocabulary] behind the last one.
PUBLIC int64_t bitfloor_decoder_run(void* decoder, const int64_t* ids, int64_t start, int64_t count, float* logits,
                                    int64_t integers, int64_t level, int64_t threads) {
    Decoder* d = static_cast<Decoder*>(decoder);
    if (!d || !ids || !logits || level < 0 || start < 0 || count < 1 || start > d->model.shape.positions ||
        count > d->model.shape.positions - start)
        return BAD_CALL;
    const Shape& s = d->model.shape;
    for (int64_t i = 0; i < count; ++i)
        if (ids[i] < 0 || ids[i] >= s.vocabulary) return BAD_ROW;
    Run run = {*d, *kernels(level), start, 0, integers ? 1 : 3, threads};
    for (int64_t at = 0; at < count; at += run.m) {
        run.start = start + at, run.m = least(CHUNK_TOKENS, count - at);
        embed(run, ids + at);
        turn(run);
        for (int64_t i = 0; i < s.layers; ++i)
            if (!pass(run, i)) return NO_MEMORY;
    }
    const float* last = d->x + (run.m - 1) * s.hidden;
    run.m = 1;
    norm(run, last, d->model.norm, d->normed);
    multiply(run, {&d->model.head}, d->normed, {logits});
    return DONE;
}
