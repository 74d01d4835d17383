/* From the last hidden states to logits, and to the most likely token; see native.h. */
#include "native.h"

struct logits_job {
    struct job job;
    struct matrix matrix;
    const void *hidden, *norm;
    char *normed; /* [R, E] */
    float *out;
    size_t columns, rows;
    float eps;
};

INLINE void logits_body(struct job *job, int bf16) {
    struct logits_job *l = (struct logits_job *)job;
    const size_t vocab = l->matrix.rows;
    float sums[MOST_SUMS];
    size_t first, last;
    while (take(job, l->rows, 1, &first, &last)) {
        size_t i = first * l->columns;
        rms_norm(at(l->hidden, i, bf16), l->norm, (char *)at(l->normed, i, bf16), l->columns, l->eps,
                 bf16);
    }
    barrier(job);
    while (take(job, vocab, grain(l->columns, bf16), &first, &last))
        for (size_t row = first; row < last; row += 2) {
            size_t both = PRODUCT(bf16)(&l->matrix, row, last, l->normed, l->columns, l->rows, sums);
            for (size_t i = 0; i < both * l->rows; i += LANES) {
                vec x;
                memcpy(&x, sums + i, sizeof x);
                x = rounded(x, bf16);
                memcpy(sums + i, &x, sizeof x);
            }
            for (size_t r = 0; r < both; r++)
                for (size_t t = 0; t < l->rows; t++) l->out[t * vocab + row + r] = sums[r * l->rows + t];
        }
    barrier(job);
}

static void logits_f32(struct job *job) { logits_body(job, 0); }
static void logits_bf16(struct job *job) { logits_body(job, 1); }

/* out [rows, vocab] float32 = norm(hidden [rows, columns]) · weight [vocab, columns]ᵀ, rounded to the
 * type of the weights; rows ≤ MOST_TOKENS. False without memory. */
PUBLIC int pdserve_logits(int bf16, const void *hidden, const void *norm, float eps,
                          const void *weight, float *out, int64_t rows, int64_t vocab,
                          int64_t columns, int threads) {
    char *normed = malloc(rows * columns * 4);
    if (!normed) return 0;
    struct logits_job l = {.job.body = bf16 ? logits_bf16 : logits_f32, .matrix = {weight, NULL, vocab},
                           .hidden = hidden, .norm = norm, .normed = normed, .out = out,
                           .columns = columns, .rows = rows, .eps = eps};
    run(&l.job, threads);
    free(normed);
    return 1;
}

/* The first largest of each row of logits [rows, vocab], or its first NaN. */
PUBLIC void pdserve_greedy(const float *logits, int64_t rows, int64_t vocab, int64_t *out) {
    for (int64_t r = 0; r < rows; r++, logits += vocab) {
        vec tops = splat(-INFINITY);
        ivec odd = {0}, where = {0};
        int64_t i = 0, found = vocab;
        for (; i + LANES <= vocab; i += LANES) {
            vec x;
            memcpy(&x, logits + i, sizeof x);
            ivec higher = x > tops;
            tops = choose(higher, x, tops);
            where = (higher & (int32_t)i) | (~higher & where);
            odd |= x != x;
        }
        float top = -INFINITY;
        int none = 0;
        for (int n = 0; n < LANES && i; n++) {
            int64_t place = where[n] + n;
            none |= odd[n];
            if (tops[n] > top || (tops[n] == top && place < found)) top = tops[n], found = place;
        }
        for (; i < vocab; i++) {
            none |= logits[i] != logits[i];
            if (logits[i] > top) top = logits[i], found = i;
        }
        if (none)
            for (found = 0; logits[found] == logits[found];) found++;
        out[r] = found < vocab ? found : 0;
    }
}
