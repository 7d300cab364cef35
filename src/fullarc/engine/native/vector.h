/* Vectors of 16 floats, whatever the processor's registers are: the compiler splits them, and no result depends on how.

   Every function here works lane by lane, or adds lanes in one fixed order, so that the bits of a value depend on what
   it is computed from and on nothing else. */
#pragma once
#include <stdint.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))
#define WHOLE(n) (((n) + LANES - 1) / LANES * LANES) /* rounded up to whole vectors */

typedef float vf __attribute__((vector_size(64), aligned(4), may_alias));
typedef float vf8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float vf4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(64), aligned(4), may_alias));

/* Read memory in order, so that it is in the cache (and fetched ahead) when it is read in another order. */
INLINE void touch(const float *p, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) (void)*(const volatile float *)(p + i);
}

INLINE vf load(const float *p) { return *(const vf *)p; }
INLINE void store(float *p, vf x) { *(vf *)p = x; }
INLINE vf all(float x) { return x - (vf){0}; }
INLINE vf pick(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
INLINE vf larger(vf a, vf b) { return pick(a > b, a, b); }

/* The sum of all lanes, by halves. */
INLINE float sum(vf x) {
    vf8 y = ((const vf8 *)&x)[0] + ((const vf8 *)&x)[1];
    vf4 z = ((const vf4 *)&y)[0] + ((const vf4 *)&y)[1];
    return (z[0] + z[2]) + (z[1] + z[3]);
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

/* Lane i is the sum of all lanes of x[i], for 16 vectors at once; overwrites them. */
INLINE vf sums(vf *x) {
#define FOLD(step, first, second) \
    for (int i = 0; i < step; i++) x[i] = SHUFFLE(x[i], x[i + step], first) + SHUFFLE(x[i], x[i + step], second);
#define A8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define B8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define A4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define B4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define A2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define B2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define A1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define B1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
    _Pragma("GCC unroll 8") FOLD(8, A8, B8)
    _Pragma("GCC unroll 8") FOLD(4, A4, B4)
    _Pragma("GCC unroll 8") FOLD(2, A2, B2)
    FOLD(1, A1, B1)
    return x[0];
}

/* 16 rows of 16 columns, `ld` apart, become the columns of rows that are `ldo` apart. */
INLINE void transpose(const float *in, int64_t ld, float *out, int64_t ldo) {
    vf a[LANES], b[LANES];
#define EACH(n) _Pragma("GCC unroll 16") for (int i = 0; i < n; i++)
    EACH(16) a[i] = load(in + i * ld);
    EACH(8) {
        b[2 * i] = SHUFFLE(a[2 * i], a[2 * i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
        b[2 * i + 1] = SHUFFLE(a[2 * i], a[2 * i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    }
    EACH(4) for (int j = 0; j < 2; j++) { /* a[4 i + c]: column c of each group of 4, of rows 4 i … 4 i + 3 */
        a[4 * i + 2 * j] = SHUFFLE(b[4 * i + j], b[4 * i + 2 + j], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
        a[4 * i + 2 * j + 1] = SHUFFLE(b[4 * i + j], b[4 * i + 2 + j], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
    EACH(4) {
        vf low0 = SHUFFLE(a[i], a[4 + i], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
        vf low1 = SHUFFLE(a[8 + i], a[12 + i], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
        vf high0 = SHUFFLE(a[i], a[4 + i], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
        vf high1 = SHUFFLE(a[8 + i], a[12 + i], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
        store(out + i * ldo, SHUFFLE(low0, low1, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23));
        store(out + (4 + i) * ldo, SHUFFLE(high0, high1, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23));
        store(out + (8 + i) * ldo, SHUFFLE(low0, low1, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
        store(out + (12 + i) * ldo, SHUFFLE(high0, high1, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
    }
}

INLINE float maximum(vf x) {
    float best = x[0];
    for (int i = 1; i < LANES; i++) best = x[i] > best ? x[i] : best;
    return best;
}

/* e^x to about two units in the last place, exactly 0 below -87 (so also for -inf).

   x = n ln 2 + r with |r| <= ln 2 / 2; e^r by a polynomial (Cephes' expf), 2^n through the exponent's bits. */
INLINE vf exponential(vf x) {
    const vf magic = all(12582912.0f); /* 1.5 * 2^23: what is added to it is rounded to an integer, in the low bits */
    vi tiny = x < all(-87.0f);
    x = pick(tiny, all(-87.0f), x);
    x = pick(x > all(88.0f), all(88.0f), x);
    vf shifted = x * 1.44269504088896341f + magic;
    vf n = shifted - magic;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vi power = ((vi)shifted - (vi)magic + 127) << 23;
    return pick(tiny, all(0.0f), p * (vf)power);
}

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exponential(-x)); }
