// What a decoder must be, and its memory. See decoder.h; step.cpp runs it.

#include "decoder.h"

#include <stdlib.h>
#include <string.h>

#include <initializer_list>
#include <new>

#define PUBLIC extern "C" __attribute__((visibility("default")))

namespace bitfloor {

namespace {

// -- what a decoder must be -------------------------------------------------------------------------------------------

bool good(const Matrix& a, int64_t rows, int64_t inputs) {
    if (a.rows != rows || a.inputs != inputs || a.shared < NOTHING || a.shared > ROUNDED) return false;
    if (!a.plan) return a.dense && a.type >= 0 && a.type <= 2 && a.shared == NOTHING;
    const Plan& plan = *a.plan;
    bool scaled = false;
    for (int64_t i = 0; i < plan.count_segments; ++i) scaled = scaled || plan.segments[i].scaled;
    return plan.rows == rows && plan.inputs == inputs && !a.dense && a.parts.codes && a.parts.scale &&
           (a.parts.zero || !plan.zero_bytes) && (a.parts.offset || !plan.offset_groups) &&
           (a.parts.channel_scale || !scaled) && (a.index != nullptr) == (plan.unit != 0) &&
           (a.channels != nullptr) == (plan.channels != 0);
}

// What a matrix takes from the one before it has to be there, and of its own size.
bool follows(const Matrix& a, const Matrix& before) {
    if (a.shared == NOTHING) return true;
    if (!a.plan || !before.plan || a.plan->rotation != before.plan->rotation ||
        a.plan->channels != before.plan->channels)
        return false;
    return a.shared == ROW || (a.plan->padded == before.plan->padded &&
                               (a.shared == STORED || (a.plan->blocks[0] == before.plan->blocks[0] &&
                                                       a.plan->blocks[1] == before.plan->blocks[1] &&
                                                       a.plan->groups == before.plan->groups)));
}

bool good(const Layer& layer, const Shape& s) {
    const int64_t wide = s.heads * s.head_dim, narrow = s.kv_heads * s.head_dim;
    return good(layer.q, wide, s.hidden) && good(layer.k, narrow, s.hidden) && good(layer.v, narrow, s.hidden) &&
           good(layer.o, s.hidden, wide) && good(layer.gate, s.intermediate, s.hidden) &&
           good(layer.up, s.intermediate, s.hidden) && good(layer.down, s.hidden, s.intermediate) &&
           layer.q.shared == NOTHING && follows(layer.k, layer.q) && follows(layer.v, layer.k) &&
           layer.o.shared == NOTHING && layer.gate.shared == NOTHING && follows(layer.up, layer.gate) &&
           layer.down.shared == NOTHING && layer.attention_norm && layer.mlp_norm && layer.window >= 0;
}

bool good(const Model& model) {
    const Shape& s = model.shape;
    for (int64_t n : {s.hidden, s.intermediate, s.heads, s.kv_heads, s.head_dim, s.vocabulary})
        if (n < 1 || n > MOST) return false;
    if (s.layers < 1 || s.layers > MOST_LAYERS || s.positions < 1 || s.positions > MOST_POSITIONS ||
        s.heads % s.kv_heads || s.head_dim % 2 || s.heads > MOST / s.head_dim || !model.norm || !model.frequencies ||
        !model.layers || !good(model.embedding, s.vocabulary, s.hidden) || !good(model.head, s.vocabulary, s.hidden) ||
        model.embedding.shared || model.head.shared)
        return false;
    for (int64_t i = 0; i < s.layers; ++i)
        if (!good(model.layers[i], s)) return false;
    return true;
}

// -- memory -----------------------------------------------------------------------------------------------------------

// Hands out pieces of one allocation; adds up first, without one.
struct Pieces {
    char* at;
    int64_t used;
    template <class T>
    void take(T*& piece, int64_t count) {
        piece = at ? reinterpret_cast<T*>(at + used) : nullptr;
        used += up(count * (int64_t)sizeof(T), LINE) * LINE;
    }
};

template <class Each>
void each_matrix(const Decoder& d, const Each& each) {
    for (int64_t i = 0; i < d.model.shape.layers; ++i) {
        const Layer& l = d.layers[i];
        for (const Matrix* a : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down}) each(*a);
    }
    each(d.model.head);
}

void share_out(Decoder& d, Pieces& pieces) {
    const Shape& s = d.model.shape;
    const int64_t m = least(CHUNK_TOKENS, s.positions), wide = s.heads * s.head_dim, narrow = s.kv_heads * s.head_dim;
    int64_t inputs = s.hidden, padded = 0, blocks = 0, groups = 0;
    each_matrix(d, [&](const Matrix& a) {
        inputs = most(inputs, a.inputs);
        if (!a.plan) return;
        padded = most(padded, a.plan->padded);
        for (int64_t count : a.plan->blocks) blocks = most(blocks, count);
        groups = most(groups, a.plan->groups);
    });
    for (float** piece : {&d.x, &d.normed}) pieces.take(*piece, m * s.hidden);
    for (float** piece : {&d.q, &d.mixed}) pieces.take(*piece, m * wide);
    for (float** piece : {&d.k, &d.v}) pieces.take(*piece, m * narrow);
    for (float** piece : {&d.gate, &d.up}) pieces.take(*piece, m * s.intermediate);
    pieces.take(d.turned, m * inputs);
    pieces.take(d.sines, m * s.head_dim);
    for (Prepared& own : d.prepared) {
        pieces.take(own.stored, m * padded), pieces.take(own.digits.q, 3 * m * padded);
        pieces.take(own.digits.scale, m * blocks), pieces.take(own.digits.start, 3 * m * blocks);
        pieces.take(own.digits.sum, m * groups);
    }
}

void release(Decoder* d) {
    if (!d) return;
    free(d->layers), free(d->keys), free(d->values), free(d->space);
    delete d;
}

float* floats(int64_t layers, int64_t each) {
    if (each > (INT64_MAX / 8) / layers) return nullptr;
    return static_cast<float*>(aligned_alloc(LINE, (size_t)(layers * each * 4)));
}

Decoder* made(const Model& model) {
    Decoder* d = new (std::nothrow) Decoder();
    if (!d) return nullptr;
    const Shape& s = model.shape;
    d->model = model;
    d->layers = static_cast<Layer*>(malloc(sizeof(Layer) * (size_t)s.layers));
    d->room = up(s.positions, 16) * 16, d->value_dim = up(s.head_dim, 16) * 16;
    d->keys = floats(s.layers, d->room * s.kv_heads * s.head_dim);
    if (d->value_dim <= MOST / s.kv_heads) d->values = floats(s.layers, d->room * s.kv_heads * d->value_dim);
    if (d->layers && d->keys && d->values) {
        memcpy(d->layers, model.layers, sizeof(Layer) * (size_t)s.layers);
        Pieces pieces = {nullptr, 0};
        share_out(*d, pieces);
        d->space = static_cast<float*>(aligned_alloc(LINE, (size_t)pieces.used));
        pieces = {reinterpret_cast<char*>(d->space), 0};
        if (d->space) share_out(*d, pieces);
    }
    if (d->space) return d;
    release(d);
    return nullptr;
}

}  // namespace

}  // namespace bitfloor

using namespace bitfloor;

// Makes a decoder and writes it to `out`. What the model points to is read in place and must stay, but for the layers,
// which are copied.
PUBLIC int64_t bitfloor_decoder_make(const Model* model, void** out) {
    if (!model || !out || !good(*model)) return BAD_CALL;
    *out = made(*model);
    return *out ? DONE : NO_MEMORY;
}

PUBLIC int64_t bitfloor_decoder_free(void* decoder) {
    release(static_cast<Decoder*>(decoder));
    return DONE;
}
