/* A whole decode step in one call; see native.h. */
#include "native.h"

struct step_job {
    struct job job;
    const struct step *step;
    const struct layer *layers;
    char *normed, *query, *key, *value, *mixed, *inner; /* [T, ...] between the phases */
};

/* Turn the pairs (x[i], x[i + D/2]) of one head by the token's angles, in place. */
INLINE void turn(void *x, size_t dim, const float *cos, const float *sin, int bf16) {
    for (size_t i = 0, half = dim / 2; i < half; i += LANES) {
        vec a = load(x, i, half - i, bf16), b = load(x, half + i, half - i, bf16);
        vec c = load(cos, i, half - i, 0), s = load(sin, i, half - i, 0);
        store(x, i, half - i, a * c - b * s, bf16);
        store(x, half + i, half - i, b * c + a * s, bf16);
    }
}

INLINE void norms(struct step_job *j, const void *weight, int bf16) {
    const struct step *s = j->step;
    size_t t, end;
    while (take(&j->job, s->attention.sequences, 1, &t, &end)) {
        size_t i = t * s->hidden_size;
        rms_norm(at(s->hidden, i, bf16), weight, (char *)at(j->normed, i, bf16), s->hidden_size,
                 s->eps, bf16);
    }
    barrier(&j->job);
}

/* q, k and v in one phase: units are the rows of the three matrices one after the other. */
INLINE void project(struct step_job *j, const struct layer *l, int bf16) {
    const struct matrix *matrices[] = {&l->query, &l->key, &l->value};
    char *outs[] = {j->query, j->key, j->value};
    const size_t tokens = j->step->attention.sequences, columns = j->step->hidden_size;
    float sums[MOST_SUMS];
    size_t first, last, rows = l->query.rows + l->key.rows + l->value.rows;
    while (take(&j->job, rows, grain(columns, bf16), &first, &last))
        for (size_t row = first, done; row < last; row += done) {
            size_t n = 0, local = row, end = last - row;
            for (; local >= (size_t)matrices[n]->rows; n++) local -= matrices[n]->rows;
            const struct matrix *m = matrices[n];
            end = local + end < (size_t)m->rows ? local + end : (size_t)m->rows;
            done = PRODUCT(bf16)(m, local, end, j->normed, columns, tokens, sums);
            spread(outs[n], m->rows, local, done, sums, tokens, 0, bf16);
        }
    barrier(&j->job);
}

/* Norm, turn and store one KV head's key and value of one sequence, then its query heads attend. */
INLINE void mix(struct step_job *j, const struct layer *l, int bf16) {
    const struct step *s = j->step;
    const struct attention *a = &s->attention;
    const size_t dim = a->dim, group = a->heads / a->kv_heads, bytes = dim * (bf16 ? 2 : 4);
    size_t unit, end;
    while (take(&j->job, a->sequences * a->kv_heads, 1, &unit, &end)) {
        size_t b = unit / a->kv_heads, h = unit % a->kv_heads;
        char *query = (char *)at(j->query, unit * group * dim, bf16);
        char *key = (char *)at(j->key, unit * dim, bf16);
        const float *cos = s->cos + s->positions[b] * (dim / 2);
        const float *sin = s->sin + s->positions[b] * (dim / 2);
        for (size_t g = 0; g < group; g++) {
            char *head = query + g * bytes;
            if (l->query_norm) rms_norm(head, l->query_norm, head, dim, s->eps, bf16);
            turn(head, dim, cos, sin, bf16);
        }
        if (l->key_norm) rms_norm(key, l->key_norm, key, dim, s->eps, bf16);
        turn(key, dim, cos, sin, bf16);
        if (s->slots[b] >= 0) {
            size_t slot = s->slots[b], token = a->kv_heads * dim;
            size_t place = slot / a->block_size * a->block_stride + slot % a->block_size * token;
            place += h * dim;
            memcpy((char *)at(l->cache, place, bf16), key, bytes);
            memcpy((char *)at(l->cache, place + a->block_size * token, bf16),
                   at(j->value, unit * dim, bf16), bytes);
        }
        attend(a, l->cache, b, h, l->window, query,
               (char *)at(j->mixed, unit * group * dim, bf16), bf16);
    }
    barrier(&j->job);
}

/* inner = silu(gate) · up, each rounded as if it had been stored. */
INLINE void gated(struct step_job *j, const struct layer *l, int bf16) {
    const size_t tokens = j->step->attention.sequences, columns = j->step->hidden_size;
    const size_t inner = l->gate.rows;
    float gate[MOST_SUMS], up[MOST_SUMS];
    size_t first, last;
    while (take(&j->job, inner, grain(2 * columns, bf16), &first, &last))
        for (size_t row = first; row < last; row += 2) {
            size_t rows = PRODUCT(bf16)(&l->gate, row, last, j->normed, columns, tokens, gate);
            PRODUCT(bf16)(&l->up, row, last, j->normed, columns, tokens, up);
            for (size_t i = 0; i < rows * tokens; i += LANES) {
                size_t left = rows * tokens - i;
                vec x = rounded(load(gate, i, left, 0), bf16), y = rounded(load(up, i, left, 0), bf16);
                store(gate, i, left, rounded(x / (1.0f + exponential(-x)), bf16) * y, 0);
            }
            spread(j->inner, inner, row, rows, gate, tokens, 0, bf16);
        }
    barrier(&j->job);
}

INLINE void step_body(struct job *job, int bf16) {
    struct step_job *j = (struct step_job *)job;
    const struct step *s = j->step;
    const struct attention *a = &s->attention;
    const size_t tokens = a->sequences;
    for (const struct layer *l = j->layers; l < j->layers + s->num_layers; l++) {
        norms(j, l->attention_norm, bf16);
        project(j, l, bf16);
        mix(j, l, bf16);
        multiply(job, &l->output, j->mixed, a->heads * a->dim, tokens, s->hidden, 1, bf16);
        norms(j, l->mlp_norm, bf16);
        gated(j, l, bf16);
        multiply(job, &l->down, j->inner, s->inner_size, tokens, s->hidden, 1, bf16);
    }
}

static void step_f32(struct job *job) { step_body(job, 0); }
static void step_bf16(struct job *job) { step_body(job, 1); }

int placed(const struct step *s, int64_t tokens) {
    for (int64_t t = 0; t < tokens; t++)
        if (s->positions[t] < 0 || s->positions[t] >= s->num_positions ||
            s->slots[t] >= s->attention.num_blocks * s->attention.block_size)
            return 0;
    return 1;
}

/* One token of each sequence through all layers: `hidden` is replaced, K and V are stored. False,
 * and nothing done, for lengths, blocks, slots or positions out of range, or without memory. */
PUBLIC int pdserve_decode(int bf16, const struct step *s, const struct layer *layers, int threads) {
    const struct attention *a = &s->attention;
    if (!sound(a) || a->sequences > MOST_TOKENS || !placed(s, a->sequences)) return 0;
    const size_t wide = a->heads * a->dim, narrow = a->kv_heads * a->dim;
    const size_t sizes[] = {s->hidden_size, wide, narrow, narrow, wide, s->inner_size};
    struct step_job j = {.job.body = bf16 ? step_bf16 : step_f32, .step = s, .layers = layers};
    char **parts[] = {&j.normed, &j.query, &j.key, &j.value, &j.mixed, &j.inner};
    size_t total = 0;
    for (int i = 0; i < 6; i++) total += (sizes[i] * a->sequences * 4 + 63) & ~(size_t)63;
    char *memory = aligned_alloc(64, total), *next = memory;
    if (!memory) return 0;
    for (int i = 0; i < 6; i++) {
        *parts[i] = next;
        next += (sizes[i] * a->sequences * 4 + 63) & ~(size_t)63;
    }
    run(&j.job, threads);
    free(memory);
    return 1;
}
