/* Matrix products whose result for one row does not depend on the other rows.

       y[r][n] = sum_k x[r][k] w[k][n],  k in ascending order, one accumulator for each (r, n)

   A block of up to 6 rows by 64 columns keeps its accumulators in registers while k runs; which rows share a block
   changes nothing in any of them. So there is no padding, and decoding, prefill and scoring agree to the bit.

   Weights lie in panels of 64 columns, each [K][64] and contiguous: a product with one row reads memory once, in order.
   Integers and bf16 have their inputs in groups of 4 and 2 (`Matrix.kind`), as the dot-product instructions take them:
       F32    float                      x float
       BF16   pairs of inputs            x rounded to bf16
       INT8   groups of four inputs      x rounded to 8 bits and a scale for each row (model/quant.py, by token)
       INT4   the same, two weights to a byte
   Sums of integers are exact, so these products equal the ones in int64, scaled in fp32. */
#pragma once
#include "vector.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define PANEL 64
/* A block is so many rows by so many vectors of columns that its accumulators fit in the registers. */
#ifdef __AVX512F__
#define ROWS 6
#define VECTORS 4
#elif defined(__AVX2__) || defined(__aarch64__)
#define ROWS 6
#define VECTORS 1
#else
#define ROWS 3
#define VECTORS 1
#endif

#define EACH_ROW _Pragma("GCC unroll 6") for (int r = 0; r < rows; r++)
#define EACH_VECTOR _Pragma("GCC unroll 4") for (int v = 0; v < vectors; v++)

enum { F32, BF16, INT8, INT4 };

typedef struct {
    int32_t kind, inputs, outputs; /* outputs: whole vectors */
    const void *w;
    const float *scale; /* [outputs], integers only */
    const int32_t *bias; /* [outputs], integers only: 128 times the sum of a column's weights (inputs are unsigned) */
} Matrix;

/* Words of 4 bytes in a column of weights. */
INLINE int64_t words_of(const Matrix *m) {
    const int per_word[] = {1, 2, 4, 8};
    return (m->inputs + per_word[m->kind] - 1) / per_word[m->kind];
}

/* --- one block: rows x vectors --------------------------------------------------------------------------------- */

INLINE void block_f32(int rows, int vectors, int inputs, const float *const *x, const float *w, int64_t ldw,
                      float *const *y, int adds) {
    vf acc[ROWS][4];
    EACH_ROW EACH_VECTOR acc[r][v] = adds ? load(y[r] + v * LANES) : (vf){0};
    for (int k = 0; k < inputs; k++, w += ldw) {
        vf b[4];
        EACH_VECTOR b[v] = load(w + v * LANES);
        EACH_ROW {
            float a = x[r][k];
            EACH_VECTOR acc[r][v] += a * b[v];
        }
    }
    EACH_ROW EACH_VECTOR store(y[r] + v * LANES, acc[r][v]);
}

INLINE vf dot_bf16(vf acc, uint32_t a, vi b) {
#ifdef __AVX512BF16__
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
#else
    union { uint32_t bits; float value; } low = {a << 16}, high = {a & 0xffff0000};
    return acc + low.value * (vf)(b << 16) + high.value * (vf)(b & 0xffff0000);
#endif
}

INLINE vi dot_int8(vi acc, uint32_t a, vi b) {
#ifdef __AVX512VNNI__
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, _mm512_set1_epi32(a), (__m512i)b);
#else
    for (int i = 0; i < 4; i++) acc += (int32_t)(a >> 8 * i & 255) * (b << (24 - 8 * i) >> 24);
    return acc;
#endif
}

/* The same where x and w hold words of several inputs; y takes the sums, of integers as integers. */
INLINE void block_words(int kind, int rows, int vectors, int words, const uint32_t *const *x, const int32_t *w,
                        int64_t ldw, float *const *y) {
    vf acc[ROWS][4];
    EACH_ROW EACH_VECTOR acc[r][v] = (vf){0};
    for (int k = 0; k < words; k++, w += ldw) {
        vi b[4];
        EACH_VECTOR b[v] = *(const vi *)(w + v * LANES);
        EACH_ROW {
            uint32_t a = x[r][kind == INT4 ? 2 * k : k];
            EACH_VECTOR {
                if (kind == BF16) acc[r][v] = dot_bf16(acc[r][v], a, b[v]);
                if (kind == INT8) acc[r][v] = (vf)dot_int8((vi)acc[r][v], a, b[v]);
                if (kind == INT4) acc[r][v] = (vf)dot_int8((vi)acc[r][v], a, b[v] & 0x0f0f0f0f);
            }
            if (kind == INT4) {
                uint32_t next = x[r][2 * k + 1];
                EACH_VECTOR acc[r][v] = (vf)dot_int8((vi)acc[r][v], next, b[v] >> 4 & 0x0f0f0f0f);
            }
        }
    }
    EACH_ROW EACH_VECTOR store(y[r] + v * LANES, acc[r][v]);
}

/* CALL for the numbers of rows and vectors at hand, each compiled for itself. */
#define BY_ROWS(CALL, v) \
    switch (rows) { \
    case 1: CALL(1, v); break; \
    case 2: CALL(2, v); break; \
    case 3: CALL(3, v); break; \
    case 4: CALL(ROWS < 4 ? 3 : 4, v); break; \
    case 5: CALL(ROWS < 4 ? 3 : 5, v); break; \
    default: CALL(ROWS < 4 ? 3 : 6, v); \
    }
#if VECTORS == 4
#define BY_SIZE(CALL) \
    switch (vectors) { \
    case 1: BY_ROWS(CALL, 1) break; \
    case 2: BY_ROWS(CALL, 2) break; \
    case 3: BY_ROWS(CALL, 3) break; \
    default: BY_ROWS(CALL, 4) \
    }
#else
#define BY_SIZE(CALL) BY_ROWS(CALL, 1)
#endif

static __attribute__((noinline)) void call_f32(int rows, int vectors, int inputs, const float *const *x, const float *w,
                                               int64_t ldw, float *const *y, int adds) {
#define CALL(r, v) block_f32(r, v, inputs, x, w, ldw, y, adds)
    BY_SIZE(CALL)
#undef CALL
    (void)vectors;
}

#define CALL_WORDS(KIND) \
    static __attribute__((noinline)) void call_##KIND(int rows, int vectors, int words, const uint32_t *const *x, \
                                                      const int32_t *w, int64_t ldw, float *const *y) { \
        BY_SIZE(BLOCK_##KIND) \
        (void)vectors; \
    }
#define BLOCK_BF16(r, v) block_words(BF16, r, v, words, x, w, ldw, y)
#define BLOCK_INT8(r, v) block_words(INT8, r, v, words, x, w, ldw, y)
#define BLOCK_INT4(r, v) block_words(INT4, r, v, words, x, w, ldw, y)
CALL_WORDS(BF16)
CALL_WORDS(INT8)
CALL_WORDS(INT4)

/* y[r] (+)= x[r] w for up to ROWS rows and a panel's `vectors` of columns; the rows of `w` are `ldw` apart. */
INLINE void multiply_f32(int rows, int vectors, int inputs, const float *const *x, const float *w, int64_t ldw,
                         float *const *y, int adds) {
    float *part[ROWS];
    for (int v = 0; v < vectors; v += VECTORS) {
        for (int r = 0; r < rows; r++) part[r] = y[r] + v * LANES;
        call_f32(rows, vectors - v < VECTORS ? vectors - v : VECTORS, inputs, x, w + v * LANES, ldw, part, adds);
    }
}

INLINE void multiply_words(int kind, int rows, int vectors, int words, const uint32_t *const *x, const int32_t *w,
                           int64_t ldw, float *const *y) {
    float *part[ROWS];
    for (int v = 0; v < vectors; v += VECTORS) {
        int now = vectors - v < VECTORS ? vectors - v : VECTORS;
        for (int r = 0; r < rows; r++) part[r] = y[r] + v * LANES;
        (kind == BF16 ? call_BF16 : kind == INT8 ? call_INT8 : call_INT4)(rows, now, words, x, w + v * LANES, ldw, part);
    }
}

/* --- rows in the form that a kind of matrix takes -------------------------------------------------------------- */

/* Row r is at data + r * stride; of integers with its scale and the sum of its (unsigned) values. */
typedef struct {
    int kind;
    const char *data;
    int64_t stride; /* bytes */
    const float *scale;
    const int32_t *sum;
} Input;

#define CONVERTED(inputs) (WHOLE(inputs) * 2) /* bytes that a converted row needs at most */

typedef uint16_t vu16 __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint8_t vu8 __attribute__((vector_size(16), aligned(1), may_alias));

/* 16 values, of which only the first `left` are there: the others are read as 0. */
INLINE vf load_some(const float *x, int left) {
    if (left >= LANES) return load(x);
    float some[LANES] = {0};
    memcpy(some, x, left * sizeof(float));
    return load(some);
}

/* Rounded to the nearest bf16, ties to even. */
INLINE void convert_bf16(const float *x, int inputs, uint16_t *out) {
    for (int k = 0; k < inputs; k += LANES) {
        vi bits = (vi)load_some(x + k, inputs - k);
        vi rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        *(vu16 *)(out + k) = __builtin_convertvector(rounded, vu16);
    }
}

/* q = round(x / s) + 128 with s = max|x| / 127.5; returns s. What fills up the row is 0, and so are its weights. */
INLINE float convert_int8(const float *x, int inputs, uint8_t *out, int32_t *total) {
    const vf magic = all(12582912.0f); /* see `exponential` */
    vf most = {0};
    vi sums = {0};
    for (int k = 0; k < inputs; k += LANES) {
        vf value = load_some(x + k, inputs - k);
        most = larger(most, larger(value, -value));
    }
    float highest = maximum(most), scale = highest == 0 ? 1.1920929e-7f : highest / 127.5f;
    for (int k = 0; k < inputs; k += LANES) {
        vf q = (load_some(x + k, inputs - k) / scale + magic) - magic;
        vi integer = __builtin_convertvector(pick(q > all(127.0f), all(127.0f), q), vi) + 128;
        for (int i = inputs - k; i < LANES; i++) integer[i] = 0;
        sums += integer;
        *(vu8 *)(out + k) = __builtin_convertvector(integer, vu8);
    }
    *total = 0;
    for (int i = 0; i < LANES; i++) *total += sums[i];
    return scale;
}

/* Rows `x` [rows, inputs], `ldx` apart, for matrices of `kind`; converted ones go to `room` (see CONVERTED). */
static Input input_rows(int kind, const float *x, int64_t ldx, int rows, int inputs, char *room, float *scale, int32_t *sum) {
    if (kind == F32) return (Input){kind, (const char *)x, ldx * 4, 0, 0};
    int64_t stride = CONVERTED(inputs);
    for (int r = 0; r < rows; r++) {
        if (kind == BF16) convert_bf16(x + r * ldx, inputs, (uint16_t *)(room + r * stride));
        else scale[r] = convert_int8(x + r * ldx, inputs, (uint8_t *)(room + r * stride), sum + r);
    }
    return (Input){kind, room, stride, scale, sum};
}

/* --- products -------------------------------------------------------------------------------------------------- */

/* One panel of columns for up to ROWS rows: y[r][0 … width). `at`: numbers of the rows in `x`. */
INLINE void panel(const Matrix *m, int number, const Input *x, const int *at, int rows, float *const *y) {
    int first = number * PANEL, vectors = (m->outputs - first < PANEL ? m->outputs - first : PANEL) / LANES;
    const void *rows_of[ROWS];
    int64_t words = words_of(m);
    const float *w = (const float *)m->w + first * words;
    for (int r = 0; r < rows; r++) rows_of[r] = x->data + at[r] * x->stride;
    if (m->kind == F32) {
        multiply_f32(rows, vectors, m->inputs, (const float *const *)rows_of, w, vectors * LANES, y, 0);
        return;
    }
    multiply_words(m->kind, rows, vectors, words, (const uint32_t *const *)rows_of, (const int32_t *)w, vectors * LANES, y);
    if (m->kind == BF16) return;
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) {
            const float *at_column = m->scale + first + v * LANES;
            vi total = *(vi *)(y[r] + v * LANES) - *(const vi *)(m->bias + first + v * LANES);
            if (m->kind == INT4) total -= 8 * x->sum[at[r]];
            store(y[r] + v * LANES, __builtin_convertvector(total, vf) * load(at_column) * x->scale[at[r]]);
        }
}

INLINE int panels(const Matrix *m) { return (m->outputs + PANEL - 1) / PANEL; }
