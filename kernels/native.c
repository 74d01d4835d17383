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
#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

/* Vectors of floats, as wide as the machine's registers ------------------------------------------ */

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

/* Threads ----------------------------------------------------------------------------------------
 *
 * One team for the process: the caller and helpers that wait for the next round, first spinning,
 * then asleep. All run the same body; its phases share out units and end in a barrier. A caller
 * that finds the team busy computes alone.
 */
enum { START_SPINS = 8000, BARRIER_SPINS = 4000, MOST_THREADS = 256 };

struct job {
    void (*body)(struct job *);
    _Alignas(64) atomic_size_t next; /* first unit of the phase that nobody has taken */
    _Alignas(64) atomic_int arrived;
    atomic_uint turn;
    int members;
};

static struct {
    pthread_mutex_t busy;
    int helpers;
    struct job *job;
    _Alignas(64) atomic_uint round;
    atomic_int asleep;
} team = {.busy = PTHREAD_MUTEX_INITIALIZER};

INLINE void pause_briefly(void) {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

static void barrier(struct job *job) {
    if (job->members == 1) {
        atomic_store(&job->next, 0);
        return;
    }
    unsigned turn = atomic_load(&job->turn);
    if (atomic_fetch_add(&job->arrived, 1) + 1 == job->members) {
        atomic_store(&job->arrived, 0);
        atomic_store(&job->next, 0);
        atomic_store(&job->turn, turn + 1);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&job->turn, memory_order_acquire) == turn; spins++) {
        if (spins < BARRIER_SPINS) pause_briefly();
        else sched_yield();
    }
}

/* The next `grain` units of `units`, from *first up to *last; false when there are none left. */
INLINE int take(struct job *job, size_t units, size_t grain, size_t *first, size_t *last) {
    *first = atomic_fetch_add_explicit(&job->next, grain, memory_order_relaxed);
    *last = *first + grain < units ? *first + grain : units;
    return *first < units;
}

static void *help(void *start) {
    unsigned seen = (unsigned)(uintptr_t)start;
    for (;;) {
        int spins = 0;
        while (atomic_load_explicit(&team.round, memory_order_acquire) == seen) {
            if (++spins < START_SPINS) {
                pause_briefly();
                continue;
            }
            atomic_fetch_add(&team.asleep, 1);
            syscall(SYS_futex, &team.round, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
            atomic_fetch_sub(&team.asleep, 1);
        }
        seen++;
        /* The job lies on the caller's stack until all have passed its last barrier; what is left
         * of that barrier for us is a look at `turn`, so the caller waits for `arrived` as well. */
        struct job *job = team.job;
        job->body(job);
        atomic_fetch_add(&job->arrived, 1);
    }
    return NULL;
}

static void forget_helpers(void) { /* in a forked child: threads are not inherited */
    team.helpers = 0;
    team.asleep = 0;
    pthread_mutex_init(&team.busy, NULL);
}

static void hire(int wanted) {
    static int hooked;
    if (!hooked++) pthread_atfork(NULL, NULL, forget_helpers);
    for (; team.helpers < wanted; team.helpers++) {
        pthread_t thread;
        void *start = (void *)(uintptr_t)atomic_load(&team.round);
        if (pthread_create(&thread, NULL, help, start)) return;
        pthread_detach(thread);
    }
}

/* Run body(job) on `threads` threads, this one included. A body must end with a barrier. */
static void run(struct job *job, int threads) {
    job->members = 1;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads < 2 || pthread_mutex_trylock(&team.busy)) {
        job->body(job);
        return;
    }
    hire(threads - 1);
    job->members = team.helpers + 1; /* helpers that exist take part in every round */
    team.job = job;
    atomic_fetch_add(&team.round, 1);
    if (atomic_load(&team.asleep))
        syscall(SYS_futex, &team.round, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
    job->body(job);
    for (int spins = 0; atomic_load(&job->arrived) < team.helpers; spins++) {
        if (spins < BARRIER_SPINS) pause_briefly();
        else sched_yield();
    }
    pthread_mutex_unlock(&team.busy);
}

/* Products --------------------------------------------------------------------------------------- */

#if defined(__AVX512BF16__)
#define STEP(bf16) ((bf16) ? 32 : LANES)
#else
#define STEP(bf16) LANES
#endif

INLINE vec multiply_add(vec total, const char *w, const char *x, size_t left, int bf16) {
#if defined(__AVX512BF16__)
    if (bf16) {
        __m512i a = {0}, b = {0};
        memcpy(&a, w, left < 32 ? 2 * left : 64);
        memcpy(&b, x, left < 32 ? 2 * left : 64);
        return (vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b);
    }
#endif
    return total + load(w, 0, left, bf16) * load(x, 0, left, bf16);
}

#ifndef AHEAD
#define AHEAD 4096 /* bytes of weights to ask for before they are needed */
#endif

/* sums[r][t] = w[r] · x[t] for `rows` rows of w and `count` rows of x, both constants. */
INLINE void tile(const char *w, const char *x, size_t columns, int rows, int count, float *sums,
                 size_t stride, int bf16) {
    const size_t row = columns * (bf16 ? 2 : 4), step = STEP(bf16);
    vec totals[2][ROWS] = {0};
    size_t i = 0;
    for (; i + step <= columns; i += step, w += step * (bf16 ? 2 : 4), x += step * (bf16 ? 2 : 4)) {
#pragma GCC unroll 2
        for (int r = 0; r < rows; r++) {
            __builtin_prefetch(w + r * row + AHEAD);
#pragma GCC unroll 8
            for (int t = 0; t < count; t++)
                totals[r][t] = multiply_add(totals[r][t], w + r * row, x + t * row, step, bf16);
        }
    }
    if (i < columns)
        for (int r = 0; r < rows; r++)
            for (int t = 0; t < count; t++)
                totals[r][t] = multiply_add(totals[r][t], w + r * row, x + t * row, columns - i, bf16);
#pragma GCC unroll 2
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int t = 0; t < count; t++) sums[r * stride + t] = sum(totals[r][t]);
}

INLINE void tiles(const char *w, const char *x, size_t columns, int rows, size_t tokens, float *sums,
                  int bf16) {
    for (size_t t = 0; t < tokens; t += ROWS) {
        const char *from = at(x, t * columns, bf16);
        float *to = sums + t;
        switch (tokens - t) {
        case 1: tile(w, from, columns, rows, 1, to, tokens, bf16); break;
        case 2: tile(w, from, columns, rows, 2, to, tokens, bf16); break;
        case 3: tile(w, from, columns, rows, 3, to, tokens, bf16); break;
#if ROWS == 8
        case 4: tile(w, from, columns, rows, 4, to, tokens, bf16); break;
        case 5: tile(w, from, columns, rows, 5, to, tokens, bf16); break;
        case 6: tile(w, from, columns, rows, 6, to, tokens, bf16); break;
        case 7: tile(w, from, columns, rows, 7, to, tokens, bf16); break;
#endif
        default: tile(w, from, columns, rows, ROWS, to, tokens, bf16);
        }
    }
}

enum { MOST_TOKENS = 64 };

struct matrix { /* y = x Wᵀ + b: weight [rows, columns], bias [rows] or NULL */
    const void *weight, *bias;
    int64_t rows;
};

/* Rows `row` and, if it exists below `last`, `row` + 1 of the product with x [tokens, columns]:
 * sums[r][t]. Returns how many rows. */
INLINE size_t product(const struct matrix *m, size_t row, size_t last, const void *x,
                      size_t columns, size_t tokens, float *sums, int bf16) {
    const char *w = at(m->weight, row * columns, bf16);
    size_t rows = row + 1 < last ? 2 : 1;
    if (rows == 2) tiles(w, x, columns, 2, tokens, sums, bf16);
    else tiles(w, x, columns, 1, tokens, sums, bf16);
    if (m->bias)
        for (size_t r = 0; r < rows; r++)
            for (size_t t = 0; t < tokens; t++) sums[r * tokens + t] += get(m->bias, row + r, bf16);
    return rows;
}

static size_t product_f32(const struct matrix *m, size_t row, size_t last, const void *x,
                          size_t columns, size_t tokens, float *sums) {
    return product(m, row, last, x, columns, tokens, sums, 0);
}

static size_t product_bf16(const struct matrix *m, size_t row, size_t last, const void *x,
                           size_t columns, size_t tokens, float *sums) {
    return product(m, row, last, x, columns, tokens, sums, 1);
}

#define PRODUCT(bf16) ((bf16) ? product_bf16 : product_f32)

/* Rows of a matrix that one thread takes at a time: even, and about 32 KiB of weights. */
INLINE size_t grain(size_t columns, int bf16) {
    size_t rows = 32768 / (columns * (bf16 ? 2 : 4));
    return rows < 2 ? 2 : rows & ~(size_t)1;
}

/* out [tokens, m->rows] = x Wᵀ + b, or out += that, rounded before it is added. */
INLINE void multiply(struct job *job, const struct matrix *m, const void *x, size_t columns,
                     size_t tokens, void *out, int add, int bf16) {
    float sums[2 * MOST_TOKENS];
    size_t first, last;
    while (take(job, m->rows, grain(columns, bf16), &first, &last))
        for (size_t row = first; row < last; row += 2) {
            size_t rows = PRODUCT(bf16)(m, row, last, x, columns, tokens, sums);
            for (size_t r = 0; r < rows; r++)
                for (size_t t = 0; t < tokens; t++) {
                    size_t i = t * m->rows + row + r;
                    float y = sums[r * tokens + t];
                    put(out, i, add ? get(out, i, bf16) + rounded(splat(y), bf16)[0] : y, bf16);
                }
        }
    barrier(job);
}

struct linear_job {
    struct job job;
    struct matrix matrix;
    const void *x;
    void *out;
    size_t columns, tokens;
};

static void linear_f32(struct job *job) {
    struct linear_job *l = (struct linear_job *)job;
    multiply(job, &l->matrix, l->x, l->columns, l->tokens, l->out, 0, 0);
}

static void linear_bf16(struct job *job) {
    struct linear_job *l = (struct linear_job *)job;
    multiply(job, &l->matrix, l->x, l->columns, l->tokens, l->out, 0, 1);
}

/* out [tokens, rows] = x [tokens, columns] · weight [rows, columns]ᵀ + bias; tokens ≤ MOST_TOKENS. */
void pdserve_linear(int bf16, const void *x, const void *weight, const void *bias, void *out,
                    int64_t tokens, int64_t rows, int64_t columns, int threads) {
    struct linear_job l = {.job.body = bf16 ? linear_bf16 : linear_f32,
                           .matrix = {weight, bias, rows},
                           .x = x, .out = out, .columns = columns, .tokens = tokens};
    run(&l.job, threads);
}

/* Attention of one token per sequence ------------------------------------------------------------ */

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
static int sound(const struct attention *a) {
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
INLINE void attend(const struct attention *a, const void *cache, size_t b, size_t h, size_t window,
                   const void *query, void *out, int bf16) {
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

/* query, out: [B, Hq, D] contiguous; window 0: none; a length of 0 gives zeros. False, and nothing done, for lengths or
 * blocks outside the table or the cache. */
int pdserve_attention(int bf16, const struct attention *a, const void *query, const void *cache,
                      void *out, int64_t window, int threads) {
    if (!sound(a)) return 0;
    struct attention_job j = {.job.body = bf16 ? attention_bf16 : attention_f32,
                              .a = a, .query = query, .cache = cache, .out = out, .window = window};
    run(&j.job, threads);
    return 1;
}

/* A whole decode step ---------------------------------------------------------------------------- */

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

struct step_job {
    struct job job;
    const struct step *step;
    const struct layer *layers;
    char *normed, *query, *key, *value, *mixed, *inner; /* [T, ...] between the phases */
};

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
    float sums[2 * MOST_TOKENS];
    size_t first, last, rows = l->query.rows + l->key.rows + l->value.rows;
    while (take(&j->job, rows, grain(columns, bf16), &first, &last))
        for (size_t row = first, done; row < last; row += done) {
            size_t n = 0, local = row, end = last - row;
            for (; local >= (size_t)matrices[n]->rows; n++) local -= matrices[n]->rows;
            const struct matrix *m = matrices[n];
            end = local + end < (size_t)m->rows ? local + end : (size_t)m->rows;
            done = PRODUCT(bf16)(m, local, end, j->normed, columns, tokens, sums);
            for (size_t r = 0; r < done; r++)
                for (size_t t = 0; t < tokens; t++)
                    put(outs[n], t * m->rows + local + r, sums[r * tokens + t], bf16);
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
    float gate[2 * MOST_TOKENS], up[2 * MOST_TOKENS];
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
            for (size_t r = 0; r < rows; r++)
                for (size_t t = 0; t < tokens; t++)
                    put(j->inner, t * inner + row + r, gate[r * tokens + t], bf16);
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

/* One token of each sequence through all layers: `hidden` is replaced, K and V are stored. False,
 * and nothing done, for lengths, blocks, slots or positions out of range, or without memory. */
int pdserve_decode(int bf16, const struct step *s, const struct layer *layers, int threads) {
    const struct attention *a = &s->attention;
    if (!sound(a) || a->sequences > MOST_TOKENS) return 0;
    for (int64_t t = 0; t < a->sequences; t++)
        if (s->positions[t] < 0 || s->positions[t] >= s->num_positions ||
            s->slots[t] >= a->num_blocks * a->block_size)
            return 0;
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
