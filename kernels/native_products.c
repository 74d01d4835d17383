/* Products of few rows with weights as they lie in the checkpoint; see native.h. */
#include "native.h"

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
#define AHEAD 8192 /* bytes of weights to ask for before they are needed */
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
#if LANES == 2 * ROWS
    if (rows * count > 4) { /* all of them at once */
        vec all = sums_of(totals[0]);
        for (int r = 0; r < rows; r++)
            memcpy(sums + r * stride, (float *)&all + r * ROWS, count * sizeof *sums);
        return;
    }
#endif
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

size_t product_f32(const struct matrix *m, size_t row, size_t last, const void *x,
                          size_t columns, size_t tokens, float *sums) {
    return product(m, row, last, x, columns, tokens, sums, 0);
}

size_t product_bf16(const struct matrix *m, size_t row, size_t last, const void *x,
                           size_t columns, size_t tokens, float *sums) {
    return product(m, row, last, x, columns, tokens, sums, 1);
}

INLINE void multiply_as(struct job *job, const struct matrix *m, const void *x, size_t columns,
                        size_t tokens, void *out, int add, int bf16) {
    float sums[MOST_SUMS];
    size_t first, last;
    while (take(job, m->rows, grain(columns, bf16), &first, &last))
        for (size_t row = first; row < last; row += 2) {
            size_t rows = PRODUCT(bf16)(m, row, last, x, columns, tokens, sums);
            spread(out, m->rows, row, rows, sums, tokens, add, bf16);
        }
    barrier(job);
}

void multiply(struct job *job, const struct matrix *m, const void *x, size_t columns, size_t tokens,
              void *out, int add, int bf16) {
    if (bf16) multiply_as(job, m, x, columns, tokens, out, add, 1);
    else multiply_as(job, m, x, columns, tokens, out, add, 0);
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
PUBLIC void pdserve_linear(int bf16, const void *x, const void *weight, const void *bias, void *out,
                    int64_t tokens, int64_t rows, int64_t columns, int threads) {
    struct linear_job l = {.job.body = bf16 ? linear_bf16 : linear_f32,
                           .matrix = {weight, bias, rows},
                           .x = x, .out = out, .columns = columns, .tokens = tokens};
    run(&l.job, threads);
}
