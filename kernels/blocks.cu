// Copies of whole KV blocks between the pool and one contiguous buffer, in one launch.
//
// What is copied has no meaning here: both sides are words of 1 to 16 bytes. A block is
// [lots, size, width] words in the pool, of which the columns [first, first + taken) travel; in the
// buffer it is [lots, other, taken]. See cuda_blocks.py, which launches this, and blocks.py.
//
// Compiled three times: by NVRTC where it runs (no headers there), by nvcc in the tests, and as C++
// for the CPU, where `walk` takes the place of the grid, so that the tests can check every index.

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define BOTH __host__ __device__
#else
#define BOTH
#endif

typedef long long Int;

struct Shape {
    unsigned tokens;  // of all blocks that travel
    unsigned lots, size, other, width, first, taken;
};

// Where a word of the buffer lies.
struct Place {
    Int pool, buffer;  // in words
    bool there;        // false: past the last token, zero in the buffer, nothing in the pool
};

// Divisions are what this could be bound by instead of memory: whole blocks need none, slices of
// heads one, other block sizes three, all of 32 bits. The branches are the same in every thread.
template <typename Index>
BOTH Place place_of(const Shape &shape, const Index *ids, Int block, unsigned word) {
    Place place;
    place.buffer = block * ((Int)shape.lots * shape.other * shape.taken) + word;
    place.there = true;
    const bool whole = shape.width == shape.taken;
    if (whole && shape.size == shape.other) {
        place.pool = ids[block] * ((Int)shape.lots * shape.size * shape.width) + word;
        return place;
    }
    const unsigned row = word / shape.taken, column = word - row * shape.taken;
    Int in_pool;
    if (shape.size == shape.other) {
        in_pool = ids[block] * ((Int)shape.lots * shape.size) + row;
    } else {
        const unsigned lot = row / shape.other;
        const unsigned token = (unsigned)block * shape.other + (row - lot * shape.other);
        const unsigned entry = token / shape.size;
        place.there = token < shape.tokens;
        const Int source = place.there ? (Int)ids[entry] : 0;
        in_pool = (source * shape.lots + lot) * shape.size + (token - entry * shape.size);
    }
    place.pool = in_pool * shape.width + shape.first + column;
    return place;
}

BOTH inline unsigned words_per_block(const Shape &shape) {
    return shape.lots * shape.other * shape.taken;
}

const unsigned THREADS = 256;
const unsigned EACH = 4;  // words of a thread: as many reads are on their way before the first write
const unsigned TILE = THREADS * EACH;

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)

template <typename Word, typename Index, bool GATHERS>
__device__ void copy(Word *pool, Word *buffer, const Index *ids, const Shape &shape) {
    const unsigned begin = blockIdx.y * TILE + threadIdx.x, end = words_per_block(shape);
    Place places[EACH];
    Word words[EACH];
#pragma unroll
    for (unsigned i = 0; i < EACH; i++) {
        const unsigned word = begin + i * THREADS;
        if (word >= end) break;
        places[i] = place_of(shape, ids, blockIdx.x, word);
        words[i] = Word();
        if (places[i].there) {
            words[i] = GATHERS ? pool[places[i].pool] : buffer[places[i].buffer];
        }
    }
#pragma unroll
    for (unsigned i = 0; i < EACH; i++) {
        if (begin + i * THREADS >= end) break;
        if (GATHERS) {
            buffer[places[i].buffer] = words[i];
        } else if (places[i].there) {
            pool[places[i].pool] = words[i];
        }
    }
}

#define KERNEL(NAME, WORD, INDEX, GATHERS)                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS)                                        \
        NAME(WORD *pool, WORD *buffer, const INDEX *ids, Int tokens, Int lots, Int size,         \
             Int other, Int width, Int first, Int taken) {                                       \
        const Shape shape = {(unsigned)tokens, (unsigned)lots,  (unsigned)size, (unsigned)other, \
                             (unsigned)width,  (unsigned)first, (unsigned)taken};                \
        copy<WORD, INDEX, GATHERS>(pool, buffer, ids, shape);                                    \
    }
#define KERNELS(BYTES, WORD)                             \
    KERNEL(gather_##BYTES##_int32, WORD, int, true)      \
    KERNEL(gather_##BYTES##_int64, WORD, Int, true)      \
    KERNEL(scatter_##BYTES##_int32, WORD, int, false)    \
    KERNEL(scatter_##BYTES##_int64, WORD, Int, false)

KERNELS(16, uint4)
KERNELS(8, uint2)
KERNELS(4, unsigned)
KERNELS(2, unsigned short)
KERNELS(1, unsigned char)

#else

// For each word of `blocks` blocks: its place in the buffer, and in the pool, or -1.
extern "C" void walk(const Int *ids, Int blocks, Int tokens, const unsigned *shape, Int *result) {
    const Shape s = {(unsigned)tokens, shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]};
    for (Int block = 0; block < blocks; block++) {
        for (unsigned word = 0; word < words_per_block(s); word++) {
            const Place place = place_of(s, ids, block, word);
            *result++ = place.buffer;
            *result++ = place.there ? place.pool : -1;
        }
    }
}

#endif
