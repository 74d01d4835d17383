/* Checksums of blocks, and copying blocks with the checksum of what was copied, in one pass.

   XXH3-64 with the default secret and seed 0 for pieces of more than 240 bytes, after the published
   specification of xxHash: eight lanes take 64 bytes (a stripe) at a time and are scrambled after
   16 stripes. What is stored comes out of the registers that are summed, so a checksum is that of
   the bytes in the target even if the source changes meanwhile. */

#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define PUBLIC __attribute__((visibility("default"))) /* called from digest.py */

enum { STRIPE = 64, LANES = 8, STRIPES = 16, SECRET_BYTES = 192, SHORTEST = 241 };

/* Bytes that are asked for before their turn, not to be kept. Of 0 to 4096, kept or not, none was
   better on one machine, and 512, kept, on another (bench/LOG.md). */
enum { AHEAD = 2048 };

static const uint8_t secret[SECRET_BYTES] __attribute__((aligned(64))) = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

#define P32_1 0x9E3779B1u
#define P32_2 0x85EBCA77u
#define P32_3 0xC2B2AE3Du
#define P64_1 0x9E3779B185EBCA87u
#define P64_2 0xC2B2AE3D27D4EB4Fu
#define P64_3 0x165667B19E3779F9u
#define P64_4 0x85EBCA77C2B2AE63u
#define P64_5 0x27D4EB2F165667C5u

/* How a stripe's bytes leave: not at all, into the cache, or past it (an aligned target). */
enum Store { NOWHERE, CACHED, STREAMED };

#if defined(__AVX512F__)

typedef struct { __m512i lane; } Lanes;

INLINE void
take(Lanes *lanes, const uint8_t *from, const uint8_t *key, uint8_t *to, enum Store store)
{
    __m512i data = _mm512_loadu_si512(from);
    if (store == CACHED) _mm512_storeu_si512(to, data);
    if (store == STREAMED) _mm512_stream_si512((__m512i *)to, data);
    __m512i keyed = _mm512_xor_si512(data, _mm512_loadu_si512(key));
    __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
    __m512i swapped = _mm512_shuffle_epi32(data, _MM_PERM_BADC);
    lanes->lane = _mm512_add_epi64(lanes->lane, _mm512_add_epi64(product, swapped));
}

INLINE void scramble(Lanes *lanes, const uint8_t *key)
{
    __m512i x = lanes->lane;
    x = _mm512_xor_si512(x, _mm512_srli_epi64(x, 47));
    x = _mm512_xor_si512(x, _mm512_loadu_si512(key));
    __m512i prime = _mm512_set1_epi64(P32_1);
    __m512i high = _mm512_slli_epi64(_mm512_mul_epu32(_mm512_srli_epi64(x, 32), prime), 32);
    lanes->lane = _mm512_add_epi64(_mm512_mul_epu32(x, prime), high);
}

#elif defined(__AVX2__)

typedef struct { __m256i lane[2]; } Lanes;

INLINE void
take(Lanes *lanes, const uint8_t *from, const uint8_t *key, uint8_t *to, enum Store store)
{
    for (int i = 0; i < 2; i++) {
        __m256i data = _mm256_loadu_si256((const __m256i *)from + i);
        if (store == CACHED) _mm256_storeu_si256((__m256i *)to + i, data);
        if (store == STREAMED) _mm256_stream_si256((__m256i *)to + i, data);
        __m256i keyed = _mm256_xor_si256(data, _mm256_loadu_si256((const __m256i *)key + i));
        __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
        __m256i swapped = _mm256_shuffle_epi32(data, 0x4E);
        lanes->lane[i] = _mm256_add_epi64(lanes->lane[i], _mm256_add_epi64(product, swapped));
    }
}

INLINE void scramble(Lanes *lanes, const uint8_t *key)
{
    __m256i prime = _mm256_set1_epi64x(P32_1);
    for (int i = 0; i < 2; i++) {
        __m256i x = lanes->lane[i];
        x = _mm256_xor_si256(x, _mm256_srli_epi64(x, 47));
        x = _mm256_xor_si256(x, _mm256_loadu_si256((const __m256i *)key + i));
        __m256i high = _mm256_slli_epi64(_mm256_mul_epu32(_mm256_srli_epi64(x, 32), prime), 32);
        lanes->lane[i] = _mm256_add_epi64(_mm256_mul_epu32(x, prime), high);
    }
}

#else

typedef struct { uint64_t lane[LANES]; } Lanes;

INLINE uint64_t word(const uint8_t *at)
{
    uint64_t x;
    memcpy(&x, at, sizeof x);
    return x;
}

INLINE void
take(Lanes *lanes, const uint8_t *from, const uint8_t *key, uint8_t *to, enum Store store)
{
    uint64_t data[LANES];
    memcpy(data, from, STRIPE);
    if (store != NOWHERE) memcpy(to, data, STRIPE);
    for (int i = 0; i < LANES; i++) {
        uint64_t keyed = data[i] ^ word(key + 8 * i);
        lanes->lane[i] += data[i ^ 1] + (keyed & 0xFFFFFFFFu) * (keyed >> 32);
    }
}

INLINE void scramble(Lanes *lanes, const uint8_t *key)
{
    for (int i = 0; i < LANES; i++) {
        uint64_t x = lanes->lane[i];
        lanes->lane[i] = (x ^ x >> 47 ^ word(key + 8 * i)) * P32_1;
    }
}

#endif

INLINE uint64_t fold(uint64_t a, uint64_t b)
{
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* One piece. `to` is not used if nothing is stored. */
INLINE uint64_t
pass(uint8_t *to, const uint8_t *from, int64_t nbytes, enum Store store)
{
    static const uint64_t first[LANES] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};
    const uint8_t *last = from + nbytes - STRIPE;
    int64_t stripes = (nbytes - 1) / STRIPE;
    Lanes lanes;
    memcpy(&lanes, first, sizeof lanes);
    int64_t done = 0;
    for (; done + STRIPES <= stripes; done += STRIPES) {
        for (int i = 0; i < STRIPES; i++) {
            __builtin_prefetch(from + AHEAD, 0, 0);
            take(&lanes, from, secret + 8 * i, to, store);
            from += STRIPE;
            to += STRIPE;
        }
        scramble(&lanes, secret + SECRET_BYTES - STRIPE);
    }
    for (int i = 0; done < stripes; done++, i++) {
        take(&lanes, from, secret + 8 * i, to, store);
        from += STRIPE;
        to += STRIPE;
    }
    if (store != NOWHERE) { /* the last stripe, too, is summed as it lies in the target */
        int64_t rest = last + STRIPE - from;
        memcpy(to, from, rest);
        last = to + rest - STRIPE;
    }
    take(&lanes, last, secret + SECRET_BYTES - STRIPE - 7, 0, NOWHERE);
    uint64_t lane[LANES], result = (uint64_t)nbytes * P64_1;
    memcpy(lane, &lanes, sizeof lane);
    for (int i = 0; i < LANES; i += 2) {
        uint64_t key[2];
        memcpy(key, secret + 11 + 8 * i, 16);
        result += fold(lane[i] ^ key[0], lane[i + 1] ^ key[1]);
    }
    result = (result ^ result >> 37) * 0x165667919E3779F9u;
    return result ^ result >> 32;
}

static int within(const int64_t *ids, int64_t count, int64_t limit)
{
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= limit) return 0;
    return 1;
}

/* Blocks of `size` bytes: block ids[i] of `base` (which has `limit` of them) → sums[i]. Returns 0,
   having done nothing, if an id lies outside or the blocks are too short. */
PUBLIC int pdserve_digest(const uint8_t *base, int64_t limit, const int64_t *ids, int64_t count,
                          int64_t size, uint64_t *sums)
{
    if (size < SHORTEST || !within(ids, count, limit)) return 0;
    for (int64_t i = 0; i < count; i++) sums[i] = pass(0, base + ids[i] * size, size, NOWHERE);
    return 1;
}

/* The same of blocks that are copied: from_ids[i] of `from` to to_ids[i] of `to`. `streamed`: past
   the caches, for more than they hold. */
PUBLIC int pdserve_copy(const uint8_t *from, int64_t from_limit, const int64_t *from_ids, uint8_t *to,
                        int64_t to_limit, const int64_t *to_ids, int64_t count, int64_t size,
                        int streamed, uint64_t *sums)
{
    if (size < SHORTEST || !within(from_ids, count, from_limit) || !within(to_ids, count, to_limit))
        return 0;
    streamed = streamed && size % STRIPE == 0 && (uintptr_t)to % STRIPE == 0;
    for (int64_t i = 0; i < count; i++) {
        const uint8_t *source = from + from_ids[i] * size;
        uint8_t *target = to + to_ids[i] * size;
        sums[i] = streamed ? pass(target, source, size, STREAMED) : pass(target, source, size, CACHED);
    }
#if defined(__AVX2__)
    if (streamed) _mm_sfence();
#endif
    return 1;
}
