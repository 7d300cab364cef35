/* llama.cpp as a side of `fullarc bench engine`: its own C API with flat arguments, compiled against its own header.

   What is timed is llama_decode and the choice of the likeliest token, in C, with nothing of Python or HTTP between two
   steps. Times are seconds; -1 is a failure. */

#include "llama.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct {
    struct llama_model *model;
    struct llama_context *context;
    struct llama_batch batch;
    int sequences, vocabulary;
    llama_token *next; /* of each sequence, and where it will stand */
    llama_pos *place;
} Side;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double) t.tv_sec + 1e-9 * (double) t.tv_nsec;
}

static void only_errors(enum ggml_log_level level, const char *text, void *user) {
    (void) user;
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

static void add(struct llama_batch *batch, llama_token id, llama_pos place, llama_seq_id sequence, int wanted) {
    int at = batch->n_tokens++;
    batch->token[at] = id;
    batch->pos[at] = place;
    batch->n_seq_id[at] = 1;
    batch->seq_id[at][0] = sequence;
    batch->logits[at] = (int8_t) wanted;
}

static llama_token likeliest(const float *logits, int count) {
    int best = 0;
    for (int id = 1; id < count; id++)
        if (logits[id] > logits[best]) best = id;
    return best;
}

/* Rewrite a file of fp32 weights in another of llama.cpp's types (llama_ftype). */
int side_quantize(const char *from, const char *to, int type) {
    llama_log_set(only_errors, NULL);
    struct llama_model_quantize_params params = llama_model_quantize_default_params();
    params.ftype = (enum llama_ftype) type;
    params.nthread = 1;
    return (int) llama_model_quantize(from, to, &params);
}

const char *side_system(void) { return llama_print_system_info(); }

/* `flash`: llama_flash_attn_type; `cache`: ggml_type of keys and values; `repack`: weights in the layouts of the CPU. */
Side *side_open(const char *file, int sequences, int tokens, int flash, int cache, int repack, int micro) {
    llama_log_set(only_errors, NULL);
    llama_backend_init();
    Side *side = calloc(1, sizeof *side);
    struct llama_model_params model = llama_model_default_params();
    model.use_extra_bufts = repack != 0;
    if (!side || !(side->model = llama_model_load_from_file(file, model))) return NULL;
    struct llama_context_params context = llama_context_default_params();
    context.n_seq_max = (uint32_t) sequences;
    context.n_ctx = (uint32_t) (sequences * tokens);
    context.n_batch = (uint32_t) (tokens > sequences ? tokens : sequences);
    context.n_ubatch = (uint32_t) micro;
    context.n_threads = context.n_threads_batch = 1;
    context.flash_attn_type = (enum llama_flash_attn_type) flash;
    context.type_k = context.type_v = (enum ggml_type) cache;
    context.kv_unified = false; /* of its own for each sequence: with one for all a batch is slower */
    context.no_perf = true;
    if (!(side->context = llama_init_from_model(side->model, context))) return NULL;
    side->sequences = sequences;
    side->vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(side->model));
    side->next = calloc((size_t) sequences, sizeof *side->next);
    side->place = calloc((size_t) sequences, sizeof *side->place);
    side->batch = llama_batch_init((int32_t) context.n_batch, 0, 1);
    return side;
}

void side_close(Side *side) {
    llama_batch_free(side->batch);
    llama_free(side->context);
    llama_model_free(side->model);
    free(side->next);
    free(side->place);
    free(side);
}

int side_vocabulary(const Side *side) { return side->vocabulary; }

/* A prompt to its first token, from an empty cache. `logits`: where to put those of its last token, or NULL. */
double side_prefill(Side *side, const llama_token *ids, int length, int sequence, float *logits) {
    llama_memory_seq_rm(llama_get_memory(side->context), sequence, -1, -1);
    double began = now();
    side->batch.n_tokens = 0;
    for (int at = 0; at < length; at++) add(&side->batch, ids[at], at, sequence, at == length - 1);
    if (llama_decode(side->context, side->batch)) return -1;
    const float *last = llama_get_logits_ith(side->context, length - 1);
    side->next[sequence] = likeliest(last, side->vocabulary);
    side->place[sequence] = length;
    double took = now() - began;
    if (logits) memcpy(logits, last, sizeof *logits * (size_t) side->vocabulary);
    return took;
}

/* `steps` more tokens for every sequence; those that were chosen go to `out` [steps, sequences] */
double side_decode(Side *side, int steps, llama_token *out) {
    double began = now();
    for (int step = 0; step < steps; step++) {
        side->batch.n_tokens = 0;
        for (int s = 0; s < side->sequences; s++) add(&side->batch, side->next[s], side->place[s]++, s, 1);
        if (llama_decode(side->context, side->batch)) return -1;
        for (int s = 0; s < side->sequences; s++) {
            out[step * side->sequences + s] = side->next[s];
            side->next[s] = likeliest(llama_get_logits_ith(side->context, s), side->vocabulary);
        }
    }
    return now() - began;
}
