/* An engine bundle from C, or from any language that calls C: load, rows of tokens in, logits out.
 *
 * The same code as gqa/runtime/session.h, behind a stable binary interface. Functions that can fail return 0 for success
 * and 1 for an error, whose text (what, where, fix) gqa_last_error gives; nothing has changed then. A NULL session or
 * array is such an error. A session belongs to one thread at a time, and the error to the thread that got it.
 */
#ifndef GQA_EXPORT_H
#define GQA_EXPORT_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define GQA_API __attribute__((visibility("default")))
#else
#define GQA_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define GQA_ABI_VERSION 1
#define GQA_NO_TOKEN (-1)
#define GQA_WHOLE_ROW (-1)

typedef struct gqa_session gqa_session;

typedef struct gqa_options {
    int device;                 /* number of the GPU */
    const char* plugin_library; /* path of libgqa_plugin.so, or NULL: needed by engines with the plugin only */
    int cuda_graph;             /* 1: decode steps are captured once and replayed */
} gqa_options;

/* temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep every token. */
typedef struct gqa_sampling {
    double temperature;
    int64_t top_k;
    double top_p, min_p;
} gqa_sampling;

GQA_API int gqa_abi_version(void);
GQA_API const char* gqa_last_error(void);

/* NULL for an error. options: NULL for device 0, no plugin, CUDA graphs. */
GQA_API gqa_session* gqa_load(const char* folder, const gqa_options* options);
GQA_API void gqa_free(gqa_session* session);

/* One rank of a bundle that is cut over devices. communicator: an ncclComm_t, made with this rank's GPU current and taken
 * over by this call, whatever comes of it: do not destroy it. Every rank makes the same calls with the same tokens, and
 * gets the same logits. When a rank fails, the others' calls fail too, at the latest timeout_s seconds later (0: 120), and
 * none of their sessions can go on. options: device is the communicator's. NULL for an error. */
GQA_API gqa_session* gqa_load_rank(const char* folder, const gqa_options* options, void* communicator, double timeout_s);
/* Rank 0's seed, on every rank, so that all draw the same tokens; without ranks the seed itself. */
GQA_API int gqa_shared_seed(gqa_session* session, uint64_t seed, uint64_t* shared);

/* Of a NULL session: -1, or 0 rows. */
GQA_API int64_t gqa_vocabulary(const gqa_session* session);
GQA_API int64_t gqa_capacity(const gqa_session* session);
GQA_API int64_t gqa_max_batch(const gqa_session* session);
GQA_API size_t gqa_rows(const gqa_session* session);
GQA_API int64_t gqa_length(const gqa_session* session, size_t row); /* -1: there is no such row */

/* A batch of `rows` empty rows. */
GQA_API int gqa_open(gqa_session* session, size_t rows);

/* More tokens into every row: counts[row] of them, one row after the other in `tokens`; a row may get none.
 * logits: [rows, vocabulary], of each row's last token; 0 for a row that got none. */
GQA_API int gqa_extend(gqa_session* session, const int32_t* tokens, const size_t* counts, size_t rows, float* logits);

/* One token per row; GQA_NO_TOKEN leaves a row as it is. */
GQA_API int gqa_step(gqa_session* session, const int32_t* tokens, size_t rows, float* logits);

GQA_API int gqa_reset_row(gqa_session* session, size_t row);
GQA_API int gqa_rewind_row(gqa_session* session, size_t row, int64_t length);
/* length: tokens to copy, GQA_WHOLE_ROW for all. */
GQA_API int gqa_copy_row(gqa_session* session, size_t from, size_t to, int64_t length);

/* Continues one prompt greedily up to an end token of the model. new_tokens: room for `most`; count: how many came. */
GQA_API int gqa_generate(gqa_session* session, const int32_t* prompt, size_t prompt_tokens, int64_t most,
                         int32_t* new_tokens, size_t* count);

/* The token that a number from [0, 1) picks: that of `gqa-export run` for the same logits and number. GQA_NO_TOKEN for
 * no logits. */
GQA_API int32_t gqa_choose(const float* logits, size_t vocabulary, const gqa_sampling* sampling, double uniform);

#ifdef __cplusplus
}
#endif

#endif
