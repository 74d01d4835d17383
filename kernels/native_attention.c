/* Attention of one token per sequence over the paged cache; see native.h. */
#include "native.h"

int sound(const struct attention *a) {
    if (a->dim > MOST_DIM || a->heads / a->kv_heads > MOST_GROUP) return 0;
    for (int64_t b = 0; b < a->sequences; b++) {
        if (a->lens[b] < 0 || a->lens[b] > a->table_width * a->block_size) return 0;
        for (int64_t i = 0; i * a->block_size < a->lens[b]; i++) {
            int64_t block = a->table[b * a->table_width + i];
            if (block < 0 || block >= a->num_blocks) return 0;
        }
    }
    return 1;
}

/* Bring `count` tokens of one head from their blocks into rows of `width` floats, zero-padded. */
INLINE void gather(const struct attention *a, const void *cache, const int64_t *blocks, size_t h,
                   size_t which, size_t begin, size_t count, size_t length, size_t width,
                   float *to, int bf16) {
    size_t token = a->kv_heads * a->dim, half = a->block_size * token;
    for (size_t j = 0; j < count; j++, to += width) {
        size_t place = begin + j, offset = place % a->block_size;
        size_t from = blocks[place / a->block_size] * a->block_stride + which * half;
        from += offset * token + h * a->dim;
        /* The tokens of one head lie too far apart for the processor to foresee. With a key we ask
         * for its value, with a value for the key that is a tile further on. */
        const char *soon = at(cache, from + half, bf16);
        if (which) {
            size_t later = place + TOKENS;
            if (later >= length) later = place;
            soon = at(cache, blocks[later / a->block_size] * a->block_stride +
                             later % a->block_size * token + h * a->dim, bf16);
        }
        for (size_t i = 0; i < (size_t)a->dim * (bf16 ? 2 : 4); i += 64) __builtin_prefetch(soon + i);
        for (size_t i = 0; i < width; i += LANES) {
            size_t left = i < (size_t)a->dim ? a->dim - i : 0;
            vec x = load(cache, from + i, left, bf16);
            memcpy(to + i, &x, sizeof x);
        }
    }
}

INLINE vec floats(const float *from) {
    vec x;
    memcpy(&x, from, sizeof x);
    return x;
}

/* Turn raw scores into weights of the online softmax (Milakov and Gimelshein 2018,
 * arXiv:1805.02867): returns the factor for what was summed before. */
INLINE float soften(const struct attention *a, float *scores, size_t count, float *most, float *total) {
    float top = *most;
    for (size_t j = 0; j < TOKENS; j += LANES) {
        vec s = floats(scores + j) * a->scale;
        if (a->soft_cap > 0) { /* cap · tanh(s / cap), by tanh(y) = 1 - 2 / (e^2y + 1) */
            vec grown = exponential(s * (2 / a->soft_cap));
            s = a->soft_cap * (1.0f - 2.0f / (grown + 1.0f));
        }
        memcpy(scores + j, &s, sizeof s);
    }
    for (size_t j = 0; j < count; j++) top = scores[j] > top ? scores[j] : top;
    vec sums = {0};
    for (size_t j = 0; j < TOKENS; j += LANES) {
        vec p = exponential(floats(scores + j) - top);
        memcpy(scores + j, &p, sizeof p);
    }
    for (size_t j = count; j < TOKENS; j++) scores[j] = 0;
    for (size_t j = 0; j < TOKENS; j += LANES) sums += floats(scores + j);
    float factor = exponential(splat(*most - top))[0];
    *total = *total * factor + sum(sums);
    *most = top;
    return factor;
}

/* The query heads of KV head h of sequence b: out[g] = softmax(cap(scale q[g]·k)) v over the last
 * `window` tokens (0: all). query and out: [group, D]. */
INLINE void attend_as(const struct attention *a, const void *cache, size_t b, size_t h,
                      size_t window, const void *query, void *out, int bf16) {
    const size_t dim = a->dim, group = a->heads / a->kv_heads, length = a->lens[b];
    const size_t width = (dim + 4 * LANES - 1) / (4 * LANES) * (4 * LANES);
    const int64_t *blocks = a->table + b * a->table_width;
    _Alignas(64) float q[MOST_GROUP * MOST_DIM], total[MOST_GROUP * MOST_DIM];
    _Alignas(64) float tokens[TOKENS * MOST_DIM], scores[MOST_GROUP][TOKENS];
    float most[MOST_GROUP], weight[MOST_GROUP], factor[MOST_GROUP];
    if (!length) {
        memset(out, 0, group * dim * (bf16 ? 2 : 4));
        return;
    }
    memset(total, 0, group * width * sizeof *total);
    for (size_t g = 0; g < group; g++) {
        most[g] = -INFINITY, weight[g] = 0;
        for (size_t i = 0; i < width; i += LANES) {
            vec x = load(query, g * dim + i, i < dim ? dim - i : 0, bf16);
            memcpy(q + g * width + i, &x, sizeof x);
        }
    }
    for (size_t j = window && window < length ? length - window : 0; j < length; j += TOKENS) {
        size_t count = length - j < TOKENS ? length - j : TOKENS;
        gather(a, cache, blocks, h, 0, j, count, length, width, tokens, bf16);
        for (size_t g = 0; g < group; g++) {
            const float *mine = q + g * width;
            for (size_t k = 0; k < count; k++) {
                const float *key = tokens + k * width;
                vec s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
                for (size_t i = 0; i < width; i += 4 * LANES) {
                    s0 += floats(mine + i) * floats(key + i);
                    s1 += floats(mine + i + LANES) * floats(key + i + LANES);
                    s2 += floats(mine + i + 2 * LANES) * floats(key + i + 2 * LANES);
                    s3 += floats(mine + i + 3 * LANES) * floats(key + i + 3 * LANES);
                }
                scores[g][k] = sum((s0 + s1) + (s2 + s3));
            }
            memset(scores[g] + count, 0, (TOKENS - count) * sizeof(float));
            factor[g] = soften(a, scores[g], count, &most[g], &weight[g]);
        }
        gather(a, cache, blocks, h, 1, j, count, length, width, tokens, bf16);
        for (size_t g = 0; g < group; g++)
            for (size_t i = 0; i < width; i += 4 * LANES) {
                float *to = total + g * width + i;
                vec s[4];
                for (int n = 0; n < 4; n++) s[n] = floats(to + n * LANES) * factor[g];
                for (size_t k = 0; k < count; k++)
                    for (int n = 0; n < 4; n++)
                        s[n] += scores[g][k] * floats(tokens + k * width + i + n * LANES);
                memcpy(to, s, sizeof s);
            }
    }
    for (size_t g = 0; g < group; g++)
        for (size_t i = 0; i < dim; i += LANES)
            store(out, g * dim + i, dim - i, floats(total + g * width + i) / weight[g], bf16);
}

#if defined(__AVX512BF16__)
/* The same for pairs of bfloat16, where they lie. */
INLINE void attend_pairs(const struct attention *a, const void *cache, size_t b, size_t h,
                         size_t window, const void *query, void *out, size_t dim) {
    enum { TOGETHER = 2 }; /* heads that meet a value in registers */
    const size_t group = a->heads / a->kv_heads, length = a->lens[b];
    const size_t token = a->kv_heads * dim, half = a->block_size * token;
    const int64_t *blocks = a->table + b * a->table_width;
    _Alignas(64) float total[MOST_GROUP * MOST_DIM], scores[MOST_GROUP + 1][TOKENS];
    float most[MOST_GROUP], weight[MOST_GROUP], factor[MOST_GROUP + 1];
    memset(total, 0, group * dim * sizeof *total);
    for (size_t g = 0; g < group; g++) most[g] = -INFINITY, weight[g] = 0;
    for (size_t j = window && window < length ? length - window : 0; j < length; j += TOKENS) {
        const size_t count = length - j < TOKENS ? length - j : TOKENS;
        const uint16_t *keys[TOKENS];
        for (size_t k = 0; k < TOKENS; k++) {
            size_t place = k < count ? j + k : j;
            keys[k] = (const uint16_t *)cache + blocks[place / a->block_size] * a->block_stride +
                      place % a->block_size * token + h * dim;
            /* See `gather` for why we ask. */
            for (size_t i = 0; i < dim; i += 32) __builtin_prefetch(keys[k] + half + i);
        }
        for (size_t g = 0; g < group; g++) {
            const uint16_t *mine = (const uint16_t *)query + g * dim;
            for (size_t k = 0; k < count; k += LANES) {
                vec s[LANES];
#pragma GCC unroll 16
                for (size_t n = 0; n < LANES; n++) {
                    __m512 both = _mm512_setzero_ps();
                    for (size_t i = 0; i < dim; i += 32)
                        both = _mm512_dpbf16_ps(both, (__m512bh)_mm512_loadu_si512(keys[k + n] + i),
                                                (__m512bh)_mm512_loadu_si512(mine + i));
                    s[n] = (vec)both;
                }
                vec found = sums_of(s);
                memcpy(scores[g] + k, &found, sizeof found);
            }
            if (count <= LANES) memset(scores[g] + LANES, 0, LANES * sizeof(float));
            factor[g] = soften(a, scores[g], count, &most[g], &weight[g]);
        }
        for (size_t k = 0; k < TOKENS && j + TOKENS + k < length; k++) {
            size_t place = j + TOKENS + k;
            const uint16_t *soon = (const uint16_t *)cache + h * dim +
                                   blocks[place / a->block_size] * a->block_stride +
                                   place % a->block_size * token;
            for (size_t i = 0; i < dim; i += 32) __builtin_prefetch(soon + i);
        }
        for (size_t g = 0; g < group; g += TOGETHER) {
            const size_t heads = group - g < TOGETHER ? group - g : TOGETHER;
            for (size_t i = 0; i < dim; i += 4 * LANES) {
                vec s[TOGETHER][4] = {0};
                for (size_t m = 0; m < heads; m++)
                    for (size_t n = 0; n < 4; n++)
                        s[m][n] = floats(total + (g + m) * dim + i + n * LANES) * factor[g + m];
                for (size_t k = 0; k < count; k++)
                    for (size_t n = 0; n < 4; n++) {
                        vec value = load(keys[k] + half, i + n * LANES, LANES, 1);
                        for (size_t m = 0; m < TOGETHER; m++) s[m][n] += scores[g + m][k] * value;
                    }
                for (size_t m = 0; m < heads; m++)
                    memcpy(total + (g + m) * dim + i, s[m], sizeof s[m]);
            }
        }
    }
    for (size_t g = 0; g < group; g++)
        for (size_t i = 0; i < dim; i += LANES)
            store(out, g * dim + i, LANES, floats(total + g * dim + i) / weight[g], 1);
}
#endif

void attend(const struct attention *a, const void *cache, size_t b, size_t h, size_t window,
            const void *query, void *out, int bf16) {
#if defined(__AVX512BF16__)
    if (bf16 && a->lens[b] && a->dim % (4 * LANES) == 0) {
        if (a->dim == 64) attend_pairs(a, cache, b, h, window, query, out, 64);
        else if (a->dim == 128) attend_pairs(a, cache, b, h, window, query, out, 128);
        else attend_pairs(a, cache, b, h, window, query, out, a->dim);
        return;
    }
#endif
    if (bf16) attend_as(a, cache, b, h, window, query, out, 1);
    else attend_as(a, cache, b, h, window, query, out, 0);
}

struct attention_job {
    struct job job;
    const struct attention *a;
    const void *query, *cache;
    void *out;
    int64_t window;
};

INLINE void attention_body(struct job *job, int bf16) {
    struct attention_job *j = (struct attention_job *)job;
    const struct attention *a = j->a;
    size_t first, last, group = a->heads / a->kv_heads;
    while (take(job, a->sequences * a->kv_heads, 1, &first, &last)) {
        size_t i = first * group * a->dim;
        attend(a, j->cache, first / a->kv_heads, first % a->kv_heads, j->window,
               at(j->query, i, bf16), (char *)at(j->out, i, bf16), bf16);
    }
    barrier(job);
}

static void attention_f32(struct job *job) { attention_body(job, 0); }
static void attention_bf16(struct job *job) { attention_body(job, 1); }

/* query, out: [B, Hq, D] contiguous; window 0: none; a length of 0 gives zeros. False, and nothing
 * done, for lengths or blocks outside the table or the cache. */
PUBLIC int pdserve_attention(int bf16, const struct attention *a, const void *query, const void *cache,
                      void *out, int64_t window, int threads) {
    if (!sound(a)) return 0;
    struct attention_job j = {.job.body = bf16 ? attention_bf16 : attention_f32,
                              .a = a, .query = query, .cache = cache, .out = out, .window = window};
    run(&j.job, threads);
    return 1;
}
