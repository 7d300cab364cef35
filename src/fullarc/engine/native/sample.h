/* From a row of logits to a token and its log-prob (engine/sampling.py says what they mean).

       token = first v with cdf(v) > u cdf(V),  cdf of softmax(logits / temperature);  temperature 0: the first greatest
   Sums are taken vector by vector in double precision, in ascending order. */
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
