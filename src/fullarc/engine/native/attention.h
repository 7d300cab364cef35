/* Latent attention over a cache, for queries whose results depend on their own sequence only (GLM-5 section 2.1.1).

   A query that sees at most `topk` keys sees them all, tile by tile of 64 keys with a running maximum (as in
   FlashAttention, Dao et al. 2022). Any later one scores all its keys with the indexer, takes the `topk` best (ties: the
   lower position; `stable_topk` of model/ops.py) and attends to these rows alone, so that its cost does not grow but for
   the indexer's scan.

   The cache holds a key as a row [W], whose first C columns are the value: memory is read once for both. Where all keys
   are read, a tile of them is turned into a panel [W][64], like those of weights, as it comes. Index keys are kept so. */
#pragma once
#include "matrix.h"

#define TILE PANEL
#define BLOCK_PAIRS 96 /* (query, head) pairs that are computed together */
#define SCANNED 4 /* queries that an index key is read for at once, or more while their scores fit in SCORE_ROOM */
#define SCORE_ROOM (1 << 15)

typedef struct {
    float *index_keys, *rows;
    int64_t layers, slots, tiles;
    int32_t width, index_width; /* W, I */
} Cache;

INLINE int64_t tile_of(const Cache *c, int layer, int slot, int tile) {
    return ((int64_t)layer * c->slots + slot) * c->tiles + tile;
}
INLINE float *index_tile(const Cache *c, int layer, int slot, int tile) {
    return c->index_keys + tile_of(c, layer, slot, tile) * c->index_width * TILE;
}
INLINE float *row_of(const Cache *c, int layer, int slot, int position) {
    return c->rows + (tile_of(c, layer, slot, 0) * TILE + position) * WHOLE(c->width);
}

/* Put a token's key [W] and index key [I] where they belong. */
static void remember(const Cache *c, int layer, int slot, int position, const float *key, const float *index_key) {
    memcpy(row_of(c, layer, slot, position), key, c->width * sizeof(float));
    if (!index_key) return;
    float *tile = index_tile(c, layer, slot, position / TILE) + position % TILE;
    for (int i = 0; i < c->index_width; i++) tile[i * TILE] = index_key[i];
}

/* Queries of one sequence at positions start, start + 1, …; keys before `first` are not seen by those behind them. */
typedef struct {
    int row, count, slot, start, first;
} Run;

INLINE int lowest(const Run *run, int position) { return position < run->first ? 0 : run->first; }

/* Set what lies outside [low, high) of a tile that begins at `start` to -inf. */
INLINE void mask(float *scores, int start, int low, int high) {
    for (int i = 0; i < TILE; i++)
        if (start + i < low || start + i >= high) scores[i] = -__builtin_inff();
}

/* y[p] (+)= x[p] w for `count` rows, `ldx` and `ldy` apart. */
INLINE void multiply_rows(int count, int vectors, int inputs, const float *x, int64_t ldx, const float *w, int64_t ldw,
                          float *y, int64_t ldy, int adds) {
    for (int p = 0; p < count; p += ROWS) {
        int rows = count - p < ROWS ? count - p : ROWS;
        const float *in[ROWS];
        float *out[ROWS];
        for (int r = 0; r < rows; r++) in[r] = x + (p + r) * ldx, out[r] = y + (p + r) * ldy;
        multiply_f32(rows, vectors, inputs, in, w, ldw, out, adds);
    }
}

/* --- all keys -------------------------------------------------------------------------------------------------- */

/* Softmax's state of one (query, head) pair. */
typedef struct {
    float highest;
    vf total;
} Softmax;

/* Scores of one more tile become weights relative to the new maximum; what was summed before is scaled to it. */
INLINE void soften(Softmax *state, float *scores, float *out, int width) {
    vf s[4], most;
    for (int v = 0; v < 4; v++) s[v] = load(scores + v * LANES);
    most = larger(larger(s[0], s[1]), larger(s[2], s[3]));
    float highest = maximum(most);
    if (highest > state->highest) {
        float scale = exponential(all(state->highest - highest))[0];
        state->highest = highest;
        state->total *= scale;
        for (int c = 0; c < width; c += LANES) store(out + c, load(out + c) * scale);
    }
    for (int v = 0; v < 4; v++) {
        s[v] = exponential(s[v] - state->highest);
        state->total += s[v];
        store(scores + v * LANES, s[v]);
    }
}

/* A run's queries q [count][heads][W'] over all their keys: latents `out` [count][heads][C'] (primes: whole vectors).
   `scores`: room for a tile of each (query, head) pair, `state` for as many; `panel`: for a tile [W'][64]. */
static void attend_all(const Cache *cache, int layer, Run run, int heads, int latent, const float *q, float *out,
                       float *scores, Softmax *state, float *panel) {
    int width = WHOLE(cache->width), values = WHOLE(latent), pairs = run.count * heads, last = run.start + run.count - 1;
    for (int p = 0; p < pairs; p++) state[p] = (Softmax){-__builtin_inff(), (vf){0}};
    memset(out, 0, sizeof(float) * pairs * values);
    for (int tile = 0; tile * TILE <= last; tile++) {
        int begin = tile * TILE, seeing = run.start < begin ? begin - run.start : 0, pair = seeing * heads;
        int keys = last + 1 - begin < TILE ? last + 1 - begin : TILE;
        const float *rows = row_of(cache, layer, run.slot, begin);
        touch(rows, keys * width);
        for (int k = 0; k < keys; k += LANES)
            for (int w = 0; w < width; w += LANES) transpose(rows + k * width + w, width, panel + w * TILE + k, TILE);
        multiply_rows(pairs - pair, TILE / LANES, cache->width, q + pair * width, width, panel, TILE, scores + pair * TILE,
                      TILE, 0);
        for (int p = pair; p < pairs; p++) {
            int position = run.start + p / heads, low = lowest(&run, position);
            if (position + 1 < begin + TILE || low > begin) mask(scores + p * TILE, begin, low, position + 1);
            soften(state + p, scores + p * TILE, out + p * values, values);
        }
        for (int c = 0; c < values; c += PANEL)
            multiply_rows(pairs - pair, (values - c < PANEL ? values - c : PANEL) / LANES, keys, scores + pair * TILE, TILE,
                          rows + c, width, out + pair * values + c, values, 1);
    }
    for (int p = 0; p < pairs; p++) {
        float inverse = 1.0f / sum(state[p].total);
        for (int c = 0; c < values; c += LANES) store(out + p * values + c, load(out + p * values + c) * inverse);
    }
}

/* --- the indexer's choice -------------------------------------------------------------------------------------- */

/* I[t][s] = sum_j w[t][j] ReLU(q[t][j] . k[s]), heads in order, -inf where a key is not seen; ends on whole tiles. */
static void index_scores(const Cache *cache, int layer, Run run, int heads, const float *iq, const float *weights,
                         int64_t ldw, float *scores, int64_t ld, float *dots) {
    int dim = cache->index_width, last = run.start + run.count - 1;
    for (int tile = 0; tile * TILE <= last; tile++) {
        int begin = tile * TILE;
        multiply_rows(run.count * heads, TILE / LANES, dim, iq, WHOLE(dim), index_tile(cache, layer, run.slot, tile), TILE,
                      dots, TILE, 0);
        for (int t = 0; t < run.count; t++) {
            float *into = scores + t * ld + begin;
            for (int v = 0; v < TILE; v += LANES) {
                vf total = {0};
                for (int j = 0; j < heads; j++)
                    total += weights[t * ldw + j] * larger(load(dots + (t * heads + j) * TILE + v), all(0.0f));
                store(into + v, total + 0.0f); /* no -0 */
            }
            int position = run.start + t, low = lowest(&run, position);
            if (position + 1 < begin + TILE || low > begin) mask(into, begin, low, position + 1);
        }
    }
}

/* How many of `vectors` * 16 sort keys are at least `border`. */
INLINE int count_from(const vi *keys, int vectors, int32_t border) {
    vi a = {0}, b = {0}, c = {0}, d = {0};
    int v = 0;
    for (; v + 4 <= vectors; v += 4) {
        a -= keys[v] >= border;
        b -= keys[v + 1] >= border;
        c -= keys[v + 2] >= border;
        d -= keys[v + 3] >= border;
    }
    for (; v < vectors; v++) a -= keys[v] >= border;
    a += b + (c + d);
    int total = 0;
    for (int i = 0; i < LANES; i++) total += a[i];
    return total;
}

INLINE vi greater(vi a, vi b) {
#ifdef __AVX512F__
    return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#else
    return (vi)pick(a > b, (vf)a, (vf)b);
#endif
}

/* Floats become integers in the same order; returns the greatest. */
INLINE int32_t sort_keys(vi *keys, int vectors) {
    vi least = (vi){0} + INT32_MIN, high[4] = {least, least, least, least};
    for (int v = 0; v < vectors; v++) {
        keys[v] ^= keys[v] >> 31 & 0x7fffffff;
        high[v % 4] = greater(high[v % 4], keys[v]);
    }
    vi most = greater(greater(high[0], high[1]), greater(high[2], high[3]));
    int32_t greatest = most[0];
    for (int i = 1; i < LANES; i++) greatest = most[i] > greatest ? most[i] : greatest;
    return greatest;
}

/* Which of 16 sort keys are above a border, and which equal it, as bits. */
INLINE void compare(vi keys, int32_t border, uint32_t *above, uint32_t *equal) {
#ifdef __AVX512F__
    *above = _mm512_cmpgt_epi32_mask((__m512i)keys, _mm512_set1_epi32(border));
    *equal = _mm512_cmpeq_epi32_mask((__m512i)keys, _mm512_set1_epi32(border));
#else
    *above = *equal = 0;
    for (int i = 0; i < LANES; i++) *above |= (uint32_t)(keys[i] > border) << i, *equal |= (uint32_t)(keys[i] == border) << i;
#endif
}

/* Put start + i for each bit i; returns how many. */
INLINE int positions_of(uint32_t bits, int start, int32_t *out) {
    int count = __builtin_popcount(bits);
#ifdef __AVX512F__
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i found = _mm512_maskz_compress_epi32(bits, _mm512_add_epi32(lanes, _mm512_set1_epi32(start)));
    _mm512_mask_storeu_epi32(out, (1u << count) - 1, found);
#else
    for (; bits; bits &= bits - 1) *out++ = start + __builtin_ctz(bits);
#endif
    return count;
}

/* Copy the sort keys from `from` on and below `to` to `out`, filled up with the least one; returns how many vectors. */
INLINE int between(const vi *keys, int vectors, int64_t from, int64_t to, int32_t *out) {
    int count = 0;
    for (int v = 0; v < vectors; v++) {
        vi in = (keys[v] >= (int32_t)from) & (keys[v] <= (int32_t)(to - 1));
#ifdef __AVX512F__
        uint32_t bits = _mm512_test_epi32_mask((__m512i)in, (__m512i)in);
        _mm512_storeu_si512(out + count, _mm512_maskz_compress_epi32(bits, (__m512i)keys[v]));
        count += __builtin_popcount(bits);
#else
        for (int i = 0; i < LANES; i++) out[count] = keys[v][i], count -= in[i];
#endif
    }
    int whole = WHOLE(count);
    while (count < whole) out[count++] = INT32_MIN;
    return whole / LANES;
}

/* Positions, ascending, of the k best of n scores (n > k); ties go to the lower position.

   `scores` goes on to a whole vector, with -inf, and is overwritten by sort keys: integers in the order of the floats.
   `room`: for a quarter of them and two vectors. */
static void choose(float *scores, int n, int k, int32_t *out, int32_t *room) {
    vi *keys = (vi *)scores;
    int vectors = (n + LANES - 1) / LANES;
    /* `from` is a border with at least k keys from it on, `to` one with fewer (`above`): bisection, and in turn the
       border where k keys would be if they lay evenly between the two; soon only among those between the two */
    int64_t from = INT32_MIN, to = (int64_t)sort_keys(keys, vectors) + 1;
    int above = 0, found = vectors * LANES, size = vectors, beyond = 0;
    const vi *left = keys;
    for (int turn = 0; found != k && to - from > 1; turn++) {
        if (left == keys && found - above <= n / 4 && n > 1024) {
            size = between(keys, vectors, from, to, room);
            left = (const vi *)room, beyond = above;
        }
        int64_t middle = from + (to - from) / 2;
        if (turn % 2) middle = from + (to - from) * (found - k) / (found - above);
        middle = middle <= from ? from + 1 : middle >= to ? to - 1 : middle;
        int count = beyond + count_from(left, size, (int32_t)middle);
        if (count >= k) from = middle, found = count;
        else to = middle, above = count;
    }
    /* where more than k were found, all beyond the border tie with it: the first ones fill up */
    int filling = found == k ? k : k - above;
    for (int v = 0, taken = 0; taken < k; v++) {
        uint32_t in, equal;
        compare(keys[v], (int32_t)from, &in, &equal);
        for (; equal && filling > 0; equal &= equal - 1, filling--) in |= equal & -equal;
        taken += positions_of(in, v * LANES, out + taken);
    }
}

/* --- chosen keys ----------------------------------------------------------------------------------------------- */

#define KEYS 4 /* rows and heads that are multiplied at once */
#define AHEAD 12 /* rows that are fetched before they are needed */

/* Scores of KEYS chosen rows for up to KEYS heads: 16 sums. */
INLINE void dots_of(int heads, int width, const float *q, const float *const *rows, float *scores, int64_t ld) {
    vf acc[KEYS * KEYS];
    for (int i = 0; i < KEYS * KEYS; i++) acc[i] = (vf){0};
    for (int w = 0; w < width; w += LANES) {
        vf key[KEYS];
        _Pragma("GCC unroll 4") for (int i = 0; i < KEYS; i++) key[i] = load(rows[i] + w);
        _Pragma("GCC unroll 4") for (int h = 0; h < heads; h++)
            _Pragma("GCC unroll 4") for (int i = 0; i < KEYS; i++) acc[h * KEYS + i] += load(q + h * width + w) * key[i];
    }
    vf out = sums(acc);
    for (int h = 0; h < heads; h++) memcpy(scores + h * ld, (float *)&out + h * KEYS, KEYS * sizeof(float));
}

/* out[h] = sum_i p[h][i] row_i, one panel of columns, for up to KEYS heads. */
INLINE void mix_of(int heads, int vectors, int count, const float *p, int64_t ldp, const float *rows, int64_t ldr,
                   const int32_t *chosen, float *out, int64_t ldo) {
    vf acc[KEYS][4];
    _Pragma("GCC unroll 4") for (int h = 0; h < heads; h++) EACH_VECTOR acc[h][v] = (vf){0};
    for (int i = 0; i < count; i++) {
        const float *row = rows + chosen[i] * ldr;
        vf value[4];
        EACH_VECTOR value[v] = load(row + v * LANES);
        _Pragma("GCC unroll 4") for (int h = 0; h < heads; h++) EACH_VECTOR acc[h][v] += p[h * ldp + i] * value[v];
    }
    _Pragma("GCC unroll 4") for (int h = 0; h < heads; h++) EACH_VECTOR store(out + h * ldo + v * LANES, acc[h][v]);
}

static __attribute__((noinline)) void dots(int heads, int width, const float *q, const float *const *rows, float *scores,
                                           int64_t ld) {
    if (heads == KEYS) dots_of(KEYS, width, q, rows, scores, ld);
    else
        for (int h = 0; h < heads; h++) dots_of(1, width, q + h * width, rows, scores + h * ld, ld);
}

static __attribute__((noinline)) void mix(int heads, int vectors, int count, const float *p, int64_t ldp, const float *rows,
                                          int64_t ldr, const int32_t *chosen, float *out, int64_t ldo) {
#define MIX(v) \
    if (heads == KEYS) mix_of(KEYS, v, count, p, ldp, rows, ldr, chosen, out, ldo); \
    else \
        for (int h = 0; h < heads; h++) mix_of(1, v, count, p + h * ldp, ldp, rows, ldr, chosen, out + h * ldo, ldo);
    for (; vectors > 0; vectors -= VECTORS, rows += VECTORS * LANES, out += VECTORS * LANES)
        switch (vectors < VECTORS ? vectors : VECTORS) {
        case 1: MIX(1) break;
#if VECTORS == 4
        case 2: MIX(2) break;
        case 3: MIX(3) break;
        default: MIX(4)
#endif
        }
#undef MIX
}

/* Weights of `count` scores, which go on to a whole vector with -inf: e^(s - max). Returns one over their sum. */
INLINE float weigh(float *scores, int whole) {
    vf most = load(scores), total = {0};
    for (int i = LANES; i < whole; i += LANES) most = larger(most, load(scores + i));
    float highest = maximum(most);
    for (int i = 0; i < whole; i += LANES) {
        vf p = exponential(load(scores + i) - highest);
        total += p;
        store(scores + i, p);
    }
    return 1.0f / sum(total);
}

/* One query q [heads][W'] over `count` chosen rows: latents `out` [heads][C']. `scores`: room for [heads][count']. */
static void attend_chosen(const Cache *cache, int layer, int slot, int heads, int latent, const float *q,
                          const int32_t *chosen, int count, float *out, float *scores) {
    int width = WHOLE(cache->width), values = WHOLE(latent), whole = WHOLE(count);
    const float *rows = row_of(cache, layer, slot, 0);
    for (int i = 0; i < whole; i += KEYS) {
        const float *four[KEYS];
        for (int j = 0; j < KEYS; j++) four[j] = rows + (int64_t)chosen[i + j < count ? i + j : count - 1] * width;
        for (int j = AHEAD; j < AHEAD + KEYS && i + j < count; j++)
            for (int w = 0; w < width; w += LANES) __builtin_prefetch(rows + (int64_t)chosen[i + j] * width + w);
        for (int h = 0; h < heads; h += KEYS)
            dots(heads - h < KEYS ? heads - h : KEYS, width, q + h * width, four, scores + h * whole + i, whole);
    }
    for (int h = 0; h < heads; h++) {
        float *s = scores + h * whole;
        for (int i = count; i < whole; i++) s[i] = -__builtin_inff();
        float inverse = weigh(s, whole);
        for (int i = 0; i < whole; i += LANES) store(s + i, load(s + i) * inverse);
    }
    for (int c = 0; c < values; c += PANEL)
        for (int h = 0; h < heads; h += KEYS)
            mix(heads - h < KEYS ? heads - h : KEYS, (values - c < PANEL ? values - c : PANEL) / LANES, count, scores + h * whole,
                whole, rows + c, width, chosen, out + h * values + c, values);
}
