/* From a row of logits to a token and its log-prob (engine/sampling.py says what they mean).

       token = first v with cdf(v) > u cdf(V),  cdf of softmax(logits / temperature);  temperature 0: the first greatest
   Sums are taken vector by vector in double precision, in ascending order.

   Tokens are ordered by their logits, the greatest first, equal ones by id. Where x <= 0 the bits of |x| ascend in that order, so
   the place where a sum along it passes a limit is found by halving, bit by bit, without sorting. */
#pragma once
#include <math.h>

#include "vector.h"

/* out = logits / temperature (1 where that is 0), relative to their maximum; returns the logarithm of sum e^out.

   Rows go on to a whole vector; in `logits` that is overwritten. `weights` gets e^out, `total` its sum. */
static float soften_row(float *logits, int vocab, float temperature, float *out, float *weights, double *total) {
    int whole = WHOLE(vocab);
    float divisor = temperature > 0 ? temperature : 1.0f;
    for (int v = vocab; v < whole; v++) logits[v] = -__builtin_inff();
    vf most = all(-__builtin_inff());
    for (int v = 0; v < whole; v += LANES) {
        vf x = load(logits + v) / divisor;
        most = larger(x, most);
        store(out + v, x);
    }
    float highest = maximum(most);
    *total = 0;
    for (int v = 0; v < whole; v += LANES) {
        vf x = load(out + v) - highest, p = exponential(x);
        store(out + v, x);
        store(weights + v, p);
        *total += sum(p);
    }
    return (float)log(*total);
}

/* A number in [0, 1) for each (seed, position): two rounds of splitmix64, 52 bits kept (engine/sampling.py, uniforms). */
static double uniform(uint64_t seed, uint64_t position) {
    uint64_t x = seed;
    for (int round = 0; round < 2; round++) {
        x += 0x9E3779B97F4A7C15u;
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
        x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
        x ^= x >> 31;
        if (!round) x += position;
    }
    return (x >> 12) * 0x1p-52;
}

/* `likeliest`: the log-prob of the likeliest token; `room`: twice a row. */
static int32_t draw(float *logits, int vocab, float temperature, double u, float *room, float *logprob, float *likeliest) {
    int whole = WHOLE(vocab);
    float *x = room, *p = room + whole;
    double total;
    float log_total = soften_row(logits, vocab, temperature, x, p, &total);
    int32_t token = 0;
    if (temperature == 0) {
        while (token < vocab - 1 && x[token] != 0) token++;
    } else {
        double border = u * total, below = 0;
        int v = 0;
        for (double next; v + LANES < whole && (next = below + sum(load(p + v))) <= border; v += LANES) below = next;
        for (token = v; token < vocab - 1; token++) {
            below += p[token];
            if (below > border && p[token] > 0) break;
        }
        while (token > 0 && p[token] == 0) token--; /* rounding cannot end on a token that has no probability */
    }
    *logprob = x[token] - log_total;
    *likeliest = -log_total;
    return token;
}

static int32_t rank(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffff;
}

/* The sum of the `weights` (0: one each) of tokens up to a rank. */
static double mass(const float *x, const float *weights, int vocab, int32_t most) {
    double total = 0;
    for (int v = 0; v < vocab;) {
        vf part = all(0);
        for (int end = v + 64 * LANES; v < vocab && v < end; v += LANES) {
            vi within = ((vi)load(x + v) & 0x7fffffff) <= most;
            part += (vf)((vi)(weights ? load(weights + v) : all(1)) & within);
        }
        total += sum(part);
    }
    return total;
}

/* The last of a row's tokens, in order of x <= 0, that is needed for a sum of `limit`: its rank and id. All, if they do not suffice. */
static void border(const float *x, const float *weights, int vocab, double limit, int32_t *last_rank, int *last) {
    int32_t low = 0, high = 0x7fffffff;
    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        if (mass(x, weights, vocab, middle) >= limit) high = middle;
        else low = middle + 1;
    }
    *last_rank = high, *last = vocab;
    double below = high ? mass(x, weights, vocab, high - 1) : 0;
    for (int v = 0; v < vocab && *last == vocab; v++)
        if (rank(x[v]) == high && (below += weights ? weights[v] : 1) >= limit) *last = v;
}

/* Logits of -inf for all but the `top_k` greatest (0: all), of these but the first that have `top_p` of their probability, and of
   these but those with `min_p` of the greatest one's. `room`: twice a row. */
static void truncate_row(float *logits, int vocab, float temperature, int top_k, double top_p, float min_p, float *room) {
    float *x = room, *p = room + WHOLE(vocab);
    double total;
    int32_t last_rank;
    int last;
    soften_row(logits, vocab, temperature, x, p, &total);
    for (int cut = 0; cut < 2; cut++) {
        if (cut ? top_p >= 1 : top_k <= 0 || top_k >= vocab) continue;
        border(x, cut ? p : 0, vocab, cut ? top_p * total : top_k, &last_rank, &last);
        total = 0;
        for (int v = 0; v < vocab; v++) {
            if (rank(x[v]) > last_rank || (rank(x[v]) == last_rank && v > last)) logits[v] = x[v] = -__builtin_inff(), p[v] = 0;
            total += p[v];
        }
    }
    for (int v = 0; v < vocab; v++)
        if (p[v] < min_p) logits[v] = -__builtin_inff();
}

/* The `count` likeliest tokens and their log-probs, best first. `room`: twice a row. */
static void likeliest_row(float *logits, int vocab, float temperature, int count, float *room, int32_t *tokens, float *logprobs) {
    float *x = room;
    double total;
    int32_t last_rank;
    int last, found = 0;
    float log_total = soften_row(logits, vocab, temperature, x, room + WHOLE(vocab), &total);
    border(x, 0, vocab, count, &last_rank, &last);
    for (int v = 0; v < vocab && found < count; v++) {
        if (rank(x[v]) > last_rank || (rank(x[v]) == last_rank && v > last)) continue;
        int at = found++;
        for (; at && rank(x[tokens[at - 1]]) > rank(x[v]); at--) tokens[at] = tokens[at - 1];
        tokens[at] = v;
    }
    for (int i = 0; i < found; i++) logprobs[i] = x[tokens[i]] - log_total;
}

/* Steers a row of logits by the sequence so far, `known` ids of which the first `prompt` were given (engine/penalties.py has the
   formulas). `counts`: one a token, all zero before and after. */
static void penalise_row(float *logits, const int32_t *ids, int known, int prompt, float repetition, float frequency, float presence,
                         int32_t *counts) {
    for (int i = 0; i < known && repetition != 1; i++) {
        int32_t v = ids[i];
        if (!counts[v]++) logits[v] = logits[v] > 0 ? logits[v] / repetition : logits[v] * repetition;
    }
    for (int i = 0; i < known; i++) counts[ids[i]] = 0;
    for (int i = prompt; i < known; i++) counts[ids[i]]++;
    for (int i = prompt; i < known; i++) {
        int32_t v = ids[i];
        if (counts[v]) logits[v] -= frequency * counts[v] + presence;
        counts[v] = 0;
    }
}
