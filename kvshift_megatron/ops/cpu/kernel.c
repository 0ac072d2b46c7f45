// The shift of keys and values on a CPU, and its backward pass, as called by kernel.py.
//
// Memory-bound: every input is read once and every output is written once, bypassing the caches if
// they could not hold it anyway. Requires GCC's vector extensions (clang has them) and a
// little-endian machine. OpenMP is not linked: the caller passes the entry points of the runtime
// that torch has already loaded, so that both share its threads.

#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
enum { BYTES = 64 };
#elif defined(__AVX2__)
enum { BYTES = 32 };
#else
enum { BYTES = 16 };
#endif
enum { LANES = BYTES / 4, MAX_WINDOW = 8 };
// Prefetch distance in bytes: processors do not detect a stream of keys with queries in between.
enum { AHEAD = 2048 };

typedef float Floats __attribute__((vector_size(BYTES)));
typedef uint32_t Bits __attribute__((vector_size(BYTES)));

// One register of a tensor, as fp32. A shift and a mask split bf16 into even and odd elements; fp32
// uses `even` only.
typedef struct {
    Floats even, odd;
} Pack;

// Keys or values. Strides are in bytes, for tokens, samples and groups; the elements of a head are
// contiguous. Outputs are contiguous.
typedef struct {
    const char *x;
    const char *dy;      // gradient of the output; NULL for the forward pass
    char *out;           // the shifted tensor, or the gradient of x
    const float *taps;   // [window, groups], current token first
    float *dtaps;        // gradient of the taps, [window, groups]
    double *partial;     // [blocks, window, groups]: the taps' gradients per block
    int64_t x_strides[3], dy_strides[3];
} Side;

typedef void Parallel(void (*)(void *), void *, unsigned threads, unsigned flags);

typedef struct {
    Side sides[2];
    const int64_t *position;  // [tokens]: earlier tokens of the same document; or NULL
    int64_t count;            // number of sides
    int64_t tokens, samples, groups, head, window;
    int64_t block;            // tokens per fp32 sum of the taps' gradients
    int64_t is_bf16;
    int64_t past_caches;      // whether to bypass the caches when writing
    int64_t threads;
    char *sums;               // backward: [threads, window, groups, LANES or more] floats
    Parallel *parallel;       // GOMP_parallel
    int (*thread)(void);      // omp_get_thread_num
    int (*team)(void);        // omp_get_num_threads
} Call;

// --- loads and stores ---

INLINE Pack load(const int is_bf16, const char *from) {
    Bits bits;
    memcpy(&bits, from, BYTES);
    Pack pack = {(Floats)bits, (Floats)bits};
    if (is_bf16) {
        pack.even = (Floats)(bits << 16);
        pack.odd = (Floats)(bits & 0xffff0000u);
    }
    return pack;
}

// Round to the nearest bf16, ties to even, in the upper half; any NaN becomes the quiet NaN.
INLINE Bits rounded(Floats value) {
    Bits bits = (Bits)value, is_nan = (Bits)(value != value);
    Bits nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
    return (nearest & ~is_nan) | (is_nan & 0x7fc00000u);
}

INLINE void store(const int is_bf16, const int past_caches, char *to, Pack pack) {
    Bits bits = (Bits)pack.even;
    if (is_bf16) bits = (rounded(pack.even) >> 16) | (rounded(pack.odd) & 0xffff0000u);
    if (past_caches) {
#if defined(__AVX512F__)
        _mm512_stream_si512((__m512i *)to, (__m512i)bits);
        return;
#elif defined(__AVX2__)
        _mm256_stream_si256((__m256i *)to, (__m256i)bits);
        return;
#elif defined(__SSE2__)
        _mm_stream_si128((__m128i *)to, (__m128i)bits);
        return;
#endif
    }
    memcpy(to, &bits, BYTES);
}

INLINE float load_one(const int is_bf16, const char *from) {
    uint32_t bits = 0;
    float value;
    if (is_bf16) {
        uint16_t half;
        memcpy(&half, from, 2);
        bits = (uint32_t)half << 16;
    } else {
        memcpy(&bits, from, 4);
    }
    memcpy(&value, &bits, 4);
    return value;
}

INLINE void store_one(const int is_bf16, char *to, float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (is_bf16) {
        uint32_t nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
        uint16_t half = value != value ? 0x7fc0u : (uint16_t)(nearest >> 16);
        memcpy(to, &half, 2);
    } else {
        memcpy(to, &bits, 4);
    }
}

// --- one token and one block of tokens, of keys or values ---

// The tokens that a token is mixed with: their offsets in bytes, taps [groups] and sums.
typedef struct {
    int64_t terms;
    int64_t offset[MAX_WINDOW];
    const float *taps[MAX_WINDOW];
    Floats *sums[MAX_WINDOW];
} Terms;

// out_i = sum_j taps[j] from_j for token i and, in the backward pass, sums[j] += x_i from_j. The
// products are added in the order of the definition, so that the rounding is the same.
INLINE void mix(const int is_bf16, const int past_caches, const int backward, const int count,
                const Call *call, const Side *side, int64_t i, const Terms *terms) {
    const int size = is_bf16 ? 2 : 4;
    const int64_t bytes = call->head * size, ahead = (AHEAD + bytes - 1) / bytes;
    const char *source = backward ? side->dy : side->x;
    const int64_t *strides = backward ? side->dy_strides : side->x_strides;
    char *to = side->out + i * call->samples * call->groups * bytes;
    for (int64_t b = 0; b < call->samples; b++) {
        for (int64_t g = 0; g < call->groups; g++, to += bytes) {
            const char *from[MAX_WINDOW], *x = NULL, *x_soon = NULL;
            const int64_t at_head = b * strides[1] + g * strides[2];
            float taps[MAX_WINDOW];
            Floats total[MAX_WINDOW];
#pragma GCC unroll 8
            for (int j = 0; j < count; j++) {
                from[j] = source + terms->offset[j] + at_head;
                taps[j] = terms->taps[j][g];
                if (backward) total[j] = terms->sums[j][g];
            }
            if (backward) {
                const int64_t *own = side->x_strides;
                x = side->x + i * own[0] + b * own[1] + g * own[2];
                x_soon = x + ahead * own[2];
            }
            // The next data that will be read for the first time.
            const int64_t newest = terms->offset[backward ? count - 1 : 0];
            const char *soon = source + newest + at_head + ahead * strides[2];

            int64_t at = 0;
            for (; at + BYTES <= bytes; at += BYTES) {
                Pack result = {{0}, {0}}, own = {{0}, {0}};
                __builtin_prefetch(soon + at);
                if (backward) {
                    __builtin_prefetch(x_soon + at);
                    own = load(is_bf16, x + at);
                }
#pragma GCC unroll 8
                for (int j = 0; j < count; j++) {
                    Pack other = load(is_bf16, from[j] + at);
                    Floats even = taps[j] * other.even, odd = taps[j] * other.odd;
                    result.even = j ? result.even + even : even;
                    if (is_bf16) result.odd = j ? result.odd + odd : odd;
                    if (backward) total[j] += own.even * other.even;
                    if (backward && is_bf16) total[j] += own.odd * other.odd;
                }
                store(is_bf16, past_caches, to + at, result);
            }
            for (; at < bytes; at += size) {
                float result = 0, own = backward ? load_one(is_bf16, x + at) : 0;
                for (int j = 0; j < count; j++) {
                    float other = load_one(is_bf16, from[j] + at);
                    result = j ? result + taps[j] * other : taps[j] * other;
                    if (backward) total[j][0] += own * other;
                }
                store_one(is_bf16, to + at, result);
            }
#pragma GCC unroll 8
            for (int j = 0; j < count; j++) {
                if (backward) terms->sums[j][g] = total[j];
            }
        }
    }
}

// Forward: out_i = sum_j taps[j] x_{i-j}. Backward: out_i = sum_j taps[j] dy_{i+j}, and the
// gradient of taps[j] is sum_i x_i dy_{i+j}. Both take tokens of the same document only: the others
// are skipped, not multiplied by zero, as they may be Inf or NaN.
INLINE void shift_block(const int is_bf16, const int past_caches, const int backward,
                        const Call *call, const Side *side, Floats *sums, int64_t index) {
    const int64_t window = call->window, groups = call->groups;
    const int64_t stride = backward ? side->dy_strides[0] : side->x_strides[0];
    int64_t start = index * call->block, end = start + call->block;
    if (end > call->tokens) end = call->tokens;

    if (backward) memset(sums, 0, window * groups * sizeof *sums);

    for (int64_t i = start; i < end; i++) {
        Terms terms = {0};
        for (int64_t j = 0; j < window; j++) {
            int64_t other = backward ? i + j : i - j, later = backward ? i + j : i;
            if (other < 0 || other >= call->tokens) continue;
            if (j && call->position && call->position[later] < j) continue;
            terms.offset[terms.terms] = other * stride;
            terms.taps[terms.terms] = side->taps + j * groups;
            terms.sums[terms.terms++] = backward ? sums + j * groups : NULL;
        }
#define MIX(count) mix(is_bf16, past_caches, backward, count, call, side, i, &terms)
        switch (terms.terms) {
            case 1: MIX(1); break;
            case 2: MIX(2); break;
            case 3: MIX(3); break;
            case 4: MIX(4); break;
            default: MIX(terms.terms);
        }
#undef MIX
    }
    if (backward) {
        for (int64_t k = 0; k < window * groups; k++) {
            double total = 0;
            for (int lane = 0; lane < LANES; lane++) total += sums[k][lane];
            side->partial[index * window * groups + k] = total;
        }
    }
}

// --- the whole call ---

static int64_t block_count(const Call *call) {
    return (call->tokens + call->block - 1) / call->block;
}

INLINE void shift_blocks(const int is_bf16, const int past_caches, const int backward,
                         const Call *call, Floats *sums, int64_t first, int64_t last) {
    for (int64_t index = first; index < last; index++) {
        for (int64_t n = 0; n < call->count; n++) {
            shift_block(is_bf16, past_caches, backward, call, &call->sides[n], sums, index);
        }
    }
}

// One thread's share: consecutive tokens, the same ones of keys and values.
static void work(void *argument) {
    const Call *call = argument;
    const int64_t blocks = block_count(call);
    int64_t thread = 0, team = 1;
    if (call->threads > 1) thread = call->thread(), team = call->team();
    const int64_t first = blocks * thread / team, last = blocks * (thread + 1) / team;
    const int backward = call->sides[0].dy != NULL;
    Floats *sums = backward ? (Floats *)call->sums + thread * call->window * call->groups : NULL;
    switch ((call->is_bf16 ? 4 : 0) + (call->past_caches ? 2 : 0) + backward) {
        case 0: shift_blocks(0, 0, 0, call, sums, first, last); break;
        case 1: shift_blocks(0, 0, 1, call, sums, first, last); break;
        case 2: shift_blocks(0, 1, 0, call, sums, first, last); break;
        case 3: shift_blocks(0, 1, 1, call, sums, first, last); break;
        case 4: shift_blocks(1, 0, 0, call, sums, first, last); break;
        case 5: shift_blocks(1, 0, 1, call, sums, first, last); break;
        case 6: shift_blocks(1, 1, 0, call, sums, first, last); break;
        case 7: shift_blocks(1, 1, 1, call, sums, first, last); break;
    }
#if defined(__SSE2__)
    if (call->past_caches) _mm_sfence();
#endif
}

void kvshift_run(Call *call) {
    if (call->threads > 1) {
        call->parallel(work, call, (unsigned)call->threads, 0);
    } else {
        work(call);
    }
    // In the order of the blocks: the sums do not depend on the number of threads.
    for (int64_t n = 0; n < call->count && call->sides[n].dy; n++) {
        const Side *side = &call->sides[n];
        const int64_t size = call->window * call->groups, blocks = block_count(call);
        for (int64_t k = 0; k < size; k++) {
            double total = 0;
            for (int64_t index = 0; index < blocks; index++) {
                total += side->partial[index * size + k];
            }
            side->dtaps[k] = (float)total;
        }
    }
}
