/* Chunks of prompts, and single tokens beside them, through one layer in one call, in bfloat16; see
 * native.h.
 *
 * A unit is a panel of at most PANEL tokens, which lie across the lanes of vectors: a panel of n
 * elements is [n / 2][PANEL] pairs of elements, as the products of pairs want them. A weight is read
 * where it lies in the checkpoint and meets all tokens of the panel, so nothing is packed but
 * activations, and a token's sums run over its own lane, whatever lies beside it: its bits depend on
 * the split of its own sequence into chunks (native_prefill.c) and never on the batch. Only attention
 * needs more than one panel.
 */
#include "native.h"

struct chunks { /* step.attention: of B sequences, the single tokens first; the rest of T tokens */
    struct step step;
    const int64_t *starts; /* [B + 1] first token of each sequence */
    int64_t tokens, singles; /* T, and how many sequences have a single token */
    void *query, *mixed; /* [T, Hq, D] between the phases */
};

#if defined(__AVX512BF16__)
enum { PANEL = 2 * LANES, OUTS = 8 };

struct chunk_job {
    struct job job;
    const struct chunks *chunks;
    const struct layer *layer;
    size_t width; /* tokens of a panel: PANEL, or LANES where there are not enough for all threads */
    atomic_int failed;
};

struct panel { /* of one thread */
    const struct chunk_job *of;
    size_t first, count; /* its tokens */
    uint32_t *hidden, *input, *inner; /* pairs [E / 2], of what is multiplied, [I / 2] */
    vec (*head)[2]; /* [D] */
    uint32_t *pairs; /* [D / 2] */
    vec (*cos)[2], (*sin)[2]; /* [D / 2] */
};

INLINE vec low(uvec pairs) { return (vec)(pairs << 16); }
INLINE vec high(uvec pairs) { return (vec)(pairs & 0xffff0000u); }
INLINE uvec paired(vec one, vec two) { return (uvec)rounded(one, 1) >> 16 | (uvec)rounded(two, 1); }
INLINE uvec words(const uint32_t *from) {
    uvec x;
    memcpy(&x, from, sizeof x);
    return x;
}

/* to[i][j] = from[j][i] for i, j < LANES; no `from`: zeros, no `to`: left out. */
static void transpose(const uint32_t *const *from, uint32_t *const *to) {
    __m512i a[LANES], b[LANES];
    for (int i = 0; i < LANES; i++)
        a[i] = from[i] ? _mm512_loadu_si512(from[i]) : _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
        a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
        a[i + 4] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd);
    }
    for (int i = 0; i < LANES; i++)
        if (to[i]) _mm512_storeu_si512(to[i], a[i]);
}

/* Rows of `words` 32-bit words, one per token of the panel, to [words][PANEL] or (`back`) from it;
 * rows[t] NULL: zeros, or not wanted. */
static void turn_over(uint32_t *const *rows, uint32_t *panel, size_t words, int back) {
    for (size_t n = 0; n < PANEL; n += LANES)
        for (size_t i = 0; i < words; i += LANES) {
            uint32_t *row[LANES], *column[LANES];
            for (size_t t = 0; t < LANES; t++) {
                row[t] = rows[n + t] ? rows[n + t] + i : NULL;
                column[t] = panel + (i + t) * PANEL + n;
            }
            if (back) transpose((const uint32_t *const *)column, row);
            else transpose((const uint32_t *const *)row, column);
        }
}

/* The panel's rows of a [T, width] tensor of 32-bit words, or of a table by position. */
INLINE void rows_of(const struct panel *p, const void *tensor, size_t width, const int64_t *index,
                    uint32_t *rows[PANEL]) {
    for (size_t t = 0; t < PANEL; t++) {
        size_t row = t < p->count && index ? (size_t)index[p->first + t] : p->first + t;
        rows[t] = t < p->count ? (uint32_t *)tensor + row * width : NULL;
    }
}

/* totals[o][n] = weight row o · the tokens of vector n. */
INLINE void tile(const char *w, size_t columns, const uint32_t *x, int vectors, vec totals[OUTS][2]) {
    const size_t row = 2 * columns;
    const char *starts[] = {w, w + 3 * row, w + 6 * row};
    __m512 sums[OUTS][2] = {0};
    for (size_t i = 0; i < columns; i += 2, x += PANEL) {
        if (i % 32 == 0) /* the next tile's weights */
#pragma GCC unroll 8
            for (int o = 0; o < OUTS; o++) __builtin_prefetch(starts[o / 3] + (o % 3 + OUTS) * row);
        __m512bh tokens[2];
        for (int n = 0; n < vectors; n++) tokens[n] = (__m512bh)_mm512_loadu_si512(x + n * LANES);
#pragma GCC unroll 8
        for (int o = 0; o < OUTS; o++) {
            int32_t pair;
            memcpy(&pair, starts[o / 3] + o % 3 * row, 4);
            for (int n = 0; n < vectors; n++)
                sums[o][n] = _mm512_dpbf16_ps(sums[o][n], tokens[n], (__m512bh)_mm512_set1_epi32(pair));
        }
        for (int s = 0; s < 3; s++) starts[s] += 4;
    }
    for (int o = 0; o < OUTS; o++)
        for (int n = 0; n < vectors; n++) totals[o][n] = (vec)sums[o][n];
}

/* Outputs [row, row + OUTS) of a product with the panel's x [columns / 2] pairs, rounded. */
static void outputs(const struct panel *p, const struct matrix *m, size_t row, const uint32_t *x,
                    size_t columns, vec totals[OUTS][2]) {
    const char *w = at(m->weight, row * columns, 1);
    if (p->count > LANES) tile(w, columns, x, 2, totals);
    else tile(w, columns, x, 1, totals);
    for (size_t o = 0; o < OUTS; o++)
        for (size_t n = 0; n < 2; n++) {
            vec y = totals[o][n];
            if (m->bias) y += get(m->bias, row + o, 1);
            totals[o][n] = rounded(y, 1);
        }
}

/* input = norm(hidden). */
static void normalise(struct panel *p, const void *weight) {
    const struct step *s = &p->of->chunks->step;
    const size_t pairs = s->hidden_size / 2;
    for (size_t n = 0; n < PANEL; n += LANES) {
        vec squares = {0};
        for (size_t i = 0; i < pairs; i++) {
            uvec x = words(p->hidden + i * PANEL + n);
            squares += low(x) * low(x) + high(x) * high(x);
        }
        vec factor = 1.0f / (vec)_mm512_sqrt_ps((__m512)(squares / (float)s->hidden_size + s->eps));
        for (size_t i = 0; i < pairs; i++) {
            uvec x = words(p->hidden + i * PANEL + n);
            uvec y = paired(low(x) * factor * get(weight, 2 * i, 1),
                            high(x) * factor * get(weight, 2 * i + 1, 1));
            memcpy(p->input + i * PANEL + n, &y, sizeof y);
        }
    }
}

/* hidden += x Wᵀ. */
static void add(struct panel *p, const struct matrix *m, const uint32_t *x, size_t columns) {
    vec more[OUTS][2];
    for (size_t row = 0; row < (size_t)m->rows; row += OUTS) {
        outputs(p, m, row, x, columns, more);
        for (size_t o = 0; o < OUTS; o += 2)
            for (size_t n = 0; n < 2; n++) {
                uint32_t *to = p->hidden + (row + o) / 2 * PANEL + n * LANES;
                uvec sum = paired(low(words(to)) + more[o][n], high(words(to)) + more[o + 1][n]);
                memcpy(to, &sum, sizeof sum);
            }
    }
}

/* Head h of a product with the input: normed and turned if it is to be, then each token's to its
 * row. */
static void make_head(struct panel *p, const struct matrix *m, size_t h, const void *norm, int turned,
                      uint32_t *const *rows) {
    const struct step *s = &p->of->chunks->step;
    const size_t dim = s->attention.dim, half = dim / 2;
    for (size_t row = 0; row < dim; row += OUTS)
        outputs(p, m, h * dim + row, p->input, s->hidden_size, p->head + row);
    for (size_t n = 0; n < 2; n++) {
        vec squares = {0};
        for (size_t i = 0; norm && i < dim; i++) squares += p->head[i][n] * p->head[i][n];
        vec factor = 1.0f / (vec)_mm512_sqrt_ps((__m512)(squares / (float)dim + s->eps));
        for (size_t i = 0; norm && i < dim; i++)
            p->head[i][n] = rounded(p->head[i][n] * factor * get(norm, i, 1), 1);
        for (size_t i = 0; turned && i < half; i++) {
            vec one = p->head[i][n], two = p->head[half + i][n], c = p->cos[i][n], s = p->sin[i][n];
            p->head[i][n] = one * c - two * s, p->head[half + i][n] = two * c + one * s;
        }
        for (size_t i = 0; i < half; i++) {
            uvec both = paired(p->head[2 * i][n], p->head[2 * i + 1][n]);
            memcpy(p->pairs + i * PANEL + n * LANES, &both, sizeof both);
        }
    }
    turn_over(rows, p->pairs, half, 1);
}

/* Queries, and keys and values into the cache. */
static void project(struct panel *p) {
    const struct chunks *c = p->of->chunks;
    const struct step *s = &c->step;
    const struct attention *a = &s->attention;
    const struct layer *l = p->of->layer;
    const size_t half = a->dim / 2, wide = a->heads * half, token = a->kv_heads * half;
    uint32_t *rows[PANEL], *to[PANEL];
    rows_of(p, s->hidden, s->hidden_size / 2, NULL, rows);
    turn_over(rows, p->hidden, s->hidden_size / 2, 0);
    normalise(p, l->attention_norm);
    rows_of(p, s->cos, half, s->positions, rows);
    turn_over(rows, (uint32_t *)p->cos, half, 0);
    rows_of(p, s->sin, half, s->positions, rows);
    turn_over(rows, (uint32_t *)p->sin, half, 0);
    rows_of(p, c->query, wide, NULL, rows);
    for (int64_t h = 0; h < a->heads; h++) {
        for (size_t t = 0; t < PANEL; t++) to[t] = rows[t] ? rows[t] + h * half : NULL;
        make_head(p, &l->query, h, l->query_norm, 1, to);
    }
    for (size_t t = 0; t < PANEL; t++) {
        int64_t slot = t < p->count ? s->slots[p->first + t] : -1, block = slot / a->block_size;
        size_t place = block * (a->block_stride / 2) + slot % a->block_size * token;
        rows[t] = slot < 0 ? NULL : (uint32_t *)l->cache + place;
    }
    for (int64_t h = 0; h < a->kv_heads; h++) {
        for (size_t t = 0; t < PANEL; t++) to[t] = rows[t] ? rows[t] + h * half : NULL;
        make_head(p, &l->key, h, l->key_norm, 1, to);
        for (size_t t = 0; t < PANEL; t++) to[t] = to[t] ? to[t] + a->block_size * token : NULL;
        make_head(p, &l->value, h, NULL, 0, to);
    }
}

/* What follows attention: hidden += output(mixed); hidden += down(silu(gate) · up) of its norm. */
static void feed(struct panel *p) {
    const struct chunks *c = p->of->chunks;
    const struct step *s = &c->step;
    const struct layer *l = p->of->layer;
    const size_t wide = s->attention.heads * s->attention.dim, inner = s->inner_size;
    uint32_t *rows[PANEL];
    rows_of(p, c->mixed, wide / 2, NULL, rows);
    turn_over(rows, p->input, wide / 2, 0);
    rows_of(p, s->hidden, s->hidden_size / 2, NULL, rows);
    turn_over(rows, p->hidden, s->hidden_size / 2, 0);
    add(p, &l->output, p->input, wide);
    normalise(p, l->mlp_norm);
    vec gate[OUTS][2], up[OUTS][2];
    for (size_t row = 0; row < inner; row += OUTS) {
        outputs(p, &l->gate, row, p->input, s->hidden_size, gate);
        outputs(p, &l->up, row, p->input, s->hidden_size, up);
        for (size_t o = 0; o < OUTS; o += 2)
            for (size_t n = 0; n < 2; n++) {
                vec y[2];
                for (size_t k = 0; k < 2; k++) {
                    vec x = gate[o + k][n];
                    y[k] = rounded(x / (1.0f + exponential(-x)), 1) * up[o + k][n];
                }
                uvec both = paired(y[0], y[1]);
                memcpy(p->inner + (row + o) / 2 * PANEL + n * LANES, &both, sizeof both);
            }
    }
    add(p, &l->down, p->inner, inner);
    turn_over(rows, p->hidden, s->hidden_size / 2, 1);
}

/* Every panel through a phase. */
static void panels(struct chunk_job *j, struct panel *p, void (*phase)(struct panel *)) {
    const size_t tokens = j->chunks->tokens, width = j->width;
    size_t unit, end;
    while (p->hidden && take(&j->job, (tokens + width - 1) / width, 1, &unit, &end)) {
        p->first = unit * width;
        p->count = tokens - p->first < width ? tokens - p->first : width;
        phase(p);
    }
    barrier(&j->job);
}

static void attend_all(struct chunk_job *j) {
    const struct chunks *c = j->chunks;
    const struct attention *a = &c->step.attention;
    const struct layer *l = j->layer;
    const size_t group = a->heads / a->kv_heads;
    size_t unit, end;
    while (take(&j->job, c->singles * a->kv_heads, 1, &unit, &end)) {
        size_t b = unit / a->kv_heads, h = unit % a->kv_heads, from = unit * group * a->dim;
        attend(a, l->cache, b, h, l->window, at(c->query, from, 1), (char *)at(c->mixed, from, 1), 1);
    }
    barrier(&j->job);
    struct prefill f = {*a, c->starts, l->window};
    if (!prefill_phase(&j->job, &f, c->singles, c->query, l->cache, c->mixed))
        atomic_store(&j->failed, 1);
    barrier(&j->job);
}

static void chunk_body(struct job *job) {
    struct chunk_job *j = (struct chunk_job *)job;
    const struct step *s = &j->chunks->step;
    const size_t dim = s->attention.dim, wide = s->attention.heads * dim, hidden = s->hidden_size;
    const size_t sizes[] = {hidden / 2, (wide > hidden ? wide : hidden) / 2, s->inner_size / 2,
                            dim, dim / 2, dim / 2, dim / 2};
    size_t total = 0;
    for (int i = 0; i < 7; i++) total += sizes[i];
    uint32_t *memory = aligned_alloc(64, total * PANEL * 4), *parts[7] = {memory};
    for (int i = 1; memory && i < 7; i++) parts[i] = parts[i - 1] + sizes[i - 1] * PANEL;
    if (!memory) atomic_store(&j->failed, 1); /* others do its share, or nobody */
    struct panel p = {.of = j, .hidden = parts[0], .input = parts[1], .inner = parts[2],
                      .head = (void *)parts[3], .pairs = parts[4], .cos = (void *)parts[5],
                      .sin = (void *)parts[6]};
    panels(j, &p, project);
    attend_all(j);
    panels(j, &p, feed);
    free(memory);
}
#endif

/* Whether pdserve_chunks computes such layers on this machine; it needs pdserve_prefills, too. */
PUBLIC int pdserve_chunkable(int64_t hidden_size, int64_t inner_size) {
#if defined(__AVX512BF16__)
    return hidden_size % (2 * LANES) == 0 && inner_size % OUTS == 0;
#else
    (void)hidden_size, (void)inner_size;
    return 0;
#endif
}

#if defined(__AVX512BF16__)
/* Whether the tokens are those of the sequences, of which the first have one each. */
static int divided(const struct chunks *c) {
    const int64_t all = c->step.attention.sequences;
    if (c->singles < 0 || c->singles > all || c->starts[0] || c->starts[all] != c->tokens) return 0;
    for (int64_t b = 0; b < c->singles; b++)
        if (c->starts[b + 1] != b + 1) return 0;
    return 1;
}
#endif

/* One layer: `hidden` is replaced, K and V are stored. False for lengths, blocks, slots or positions
 * out of range, or without memory. */
PUBLIC int pdserve_chunks(const struct chunks *c, const struct layer *l, int threads) {
#if defined(__AVX512BF16__)
    const struct attention *a = &c->step.attention;
    struct prefill f = {*a, c->starts, l->window};
    if (!sound(a) || !divided(c) || !placed(&c->step, c->tokens) || prefill_units(&f, 0) < 0)
        return 0;
    struct chunk_job j = {.job.body = chunk_body, .chunks = c, .layer = l,
                          .width = c->tokens > LANES * threads ? PANEL : LANES};
    run(&j.job, threads);
    return !atomic_load(&j.failed);
#else
    (void)c, (void)l, (void)threads;
    return 0;
#endif
}
