/* Attention of chunks of prompts over the paged cache, in bfloat16; see native.h.
 *
 * A unit is one KV head of a chunk's piece of at most ROW_BLOCK rows (queries × query heads). It
 * goes through the keys in blocks: K and V are packed as the products of pairs want them, every
 * tile of rows takes what it sees, and the softmax is carried on (Dao et al. 2022, FlashAttention,
 * arXiv:2205.14135). What a row sees of a block is decided by its own position, so a sequence's
 * result depends on its own split into chunks and never on the batch.
 */
#include "native.h"

#if defined(__AVX512BF16__)
enum { KEY_BLOCK = 512, ROW_BLOCK = 512, TILE = 8, WIDE = 4 * LANES };

struct scratch { /* of one thread */
    uint32_t *keys; /* [KEY_BLOCK / 16, D / 2, 16 keys] pairs of elements */
    uint32_t *values; /* [KEY_BLOCK / 2, D] pairs of tokens */
    float *totals; /* [ROW_BLOCK, D] */
    float most[ROW_BLOCK], weight[ROW_BLOCK];
    _Alignas(64) float scores[TILE][KEY_BLOCK];
    _Alignas(64) uint16_t shares[TILE][KEY_BLOCK]; /* bfloat16 */
};

INLINE const uint16_t *token_at(const struct attention *a, const void *cache, size_t b, size_t h,
                                size_t which, size_t place) {
    size_t token = a->kv_heads * a->dim;
    size_t from = a->table[b * a->table_width + place / a->block_size] * a->block_stride;
    from += (which * a->block_size + place % a->block_size) * token + h * a->dim;
    return (const uint16_t *)cache + from;
}

/* Zeros stand for tokens beyond `count`. */
static void pack(const struct attention *a, const void *cache, size_t b, size_t h, size_t begin,
                 size_t count, struct scratch *s) {
    const size_t dim = a->dim, pairs = dim / 2, whole = (count + 31) & ~(size_t)31;
    for (size_t j = 0; j < whole; j++) {
        uint32_t *to = s->keys + j / 16 * pairs * 16 + j % 16;
        const uint16_t *key = j < count ? token_at(a, cache, b, h, 0, begin + j) : NULL;
        for (size_t p = 0; p < pairs; p++) {
            uint32_t pair = 0;
            if (key) memcpy(&pair, key + 2 * p, 4);
            to[p * 16] = pair;
        }
    }
    for (size_t j = 0; j < whole; j += 2) {
        const uint16_t *one = j < count ? token_at(a, cache, b, h, 1, begin + j) : NULL;
        const uint16_t *two = j + 1 < count ? token_at(a, cache, b, h, 1, begin + j + 1) : NULL;
        for (size_t i = 0; i < dim; i += LANES) {
            hvec low = {0}, high = {0};
            if (one) memcpy(&low, one + i, sizeof low);
            if (two) memcpy(&high, two + i, sizeof high);
            uvec both = __builtin_convertvector(low, uvec) | __builtin_convertvector(high, uvec) << 16;
            memcpy(s->values + j / 2 * dim + i, &both, sizeof both);
        }
    }
}

INLINE __m512 pairs_of(__m512 total, const void *packed, const void *pair) {
    int32_t both;
    memcpy(&both, pair, 4);
    return _mm512_dpbf16_ps(total, (__m512bh)_mm512_loadu_si512(packed),
                            (__m512bh)_mm512_set1_epi32(both));
}

/* scores[r][j] = rows[r] · key j for 32 keys. */
INLINE void score(const uint16_t *const *rows, const uint32_t *keys, size_t dim, size_t j,
                  struct scratch *s) {
    const size_t pairs = dim / 2;
    const uint32_t *low = keys + j / 16 * pairs * 16, *high = low + pairs * 16;
    __m512 sums[TILE][2] = {0};
    for (size_t p = 0; p < pairs; p++)
#pragma GCC unroll 8
        for (int r = 0; r < TILE; r++) {
            sums[r][0] = pairs_of(sums[r][0], low + p * 16, rows[r] + 2 * p);
            sums[r][1] = pairs_of(sums[r][1], high + p * 16, rows[r] + 2 * p);
        }
    for (int r = 0; r < TILE; r++) {
        _mm512_store_ps(s->scores[r] + j, sums[r][0]);
        _mm512_store_ps(s->scores[r] + j + 16, sums[r][1]);
    }
}

/* Scores of the keys [from, to) become weights, all others zero; returns the factor for what was
 * summed before. */
INLINE float weigh(struct scratch *s, int r, size_t row, size_t from, size_t to, size_t whole,
                   float scale) {
    const ivec lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    float *scores = s->scores[r];
    vec tops = splat(-INFINITY);
    for (size_t j = 0; j < whole; j += LANES) {
        ivec place = lanes + (int32_t)j;
        ivec seen = (place >= (int32_t)from) & (place < (int32_t)to);
        vec x;
        memcpy(&x, scores + j, sizeof x);
        x = choose(seen, x * scale, splat(-INFINITY));
        memcpy(scores + j, &x, sizeof x);
        tops = choose(x > tops, x, tops);
    }
    float before = s->most[row], top = _mm512_reduce_max_ps((__m512)tops);
    top = top > before ? top : before;
    if (top == -INFINITY) { /* it has seen nothing yet */
        memset(s->shares[r], 0, whole * 2);
        return 1;
    }
    vec sums = {0};
    for (size_t j = 0; j < whole; j += 2 * LANES) {
        vec x[2];
        memcpy(x, scores + j, sizeof x);
        x[0] = exponential(x[0] - top), x[1] = exponential(x[1] - top);
        sums += x[0] + x[1];
        __m512bh both = _mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
        memcpy(s->shares[r] + j, &both, sizeof both);
    }
    float factor = before == -INFINITY ? 0 : exponential(splat(before - top))[0];
    s->weight[row] = s->weight[row] * factor + sum(sums);
    s->most[row] = top;
    return factor;
}

/* totals[row + r] = totals[row + r] · factor[r] + shares[r] V for up to 4 rows, WIDE elements. */
INLINE void mix(struct scratch *s, size_t row, int first, int rows, const float *factor, size_t dim,
                size_t i, size_t whole) {
    __m512 sums[4][4];
    for (int r = 0; r < 4; r++)
        for (int n = 0; n < 4; n++)
            if (r < rows)
                sums[r][n] = _mm512_loadu_ps(s->totals + (row + r) * dim + i + n * LANES) *
                             factor[first + r];
            else
                sums[r][n] = _mm512_setzero_ps();
    for (size_t j = 0; j < whole; j += 2) {
        const uint32_t *values = s->values + j / 2 * dim + i;
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
#pragma GCC unroll 4
            for (int n = 0; n < 4; n++)
                sums[r][n] = pairs_of(sums[r][n], values + n * LANES, s->shares[first + r] + j);
    }
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < 4; n++)
            _mm512_storeu_ps(s->totals + (row + r) * dim + i + n * LANES, sums[r][n]);
}

/* What the queries [first, first + rows) of one head see of a block of keys. */
static void take_in(const uint16_t *const *queries, struct scratch *s, size_t row, int rows,
                    const struct prefill *f, size_t position, size_t begin, size_t count) {
    const size_t dim = f->attention.dim;
    size_t seen = position + rows - begin; /* by the last of them */
    if (seen > count) seen = count;
    const size_t whole = (seen + 31) & ~(size_t)31;
    for (size_t j = 0; j < whole; j += 32) score(queries, s->keys, dim, j, s);
    float factor[TILE];
    for (int r = 0; r < TILE; r++) {
        if (r >= rows) {
            memset(s->shares[r], 0, whole * 2);
            continue;
        }
        int64_t to = (int64_t)(position + r + 1) - (int64_t)begin, from = 0;
        if (f->window) from = to - f->window < 0 ? 0 : to - f->window;
        if (to < 0) to = 0;
        factor[r] = weigh(s, r, row + r, from, (size_t)to < count ? (size_t)to : count, whole,
                          f->attention.scale);
    }
    for (int r = 0; r < rows; r += 4)
        for (size_t i = 0; i < dim; i += WIDE)
            mix(s, row + r, r, rows - r < 4 ? rows - r : 4, factor, dim, i, whole);
}

/* Queries [first, last) of sequence b, KV head h. */
static void attend_chunk(const struct prefill *f, struct scratch *s, const uint16_t *query,
                         const void *cache, uint16_t *out, size_t b, size_t h, size_t first,
                         size_t last) {
    const struct attention *a = &f->attention;
    const size_t dim = a->dim, group = a->heads / a->kv_heads, count = last - first;
    const size_t length = a->lens[b], all = f->starts[b + 1] - f->starts[b];
    const size_t base = length - all; /* position of the sequence's first query */
    const size_t end = base + last, window = f->window;
    memset(s->totals, 0, group * count * dim * sizeof *s->totals);
    for (size_t r = 0; r < group * count; r++) s->most[r] = -INFINITY, s->weight[r] = 0;
    size_t begin = window && window <= base + first ? base + first - window + 1 : 0;
    for (; begin < end; begin += KEY_BLOCK) {
        size_t keys = end - begin < KEY_BLOCK ? end - begin : KEY_BLOCK;
        pack(a, cache, b, h, begin, keys, s);
        for (size_t g = 0; g < group; g++)
            for (size_t q = 0; q < count; q += TILE) {
                int rows = count - q < TILE ? count - q : TILE;
                size_t position = base + first + q;
                if (position + rows <= begin) continue;
                const uint16_t *queries[TILE];
                for (int r = 0; r < TILE; r++) {
                    size_t token = f->starts[b] + first + q + (r < rows ? r : rows - 1);
                    queries[r] = query + (token * a->heads + h * group + g) * dim;
                }
                take_in(queries, s, g * count + q, rows, f, position, begin, keys);
            }
    }
    for (size_t g = 0; g < group; g++)
        for (size_t q = 0; q < count; q++) {
            size_t row = g * count + q, token = f->starts[b] + first + q;
            uint16_t *to = out + (token * a->heads + h * group + g) * dim;
            for (size_t i = 0; i < dim; i += LANES)
                store(to, i, LANES, load(s->totals, row * dim + i, LANES, 0) / s->weight[row], 1);
        }
}

/* Queries of one piece, at most. */
static size_t piece_of(const struct attention *a) { return ROW_BLOCK / (a->heads / a->kv_heads); }

int64_t prefill_units(const struct prefill *f, size_t first) {
    const struct attention *a = &f->attention;
    const size_t most = piece_of(a);
    int64_t units = 0;
    for (int64_t b = first; b < a->sequences; b++) {
        int64_t all = f->starts[b + 1] - f->starts[b];
        if (all < 0 || all > a->lens[b]) return -1;
        units += (all + most - 1) / most * a->kv_heads;
    }
    return units;
}

int prefill_phase(struct job *job, const struct prefill *f, size_t first, const void *query,
                  const void *cache, void *out) {
    const struct attention *a = &f->attention;
    const size_t tokens = sizeof(uint32_t) * KEY_BLOCK / 2 * a->dim, most = piece_of(a);
    struct scratch *s = aligned_alloc(64, (sizeof *s + 63) & ~(size_t)63);
    char *memory = aligned_alloc(64, 2 * tokens + sizeof(float) * ROW_BLOCK * a->dim);
    const int given = s && memory;
    if (given) {
        s->keys = (uint32_t *)memory, s->values = (uint32_t *)(memory + tokens);
        s->totals = (float *)(memory + 2 * tokens);
        size_t unit, end;
        while (take(job, prefill_units(f, first), 1, &unit, &end)) {
            size_t piece = unit / a->kv_heads, b = first;
            for (;; b++) {
                size_t all = f->starts[b + 1] - f->starts[b], pieces = (all + most - 1) / most;
                if (piece < pieces) {
                    size_t from = piece * most, to = from + most < all ? from + most : all;
                    attend_chunk(f, s, query, cache, out, b, unit % a->kv_heads, from, to);
                    break;
                }
                piece -= pieces;
            }
        }
    }
    free(s), free(memory);
    return given;
}
#else
int64_t prefill_units(const struct prefill *f, size_t first) {
    (void)f, (void)first;
    return -1;
}

int prefill_phase(struct job *job, const struct prefill *f, size_t first, const void *query,
                  const void *cache, void *out) {
    (void)job, (void)f, (void)first, (void)query, (void)cache, (void)out;
    return 0;
}
#endif

struct prefill_job {
    struct job job;
    const struct prefill *f;
    const void *query, *cache;
    void *out;
    atomic_int failed;
};

static void prefill_body(struct job *job) {
    struct prefill_job *j = (struct prefill_job *)job;
    if (!prefill_phase(job, j->f, 0, j->query, j->cache, j->out)) atomic_store(&j->failed, 1);
    barrier(job);
}

/* Whether pdserve_prefill computes for heads of such a size and group on this machine. */
PUBLIC int pdserve_prefills(int64_t dim, int64_t group) {
#if defined(__AVX512BF16__)
    return dim % WIDE == 0 && dim <= MOST_DIM && group <= MOST_GROUP;
#else
    (void)dim, (void)group;
    return 0;
#endif
}

/* query, out: [T, Hq, D] bfloat16, contiguous. Each sequence has no more queries than tokens in the
 * cache. False for what lies out of range, or without memory. */
PUBLIC int pdserve_prefill(const struct prefill *f, const void *query, const void *cache, void *out,
                           int threads) {
    if (!sound(&f->attention) || prefill_units(f, 0) < 0) return 0;
    struct prefill_job j = {
        .job.body = prefill_body, .f = f, .query = query, .cache = cache, .out = out};
    run(&j.job, threads);
    return !atomic_load(&j.failed);
}
