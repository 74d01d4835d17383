/* The decode step on a CPU: few rows through a whole decoder, straight from the checkpoint's pages.
 *
 * Compiled for the machine that it runs on (native.py), so the vector width and the bfloat16
 * instructions are chosen by the preprocessor; without any of them it is plain C on GCC's vectors.
 *
 * A decode step reads every weight once and computes little, so what counts is the speed of memory.
 * Weights are read as they lie in the file, [out, in] row by row; two rows at a time meet up to
 * ROWS rows of activations in registers. Activations have the model's element type, sums are
 * float32. Every sum runs over one row in one order that depends on its own length alone: results
 * have the same bits in any batch and with any number of threads.
 *
 * Legend: T tokens (one per sequence), E hidden size, I inner size, Hq and H query and KV heads,
 * D head size, S tokens per block, M blocks per row of the block table.
 */
#pragma once
#include <math.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define PUBLIC __attribute__((visibility("default"))) /* called from native.py */

/* Vectors of floats, as wide as the machine's registers ---------------------------------------- */

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 8
#elif defined(__AVX2__)
#define LANES 8
#define ROWS 4
#else
#define LANES 4
#define ROWS 4
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));

INLINE vec splat(float x) { return x - (vec){0}; }

INLINE vec choose(ivec where, vec a, vec b) { return (vec)((where & (ivec)a) | (~where & (ivec)b)); }

/* Up to LANES elements from the i-th on, of which `left` exist: zeros stand for the others. */
INLINE vec load(const void *from, size_t i, size_t left, int bf16) {
    if (bf16) {
        hvec half = {0};
        memcpy(&half, (const uint16_t *)from + i, left < LANES ? 2 * left : sizeof half);
        return (vec)(__builtin_convertvector(half, uvec) << 16);
    }
    vec whole = {0};
    memcpy(&whole, (const float *)from + i, left < LANES ? 4 * left : sizeof whole);
    return whole;
}

/* To the nearest bfloat16, ties to even; a NaN stays one. */
INLINE vec rounded(vec x, int bf16) {
    if (!bf16) return x;
    uvec bits = (uvec)x, odd = (bits >> 16) & 1;
    uvec near = (bits + 0x7fff + odd) & 0xffff0000u;
    return choose(x == x, (vec)near, (vec)(bits | 0x400000));
}

INLINE void store(void *to, size_t i, size_t left, vec x, int bf16) {
    if (bf16) {
        hvec half = __builtin_convertvector((uvec)rounded(x, 1) >> 16, hvec);
        memcpy((uint16_t *)to + i, &half, left < LANES ? 2 * left : sizeof half);
    } else {
        memcpy((float *)to + i, &x, left < LANES ? 4 * left : sizeof x);
    }
}

INLINE float get(const void *from, size_t i, int bf16) { return load(from, i, 1, bf16)[0]; }
INLINE void put(void *to, size_t i, float x, int bf16) { store(to, i, 1, splat(x), bf16); }
INLINE const char *at(const void *from, size_t i, int bf16) {
    return (const char *)from + i * (bf16 ? 2 : 4);
}

INLINE float sum(vec x) {
#if LANES == 16
    return _mm512_reduce_add_ps((__m512)x);
#else
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
#endif
}

/* sum(x[n]) of LANES vectors, the n-th in lane n: each has the bits that `sum` gives. */
INLINE vec sums_of(const vec *x) {
#if LANES == 16
    __m512 a[8], b[4], c[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) { /* by 16 lanes each */
        __m512 one = (__m512)x[8 * (i % 2) + i / 2], two = (__m512)x[8 * (i % 2) + i / 2 + 4];
        a[i] = _mm512_shuffle_f32x4(one, two, 0x44) + _mm512_shuffle_f32x4(one, two, 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) /* by 8 */
        b[i] = _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x88) +
               _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xdd);
    for (int i = 0; i < 2; i++) { /* by 4 */
        __m512d one = (__m512d)b[2 * i], two = (__m512d)b[2 * i + 1];
        c[i] = (__m512)_mm512_unpacklo_pd(one, two) + (__m512)_mm512_unpackhi_pd(one, two);
    }
    return (vec)(_mm512_shuffle_ps(c[0], c[1], 0x88) + _mm512_shuffle_ps(c[0], c[1], 0xdd));
#else
    vec found;
    for (int n = 0; n < LANES; n++) found[n] = sum(x[n]);
    return found;
#endif
}

/* e^x by Cody and Waite's reduction and Cephes' polynomial: 2 ulp; below -87 it is zero. */
INLINE vec exponential(vec x) {
    ivec tiny = x < -87.0f;
    x = choose(x > 88.0f, splat(88.0f), choose(tiny, splat(-87.0f), x));
    vec n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f; /* to the nearest integer */
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    return choose(tiny, (vec){0}, p * (vec)power);
}

/* y = x / sqrt(mean(x²) + eps) · weight; y may be x. */
INLINE void rms_norm(const void *x, const void *weight, void *y, size_t n, float eps, int bf16) {
    vec squares = {0};
    for (size_t i = 0; i < n; i += LANES) {
        vec v = load(x, i, n - i, bf16);
        squares += v * v;
    }
    float factor = 1.0f / sqrtf(sum(squares) / n + eps);
    for (size_t i = 0; i < n; i += LANES)
        store(y, i, n - i, load(x, i, n - i, bf16) * factor * load(weight, i, n - i, bf16), bf16);
}

/* Threads (native_threads.c) ---------------------------------------------------------------------
 *
 * One team for the process: the caller and helpers that wait for the next round, first spinning,
 * then asleep. All run the same body; its phases share out units and end in a barrier. A caller
 * that finds the team busy computes alone.
 */
struct job {
    void (*body)(struct job *);
    _Alignas(64) atomic_size_t next; /* first unit of the phase that nobody has taken */
    _Alignas(64) atomic_int arrived;
    atomic_uint turn;
    int members;
};

/* Run body(job) on `threads` threads, this one included. A body must end with a barrier. */
void run(struct job *job, int threads);
void barrier(struct job *job);

/* The next `grain` units of `units`, from *first up to *last; false when there are none left. */
INLINE int take(struct job *job, size_t units, size_t grain, size_t *first, size_t *last) {
    *first = atomic_fetch_add_explicit(&job->next, grain, memory_order_relaxed);
    *last = *first + grain < units ? *first + grain : units;
    return *first < units;
}

/* Products (native_products.c) ----------------------------------------------------------------- */

enum { MOST_TOKENS = 64, MOST_SUMS = 2 * MOST_TOKENS + LANES };

struct matrix { /* y = x Wᵀ + b: weight [rows, columns], bias [rows] or NULL */
    const void *weight, *bias;
    int64_t rows;
};

/* Rows `row` and, if it exists below `last`, `row` + 1 of the product with x [tokens, columns]:
 * sums[r][t]. Returns how many rows. */
size_t product_f32(const struct matrix *m, size_t row, size_t last, const void *x, size_t columns,
                   size_t tokens, float *sums);
size_t product_bf16(const struct matrix *m, size_t row, size_t last, const void *x, size_t columns,
                    size_t tokens, float *sums);

#define PRODUCT(bf16) ((bf16) ? product_bf16 : product_f32)

/* out[t, row + r] = sums[r][t] for `rows` rows, rounded; or out += that, rounded before it is added.
 * out: [tokens, width]. The sums of the last row are followed by LANES floats that may be read. */
INLINE void spread(void *out, size_t width, size_t row, size_t rows, const float *sums,
                   size_t tokens, int add, int bf16) {
    if (!bf16 || rows < 2) {
        for (size_t r = 0; r < rows; r++)
            for (size_t t = 0; t < tokens; t++) {
                size_t i = t * width + row + r;
                float y = sums[r * tokens + t];
                put(out, i, add ? get(out, i, bf16) + rounded(splat(y), bf16)[0] : y, bf16);
            }
        return;
    }
    for (size_t t = 0; t < tokens; t += LANES) { /* both outputs of a token are one word */
        char *to = (char *)at(out, t * width + row, 1);
        size_t count = tokens - t < LANES ? tokens - t : LANES;
        uint32_t pairs[LANES] = {0};
        vec one, two;
        memcpy(&one, sums + t, sizeof one), memcpy(&two, sums + tokens + t, sizeof two);
        one = rounded(one, 1), two = rounded(two, 1);
        if (add) {
            for (size_t n = 0; n < count; n++) memcpy(pairs + n, to + n * width * 2, 4);
            uvec before;
            memcpy(&before, pairs, sizeof before);
            one = rounded(one + (vec)(before << 16), 1);
            two = rounded(two + (vec)(before & 0xffff0000u), 1);
        }
        uvec both = (uvec)one >> 16 | (uvec)two;
        memcpy(pairs, &both, sizeof both);
        for (size_t n = 0; n < count; n++) memcpy(to + n * width * 2, pairs + n, 4);
    }
}

/* Rows of a matrix that one thread takes at a time: even, and about 32 KiB of weights. */
INLINE size_t grain(size_t columns, int bf16) {
    size_t rows = 32768 / (columns * (bf16 ? 2 : 4));
    return rows < 2 ? 2 : rows & ~(size_t)1;
}

/* out [tokens, m->rows] = x Wᵀ + b, or out += that, rounded before it is added. A phase of a job. */
void multiply(struct job *job, const struct matrix *m, const void *x, size_t columns, size_t tokens,
              void *out, int add, int bf16);

/* Attention of one token per sequence (native_attention.c) ------------------------------------- */

enum { MOST_DIM = 256, MOST_GROUP = 32, TOKENS = 32 };

struct attention {
    int64_t sequences, heads, kv_heads, dim;
    int64_t num_blocks, block_size, block_stride; /* the stride in elements, of [N, 2, S, H, D] */
    int64_t table_width;
    const int64_t *lens; /* [B] cached tokens, the query's own included */
    const int64_t *table; /* [B, M] */
    float scale, soft_cap; /* soft_cap 0: none */
};

/* Whether every length and every block that will be read lies where it must. */
int sound(const struct attention *a);
/* The query heads of KV head h of sequence b: out[g] = softmax(cap(scale q[g]·k)) v over the last
 * `window` tokens (0: all). query and out: [group, D]. Nothing cached: zeros, and nothing is read. */
void attend(const struct attention *a, const void *cache, size_t b, size_t h, size_t window,
            const void *query, void *out, int bf16);

/* Attention of chunks of prompts (native_prefill.c) -------------------------------------------- */

struct prefill {
    struct attention attention; /* lens: cached tokens, the chunk's own included */
    const int64_t *starts; /* [B + 1] first row of each sequence's queries */
    int64_t window; /* 0: all */
};

/* How many units the queries of sequences [first, B) are: pieces of them times KV heads. -1: a
 * sequence has more queries than tokens, or the processor lacks the instructions. */
int64_t prefill_units(const struct prefill *f, size_t first);
/* They attend: a phase of a job, but for the barrier. query, out: [T, Hq, D]. False without memory. */
int prefill_phase(struct job *job, const struct prefill *f, size_t first, const void *query,
                  const void *cache, void *out);

/* A decoder's layers (native_step.c, native_chunks.c) ------------------------------------------ */

struct layer { /* norms: [E], or [D] and NULL without them; cache: the layer's [N, 2, S, H, D] */
    const void *attention_norm, *mlp_norm, *query_norm, *key_norm;
    struct matrix query, key, value, output, gate, up, down;
    void *cache;
    int64_t window;
};

struct step {
    struct attention attention;
    int64_t hidden_size, inner_size, num_layers;
    float eps;
    const float *cos, *sin; /* [P, D / 2] */
    int64_t num_positions;
    const int64_t *positions, *slots; /* [T]; a negative slot: padding, its K and V are not kept */
    void *hidden; /* [T, E] embeddings, replaced by the last layer's result */
};

/* Whether the positions and slots of so many tokens lie where they must. */
int placed(const struct step *s, int64_t tokens);
