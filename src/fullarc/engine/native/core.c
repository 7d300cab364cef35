/* The engine's forward pass for a step of token rows: embedding, decoder layers, last norm (engine/native/core.py). */
#include "layer.h"
#include "sample.h"

#define API __attribute__((visibility("default")))

/* Rows of one sequence that are computed together, none with both kinds of attention. Returns how many there are. */
static int runs(const Model *m, Step *s, int first) {
    int count = 0, most = block_pairs(m) / (m->heads > m->index_heads ? m->heads : m->index_heads);
    for (int r = 0; r < s->rows; count++) {
        Run run = {r, 1, s->slots[r], s->positions[r], first};
        int border = m->topk + lowest(&run, run.start), limit = most;
        if (run.start >= border) {
            int scanned = SCORE_ROOM / (run.start + most);
            limit = scanned > SCANNED ? scanned : SCANNED;
            limit = limit < most ? limit : most;
            s->sparse = 1;
        }
        while (r + run.count < s->rows && run.count < limit && s->slots[r + run.count] == run.slot &&
               s->positions[r + run.count] == run.start + run.count && (run.start >= border || run.start + run.count < border))
            run.count++;
        s->run[count] = run;
        r += run.count;
    }
    return count;
}

/* Memory for a step of `rows` rows of sequences up to `length`: sets the pointers of `s` from `base` on (if it is not 0)
   and returns its size in bytes. */
static int64_t room(const Model *m, int64_t rows, int64_t length, int threads, Step *s, char *base) {
    int64_t at = 0, width = WHOLE(m->latent + m->rope), hidden = WHOLE(m->hidden), inner = WHOLE(m->inner);
    int64_t parts = WHOLE(m->q_rank) + width + WHOLE(m->index_dim) + WHOLE(m->index_heads), experts = WHOLE(m->experts);
    int64_t heads = m->heads * width, index = m->index_heads * (int64_t)WHOLE(m->index_dim), pairs = rows * m->chosen;
    int64_t split = m->heads * (int64_t)WHOLE(m->nope + m->rope > m->value ? m->nope + m->rope : m->value);
    int64_t widest = 2 * hidden > split ? 2 * hidden : split;
    if (heads > widest) widest = heads;
    if (inner > widest) widest = inner;
    int64_t ffn = ROWS * WHOLE(m->expert_inner) * 3 + 64;
    s->room_pairs = (int64_t)block_pairs(m) * TILE;
    s->room_states = (int64_t)block_pairs(m) * sizeof(Softmax) / sizeof(float);
    s->room_scores = SCORE_ROOM + (SCANNED + 1) * (length + TILE) + width * TILE;
    s->scratch_size = s->room_pairs + s->room_states + s->room_scores + (int64_t)m->heads * WHOLE(m->topk);
    if (ffn > s->scratch_size) s->scratch_size = ffn;
#define TAKE(field, count, type) \
    do { if (base) s->field = (type *)(base + at); at += ((int64_t)(count) * sizeof(type) + 127) / 64 * 64; } while (0)
    TAKE(run, rows, Run);
    TAKE(h, rows * hidden, float);
    TAKE(x, rows * hidden, float);
    TAKE(parts, rows * (parts > experts ? parts : experts), float);
    TAKE(q, rows * heads, float);
    TAKE(iq, rows * index, float);
    TAKE(attended, rows * m->heads * WHOLE(m->latent), float);
    TAKE(split, rows * split, float);
    TAKE(inner, rows * inner, float);
    TAKE(routed, pairs * hidden, float);
    TAKE(gates, pairs, float);
    TAKE(join, rows * 2 * hidden, float);
    TAKE(chosen_keys, length > m->topk ? rows * m->topk : 0, int32_t); /* else every query sees all keys */
    TAKE(chosen_experts, pairs, int32_t);
    TAKE(order, pairs, int32_t);
    TAKE(starts, m->experts + 1, int32_t);
    TAKE(converted, rows * CONVERTED(widest), char);
    TAKE(scales, rows, float);
    TAKE(sums, rows, int32_t);
    TAKE(scratch, threads * s->scratch_size, float);
    return at;
}

API int64_t fullarc_room(const Model *m, int rows, int64_t length, int threads) {
    Step s;
    return room(m, rows, length, threads, &s, 0);
}

static void embed(const Model *m, Step *s, float *out, int64_t ld) {
    SHARED for (int r = 0; r < s->rows; r++) {
        memset(out + r * ld, 0, WHOLE(m->hidden) * sizeof(float));
        memcpy(out + r * ld, m->embed + (int64_t)s->ids[r] * m->hidden, m->hidden * sizeof(float));
    }
}

static void layer(const Model *m, const Cache *cache, int number, Step *s) {
    attention(m, m->layer + number, cache, number, s);
    feed_forward(m, m->layer + number, number, s);
}

/* Final states [rows, hidden'] of rows with token ids, slots and positions; `memory`: fullarc_room bytes.

   With `states` [rows, hidden'] it is the MTP layer's pass: row p joins token p with the trunk's state at p - 1.
   `told_experts` and `told_keys` (see Step) are 0, or have been filled with what stands for nothing. */
API void fullarc_forward(const Model *m, const Cache *cache, int rows, const int32_t *ids, const int32_t *slots,
                         const int32_t *positions, const float *states, int threads, char *memory, float *out,
                         int32_t *told_experts, int32_t *told_keys) {
    Step s = {.rows = rows, .ids = ids, .slots = slots, .positions = positions};
    s.told_experts = told_experts, s.told_keys = told_keys;
    int64_t hidden = WHOLE(m->hidden);
    room(m, rows, cache->tiles * TILE, threads, &s, memory);
    s.runs = runs(m, &s, states ? 1 : 0);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (states) {
            embed(m, &s, s.x, hidden);
            norm_rows(s.x, hidden, m->mtp_enorm, m->hidden, m->eps, rows, s.join, 2 * hidden);
            norm_rows(states, hidden, m->mtp_hnorm, m->hidden, m->eps, rows, s.join + hidden, 2 * hidden);
            product(&m->mtp_join, s.join, 2 * hidden, rows, s.h, hidden, &s);
            layer(m, cache, m->layers, &s);
        } else {
            embed(m, &s, s.h, hidden);
            for (int number = 0; number < m->layers; number++) layer(m, cache, number, &s);
        }
        norm_rows(s.h, hidden, states ? m->mtp_norm : m->norm, m->hidden, m->eps, rows, out, hidden);
    }
}

/* y [rows, outputs'] of x [rows, inputs] (`ldx` apart); `memory`: 64 + rows * (8 + CONVERTED) bytes. */
API void fullarc_product(const Product *p, const float *x, int64_t ldx, int rows, int threads, char *memory, float *y) {
    Step s = {.rows = rows};
    int64_t outputs = 0;
    for (int i = 0; i < p->parts; i++) outputs += p->part[i].outputs;
    s.scales = (float *)memory;
    s.sums = (int32_t *)(s.scales + rows);
    s.converted = (char *)(s.sums + rows);
#pragma omp parallel num_threads(threads) if (threads > 1)
    product(p, x, ldx, rows, y, outputs, &s);
}

API void fullarc_choose(float *scores, int n, int k, int32_t *out, int32_t *room) { choose(scores, n, k, out, room); }

/* Log-probs [rows, vocab'] of logits, each row at its temperature (1 where that is 0); `room`: a row. */
API void fullarc_logprobs(float *logits, int64_t ld, int rows, int vocab, const float *temperatures, float *room, float *out) {
    for (int r = 0; r < rows; r++) {
        double total;
        float *row = out + (int64_t)r * WHOLE(vocab);
        float log_total = soften_row(logits + r * ld, vocab, temperatures[r], row, room, &total);
        for (int v = 0; v < vocab; v += LANES) store(row + v, load(row + v) - log_total);
    }
}

/* What the MTP layer guesses for `count` sequences, up to wanted[i] tokens each: tokens [steps][count].

   The output layer is its copy in 8 bits. `states` [count, hidden'] are its states of the last known tokens, and are overwritten; the first guess of sequence i
   stands at positions[i]. Each guess is drawn at its temperature as the token at its place will be. A sequence's guesses end, with -1,
   before the product of the likeliest tokens' probabilities falls below e^least. `memory`: fullarc_room for `count` rows;
   `numbers`: (count + 2) * vocab' + 5 * count of them. */
API void fullarc_draft(const Model *m, const Cache *cache, int count, int steps, float *states, const int32_t *slots,
                       const int32_t *positions, const int32_t *wanted, const float *temperatures, const uint64_t *seeds, int vocab,
                       float least, int threads, char *memory, float *numbers, int32_t *tokens) {
    int64_t hidden = WHOLE(m->hidden), width = m->mtp_head.part[0].outputs;
    float *logits = numbers, *rows = logits + count * width, *sure = rows + 2 * width, unused, likeliest;
    int32_t *ids = (int32_t *)(sure + count), *slot = ids + count, *position = slot + count, *owner = position + count;
    int left = 0;
    for (int i = 0; i < count; i++) sure[i] = 0;
    for (int i = 0; i < count * steps; i++) tokens[i] = -1;
    for (int i = 0; i < count; i++)
        if (wanted[i] > 0) memmove(states + left * hidden, states + i * hidden, hidden * sizeof(float)), owner[left++] = i;
    for (int depth = 0; depth < steps && left; depth++) {
        if (depth) fullarc_forward(m, cache, left, ids, slot, position, states, threads, memory, states, 0, 0);
        Step s = {.rows = left};
        room(m, left, cache->tiles * TILE, threads, &s, memory);
#pragma omp parallel num_threads(threads) if (threads > 1)
        product(&m->mtp_head, states, hidden, left, logits, width, &s);
        int kept = 0;
        for (int r = 0; r < left; r++) {
            int i = owner[r];
            double u = uniform(seeds[i], positions[i] + depth);
            int32_t token = draw(logits + r * width, vocab, temperatures[i], u, rows, &unused, &likeliest);
            sure[i] += likeliest;
            if (sure[i] < least) continue;
            tokens[depth * count + i] = token;
            if (wanted[i] <= depth + 1) continue;
            memmove(states + kept * hidden, states + r * hidden, hidden * sizeof(float));
            owner[kept] = i, ids[kept] = token, slot[kept] = slots[i], position[kept++] = positions[i] + depth;
        }
        left = kept;
    }
}

/* As `uniform` draws them, for tests. */
API void fullarc_uniform(int count, const uint64_t *seeds, const uint64_t *positions, double *out) {
    for (int i = 0; i < count; i++) out[i] = uniform(seeds[i], positions[i]);
}

/* A token for each row of `chosen` [rows, vocab], and its log-prob in that of `logits`, which may be the same; their rows are `ld`
   and `ldc` apart (whole vectors). `room`: two rows. */
API void fullarc_sample(float *logits, int64_t ld, float *chosen, int64_t ldc, int rows, int vocab, const float *temperatures,
                        const uint64_t *seeds, const uint64_t *positions, float *room, int32_t *tokens, float *logprobs) {
    float unused;
    double total;
    for (int r = 0; r < rows; r++) {
        tokens[r] = draw(chosen + r * ldc, vocab, temperatures[r], uniform(seeds[r], positions[r]), room, logprobs + r, &unused);
        if (chosen == logits) continue;
        float log_total = soften_row(logits + r * ld, vocab, temperatures[r], room, room + WHOLE(vocab), &total);
        logprobs[r] = room[tokens[r]] - log_total;
    }
}

/* Cuts every row as `truncate_row` does. `room`: two rows. */
API void fullarc_truncate(float *logits, int64_t ld, int rows, int vocab, const float *temperatures, const int32_t *top_k,
                          const double *top_p, const float *min_p, float *room) {
    for (int r = 0; r < rows; r++)
        if (top_k[r] > 0 || top_p[r] < 1 || min_p[r] > 0)
            truncate_row(logits + r * ld, vocab, temperatures[r], top_k[r], top_p[r], min_p[r], room);
}

/* Of every row the counts[r] likeliest tokens and their log-probs: [rows, most]. `room`: two rows. */
API void fullarc_likeliest(float *logits, int64_t ld, int rows, int vocab, const float *temperatures, const int32_t *counts, int most,
                           float *room, int32_t *tokens, float *logprobs) {
    for (int r = 0; r < rows; r++)
        if (counts[r])
            likeliest_row(logits + r * ld, vocab, temperatures[r], counts[r], room, tokens + r * most, logprobs + r * most);
}

/* Penalties of `rows` rows, `ld` apart: that of place at[r] by its own `lengths[r]` ids, which lie one after another. */
API void fullarc_penalise(float *logits, int64_t ld, int rows, const int32_t *at, const int32_t *ids, const int32_t *lengths,
                          const int32_t *prompts, const float *penalties, int32_t *counts) {
    for (int r = 0; r < rows; ids += lengths[r++])
        penalise_row(logits + at[r] * ld, ids, lengths[r], prompts[r], penalties[3 * r], penalties[3 * r + 1], penalties[3 * r + 2],
                     counts);
}
