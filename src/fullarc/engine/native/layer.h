/* The parts of a decoder layer, each for all rows of a step.

   Every function is called by all threads of a team together (OpenMP): they share the rows, or the panels of a matrix, and
   wait for each other at the end. No value depends on how the work was shared. A width in a buffer is always rounded up to
   whole vectors, and what was added is zero. */
#pragma once
#include "attention.h"

typedef struct {
    int32_t parts; /* side by side; of different kinds */
    Matrix part[4];
} Product;

typedef struct {
    int32_t has_index, experts; /* experts: 0 = dense */
    const float *norm, *q_norm, *kv_norm, *index_norm, *index_bias, *ffn_norm;
    Product hidden, q, index_q, out;
    const Matrix *q_up, *v_up; /* [heads]; 0 where they are folded into q and out */
    Matrix gate_up, down; /* the dense FFN or the shared expert; outputs 0 = none */
    Matrix router;
    const float *router_bias;
    const Matrix *experts_gate_up, *experts_down; /* [experts] */
} Layer;

typedef struct {
    int32_t layers, hidden, heads, q_rank, latent, rope, nope, value, index_heads, index_dim, topk;
    int32_t experts, chosen, groups, groups_chosen, normalise, inner, expert_inner;
    float eps, latent_eps, routed_scale, q_scale;
    const Layer *layer; /* `layers` of them, and the MTP layer's if there is one */
    const float *embed, *norm, *cos, *sin; /* cos, sin: [position][rope / 2] */
    Product head;
    const float *mtp_enorm, *mtp_hnorm, *mtp_norm;
    Product mtp_join, mtp_head; /* head in 8 bits */
} Model;

/* A step: its rows, and memory for everything between input and output. */
typedef struct {
    int32_t rows, runs, sparse; /* sparse: whether any run chooses its keys */
    const int32_t *ids, *slots, *positions;
    Run *run;
    float *h, *x, *parts, *q, *iq, *attended, *split, *inner, *routed, *gates, *join;
    int32_t *chosen_keys; /* [rows][topk], kept for layers without an indexer */
    int32_t *told_experts, *told_keys; /* [rows][layers][K] and [rows][layers][topk] for who wants to know; or 0 */
    int32_t *chosen_experts, *order, *starts; /* [rows][K]; places in expert order; [E + 1] */
    char *converted;
    float *scales;
    int32_t *sums;
    float *scratch; /* of each thread, `scratch_size` apart: what attention needs, one after the other; or an expert */
    int64_t scratch_size, room_pairs, room_states, room_scores;
} Step;

#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif
#define SHARED _Pragma("omp for schedule(static)")
#define SHARED_ONE_BY_ONE _Pragma("omp for schedule(dynamic, 1)")
#define ONE_THREAD _Pragma("omp single")

/* --- norms and rotations --------------------------------------------------------------------------------------- */

INLINE void rms_norm(const float *x, const float *weight, int n, float eps, float *out) {
    vf total = {0};
    for (int i = 0; i < n; i += LANES) total += load(x + i) * load(x + i);
    float scale = 1.0f / __builtin_sqrtf(sum(total) / n + eps);
    for (int i = 0; i < n; i += LANES) store(out + i, load(x + i) * scale * load(weight + i));
}

INLINE void layer_norm(float *x, const float *weight, const float *bias, int n, float eps) {
    float mean = 0, square = 0;
    for (int i = 0; i < n; i++) mean += x[i];
    mean /= n;
    for (int i = 0; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
    float scale = 1.0f / __builtin_sqrtf(square / n + eps);
    for (int i = 0; i < n; i++) x[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

/* RoPE on pairs that are stored as halves. */
INLINE void rotate(float *x, const float *cos, const float *sin, int half) {
    for (int i = 0; i < half; i++) {
        float first = x[i], second = x[half + i];
        x[i] = first * cos[i] - second * sin[i];
        x[half + i] = second * cos[i] + first * sin[i];
    }
}

static void norm_rows(const float *x, int64_t ldx, const float *weight, int n, float eps, int rows, float *out,
                      int64_t ld) {
    SHARED for (int r = 0; r < rows; r++) rms_norm(x + r * ldx, weight, n, eps, out + r * ld);
}

static void add_rows(const float *x, int rows, int64_t ld, float *out) {
    SHARED for (int r = 0; r < rows; r++)
        for (int64_t i = r * ld; i < (r + 1) * ld; i += LANES) store(out + i, load(out + i) + load(x + i));
}

/* --- products -------------------------------------------------------------------------------------------------- */

/* Rows in the form of `kind`; all threads get the same. */
static Input converted(int kind, const float *x, int64_t ldx, int rows, int inputs, Step *s) {
    if (kind == F32) return (Input){kind, (const char *)x, ldx * 4, 0, 0};
    SHARED for (int r = 0; r < rows; r++)
        input_rows(kind, x + r * ldx, ldx, 1, inputs, s->converted + r * (int64_t)CONVERTED(inputs), s->scales + r, s->sums + r);
    return (Input){kind, s->converted, CONVERTED(inputs), s->scales, s->sums};
}

/* y [rows, outputs] = x w, `ldy` apart; row r of the result is made of row at[r] of `x` (0: of row r). */
static void multiply(const Matrix *m, Input x, const int32_t *at, int rows, float *y, int64_t ldy) {
    int blocks = (rows + ROWS - 1) / ROWS;
    SHARED for (int item = 0; item < panels(m) * blocks; item++) {
        int number = item / blocks, first = item % blocks * ROWS, count = rows - first < ROWS ? rows - first : ROWS;
        int from[ROWS];
        float *to[ROWS];
        for (int r = 0; r < count; r++) {
            from[r] = at ? at[first + r] : first + r;
            to[r] = y + (first + r) * ldy + number * PANEL;
        }
        panel(m, number, &x, from, count, to);
    }
}

static void product(const Product *p, const float *x, int64_t ldx, int rows, float *y, int64_t ldy, Step *s) {
    for (int part = 0; part < p->parts; part++) {
        const Matrix *m = p->part + part;
        multiply(m, converted(m->kind, x, ldx, rows, m->inputs, s), 0, rows, y, ldy);
        y += m->outputs;
    }
}

/* SwiGLU of some rows: silu(x gate) * (x up) for one panel, which holds a run of gate columns and the same of up. */
INLINE void gated_panel(const Matrix *m, int number, const Input *x, const int32_t *at, int first, int rows, float *y,
                        int64_t ldy) {
    float room[ROWS][PANEL] __attribute__((aligned(64)));
    int from[ROWS], columns = number * PANEL, width = (m->outputs - columns < PANEL ? m->outputs - columns : PANEL) / 2;
    float *to[ROWS];
    for (int r = 0; r < rows; r++) from[r] = at ? at[first + r] : first + r, to[r] = room[r];
    panel(m, number, x, from, rows, to);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < width; c += LANES) {
            vf gate = load(room[r] + c);
            store(y + (first + r) * ldy + columns / 2 + c, gate * sigmoid(gate) * load(room[r] + width + c));
        }
}

static void gated(const Matrix *m, Input x, int rows, float *y, int64_t ldy) {
    int blocks = (rows + ROWS - 1) / ROWS;
    SHARED for (int item = 0; item < panels(m) * blocks; item++) {
        int first = item % blocks * ROWS;
        gated_panel(m, item / blocks, &x, 0, first, rows - first < ROWS ? rows - first : ROWS, y, ldy);
    }
}

/* --- attention ------------------------------------------------------------------------------------------------- */

/* (query, head) pairs of the largest run. */
INLINE int block_pairs(const Model *m) {
    int heads = m->heads > m->index_heads ? m->heads : m->index_heads;
    return heads > BLOCK_PAIRS ? heads : BLOCK_PAIRS;
}

/* Absorbed queries [rows][heads][W'] without their rotation, from q-latents. */
static void queries(const Model *m, const Layer *l, const float *latents, int64_t ld, Step *s) {
    int width = WHOLE(m->latent + m->rope), head = WHOLE(m->nope + m->rope);
    int64_t ldq = (int64_t)m->heads * width, lds = (int64_t)m->heads * head;
    if (!l->q_up) {
        product(&l->q, latents, ld, s->rows, s->q, ldq, s);
        return;
    }
    product(&l->q, latents, ld, s->rows, s->split, lds, s);
    for (int h = 0; h < m->heads; h++)
        multiply(l->q_up + h, converted(F32, s->split + h * head, lds, s->rows, m->nope, s), 0, s->rows, s->q + h * width, ldq);
    SHARED for (int r = 0; r < s->rows; r++)
        for (int h = 0; h < m->heads; h++)
            for (int i = 0; i < m->rope; i++)
                s->q[r * ldq + h * width + m->latent + i] = s->split[r * lds + h * head + m->nope + i] * m->q_scale;
}

/* What attention adds to the hidden states: from attended latents to x. */
static void outputs(const Model *m, const Layer *l, Step *s) {
    int latent = WHOLE(m->latent), value = WHOLE(m->value), hidden = WHOLE(m->hidden);
    int64_t lda = (int64_t)m->heads * latent, lds = (int64_t)m->heads * value;
    if (!l->v_up) {
        product(&l->out, s->attended, lda, s->rows, s->x, hidden, s);
        return;
    }
    for (int h = 0; h < m->heads; h++)
        multiply(l->v_up + h, converted(F32, s->attended + h * latent, lda, s->rows, m->latent, s), 0, s->rows, s->split + h * value, lds);
    product(&l->out, s->split, lds, s->rows, s->x, hidden, s);
}

INLINE int32_t *told_keys(const Model *m, const Step *s, int row, int layer) {
    return s->told_keys + ((int64_t)row * m->layers + layer) * m->topk;
}

static void attention(const Model *m, const Layer *l, const Cache *cache, int number, Step *s) {
    int hidden = WHOLE(m->hidden), q_rank = WHOLE(m->q_rank), width = m->latent + m->rope, half = m->rope / 2;
    int at_key = q_rank, at_index = at_key + WHOLE(width), at_weights = at_index + WHOLE(m->index_dim);
    int64_t ld = l->has_index ? at_weights + WHOLE(m->index_heads) : at_index;
    int64_t ldq = (int64_t)m->heads * WHOLE(width), ldo = (int64_t)m->heads * WHOLE(m->latent);
    int64_t ldi = (int64_t)m->index_heads * WHOLE(m->index_dim);
    norm_rows(s->h, hidden, l->norm, m->hidden, m->eps, s->rows, s->x, hidden);
    product(&l->hidden, s->x, hidden, s->rows, s->parts, ld, s);
    SHARED for (int r = 0; r < s->rows; r++) {
        float *part = s->parts + r * ld, *key = part + at_key, *index_key = l->has_index ? part + at_index : 0;
        const float *cos = m->cos + (int64_t)s->positions[r] * half, *sin = m->sin + (int64_t)s->positions[r] * half;
        float rotated[512];
        memcpy(rotated, key + m->latent, m->rope * sizeof(float)); /* the norm works in whole vectors */
        memset(key + m->latent, 0, (WHOLE(width) - m->latent) * sizeof(float));
        rms_norm(key, l->kv_norm, m->latent, m->latent_eps, key);
        memcpy(key + m->latent, rotated, m->rope * sizeof(float));
        rotate(key + m->latent, cos, sin, half);
        if (index_key) {
            layer_norm(index_key, l->index_norm, l->index_bias, m->index_dim, 1e-6f);
            rotate(index_key, cos, sin, half);
        }
        remember(cache, number, s->slots[r], s->positions[r], key, index_key);
        rms_norm(part, l->q_norm, m->q_rank, m->latent_eps, part);
    }
    queries(m, l, s->parts, ld, s);
    int chooses = l->has_index && s->sparse;
    if (chooses) product(&l->index_q, s->parts, ld, s->rows, s->iq, ldi, s);
    SHARED for (int r = 0; r < s->rows; r++) {
        const float *cos = m->cos + (int64_t)s->positions[r] * half, *sin = m->sin + (int64_t)s->positions[r] * half;
        for (int h = 0; h < m->heads; h++) rotate(s->q + r * ldq + h * WHOLE(width) + m->latent, cos, sin, half);
        for (int j = 0; chooses && j < m->index_heads; j++)
            rotate(s->iq + r * ldi + j * WHOLE(m->index_dim), cos, sin, half);
    }
    SHARED_ONE_BY_ONE for (int i = 0; i < s->runs; i++) {
        Run run = s->run[i];
        float *pairs = s->scratch + THREAD * s->scratch_size, *states = pairs + s->room_pairs, *scores = states + s->room_states;
        float *q = s->q + run.row * ldq, *out = s->attended + run.row * ldo, *weights = scores + s->room_scores;
        int seen = run.start + 1 - lowest(&run, run.start);
        if (seen <= m->topk) { /* so do the others of the run: see runs() */
            attend_all(cache, number, run, m->heads, m->latent, q, out, pairs, (Softmax *)states, scores);
            for (int t = 0; s->told_keys && t < run.count; t++)
                for (int p = 0; p <= run.start + t; p++) told_keys(m, s, run.row + t, number)[p] = p;
            continue;
        }
        int64_t size = (int64_t)(run.start + run.count + TILE - 1) / TILE * TILE;
        if (l->has_index)
            index_scores(cache, number, run, m->index_heads, s->iq + run.row * ldi, s->parts + run.row * ld + at_weights,
                         ld, scores, size, pairs);
        for (int t = 0; t < run.count; t++) {
            int32_t *chosen = s->chosen_keys + (int64_t)(run.row + t) * m->topk;
            if (l->has_index)
                choose(scores + t * size, run.start + t + 1, m->topk, chosen, (int32_t *)(scores + run.count * size));
            if (s->told_keys) memcpy(told_keys(m, s, run.row + t, number), chosen, m->topk * sizeof(int32_t));
            attend_chosen(cache, number, run.slot, m->heads, m->latent, q + t * ldq, chosen, m->topk, out + t * ldo,
                          weights);
        }
    }
    outputs(m, l, s);
    add_rows(s->x, s->rows, hidden, s->h);
}

/* --- experts --------------------------------------------------------------------------------------------------- */

/* The `count` greatest of n scores, ascending by number; ties go to the lower one. Chosen ones are set to -inf. */
INLINE void greatest(float *scores, int n, int count, int32_t *out) {
    uint8_t taken[n];
    memset(taken, 0, n);
    for (int c = 0; c < count; c++) {
        int best = -1;
        for (int i = 0; i < n; i++)
            if (!taken[i] && (best < 0 || scores[i] > scores[best])) best = i;
        taken[best] = 1;
    }
    for (int i = 0, c = 0; i < n; i++)
        if (taken[i]) out[c++] = i;
}

/* Which experts a row goes to, and how much of each (model/moe.py, Router). `scores`: [E] logits, overwritten. */
static void route(const Model *m, const Layer *l, float *scores, int32_t *chosen, float *gates) {
    float choice[WHOLE(m->experts)], best[m->groups];
    int size = m->experts / m->groups;
    for (int e = 0; e < m->experts; e += LANES) {
        store(scores + e, sigmoid(load(scores + e)));
        store(choice + e, load(scores + e) + load(l->router_bias + e));
    }
    if (m->groups > 1) {
        int32_t kept[m->groups_chosen];
        for (int g = 0; g < m->groups; g++) { /* the sum of a group's two best */
            float first = -__builtin_inff(), second = first;
            for (int i = 0; i < size; i++) {
                float one = choice[g * size + i];
                if (one > first) second = first, first = one;
                else if (one > second) second = one;
            }
            best[g] = size > 1 ? first + second : first;
        }
        greatest(best, m->groups, m->groups_chosen, kept);
        for (int g = 0, k = 0; g < m->groups; g++) {
            if (k < m->groups_chosen && kept[k] == g) { k++; continue; }
            for (int i = 0; i < size; i++) choice[g * size + i] = -__builtin_inff();
        }
    }
    greatest(choice, m->experts, m->chosen, chosen);
    float total = 0;
    for (int k = 0; k < m->chosen; k++) total += scores[chosen[k]];
    float scale = m->normalise ? 1.0f / (total + 1e-20f) : 1.0f;
    for (int k = 0; k < m->chosen; k++) gates[k] = scores[chosen[k]] * scale * m->routed_scale;
}

/* (row, choice) pairs in the order of their experts: `order` holds row * K + choice, expert e has starts[e] … starts[e + 1]. */
static void sort_by_expert(const Model *m, Step *s) {
    int pairs = s->rows * m->chosen, at[m->experts];
    memset(s->starts, 0, (m->experts + 1) * sizeof(int32_t));
    for (int p = 0; p < pairs; p++) s->starts[s->chosen_experts[p] + 1]++;
    for (int e = 0; e < m->experts; e++) at[e] = s->starts[e], s->starts[e + 1] += s->starts[e];
    for (int p = 0; p < pairs; p++) s->order[at[s->chosen_experts[p]]++] = p;
}

/* One expert on the rows that chose it: pair p's result goes to routed[p]. */
static void expert(const Model *m, const Layer *l, int e, Input x, Step *s, float *scratch) {
    const Matrix *up = l->experts_gate_up + e, *down = l->experts_down + e;
    int64_t ldf = WHOLE(m->expert_inner), hidden = WHOLE(m->hidden);
    for (int first = s->starts[e]; first < s->starts[e + 1]; first += ROWS) {
        int rows = s->starts[e + 1] - first < ROWS ? s->starts[e + 1] - first : ROWS, at[ROWS], own[ROWS];
        float *to[ROWS], scale[ROWS];
        int32_t sums[ROWS];
        for (int r = 0; r < rows; r++) at[r] = s->order[first + r] / m->chosen, own[r] = r;
        for (int number = 0; number < panels(up); number++) gated_panel(up, number, &x, at, 0, rows, scratch, ldf);
        Input inner = input_rows(down->kind, scratch, ldf, rows, m->expert_inner, (char *)(scratch + ROWS * ldf), scale, sums);
        for (int number = 0; number < panels(down); number++) {
            for (int r = 0; r < rows; r++) to[r] = s->routed + s->order[first + r] * hidden + number * PANEL;
            panel(down, number, &inner, own, rows, to);
        }
    }
}

static void feed_forward(const Model *m, const Layer *l, int number, Step *s) {
    int64_t hidden = WHOLE(m->hidden), experts = WHOLE(m->experts);
    norm_rows(s->h, hidden, l->ffn_norm, m->hidden, m->eps, s->rows, s->x, hidden);
    if (l->experts) {
        multiply(&l->router, converted(F32, s->x, hidden, s->rows, m->hidden, s), 0, s->rows, s->parts, experts);
        SHARED for (int r = 0; r < s->rows; r++) {
            int32_t *chosen = s->chosen_experts + r * m->chosen;
            route(m, l, s->parts + r * experts, chosen, s->gates + r * m->chosen);
            if (s->told_experts)
                memcpy(s->told_experts + ((int64_t)r * m->layers + number) * m->chosen, chosen, m->chosen * sizeof(int32_t));
        }
        ONE_THREAD sort_by_expert(m, s);
        Input x = converted(l->experts_gate_up->kind, s->x, hidden, s->rows, m->hidden, s);
        SHARED_ONE_BY_ONE for (int e = 0; e < m->experts; e++)
            if (s->starts[e] < s->starts[e + 1]) expert(m, l, e, x, s, s->scratch + THREAD * s->scratch_size);
        SHARED for (int r = 0; r < s->rows; r++)
            for (int k = 0; k < m->chosen; k++) {
                int64_t pair = (int64_t)r * m->chosen + k;
                for (int i = 0; i < hidden; i += LANES)
                    store(s->h + r * hidden + i, load(s->h + r * hidden + i) + s->gates[pair] * load(s->routed + pair * hidden + i));
            }
    }
    if (!l->gate_up.outputs) return;
    int64_t ldf = l->gate_up.outputs / 2;
    gated(&l->gate_up, converted(l->gate_up.kind, s->x, hidden, s->rows, m->hidden, s), s->rows, s->inner, ldf);
    multiply(&l->down, converted(l->down.kind, s->inner, ldf, s->rows, l->down.inputs, s), 0, s->rows, s->x, hidden);
    add_rows(s->x, s->rows, hidden, s->h);
}
