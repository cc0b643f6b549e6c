/* The C API (C99): models, sessions, samplers and batches of narrows for C and for what calls C, such as
 * Python's ctypes. Longer than other headers since a C header is its own manual.
 *
 * - Every call that can fail returns a narrows_status; narrows_last_error() has the sentence that goes with
 * it. No call throws, prints or ends the process. A NULL where a thing is needed is NARROWS_INVALID_ARGUMENT.
 * - Handles are freed by their own narrows_*_free(), in any order: what uses a model keeps it alive. NULL is
 * freed without effect. Pointers that a handle gives belong to it.
 * - A model may be used by several threads at once. A session, a sampler or a batch by one thread at a time,
 * and while a batch steps its sessions are in use.
 * - Structs begin with struct_size, which narrows_*_init() sets (for what cannot call an inline function:
 *   narrows_*_init_size()). A program that was compiled with an older header has a shorter struct, and the
 *   defaults for the rest; one with a newer header is refused (NARROWS_UNSUPPORTED) if it sets what this
 * library does not know.
 * - Texts are UTF-8. Those given as a pointer alone end with a zero byte.
 * - Buffers: `capacity` is what the buffer holds, *n becomes what there is. NARROWS_BUFFER_TOO_SMALL leaves
 * the buffer as it was; NULL with capacity 0 only asks for *n and is NARROWS_OK. */
#ifndef NARROWS_NARROWS_H
#define NARROWS_NARROWS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* --- errors and version */

typedef enum narrows_status {
  NARROWS_OK = 0,
  NARROWS_INVALID_ARGUMENT = 1, /* an argument, option or profile is wrong; nothing was done */
  NARROWS_INVALID_FILE = 2,     /* a file is missing, cut off, corrupt or made for another model */
  NARROWS_UNSUPPORTED = 3,      /* well-formed, but outside what this build can do */
  NARROWS_CONTEXT_FULL = 4,     /* the prompt or the next token does not fit n_ctx */
  NARROWS_OUT_OF_MEMORY = 5,
  NARROWS_DISK_FULL = 6, /* no room for the file; nothing of it is left */
  NARROWS_IO_ERROR = 7,
  NARROWS_CANCELLED = 8,  /* a progress function asked to stop */
  NARROWS_NON_FINITE = 9, /* NaN or infinity where numbers must be finite */
  NARROWS_INTERNAL = 10,  /* a session that must be reset, or a bug in narrows; the message says which */
  NARROWS_BUFFER_TOO_SMALL = 100
} narrows_status;

/* Of the last call of this thread that failed: one sentence, without full stop. "" if none has. Valid until
 * the next call of this thread. */
const char* narrows_last_error(void);
/* "invalid_argument" and so on; "unknown" for other numbers. */
const char* narrows_status_name(int status);
const char* narrows_version(void); /* "0.1.0" */

typedef int32_t narrows_token;
typedef struct narrows_model narrows_model;
typedef struct narrows_session narrows_session;
typedef struct narrows_sampler narrows_sampler;
typedef struct narrows_batch narrows_batch;

/* --- models */

typedef struct narrows_model_options {
  size_t struct_size;
  int32_t repack;        /* 1 (default): hold quantised weights in tiles of our own; 0: in the file's rows */
  int32_t float_weights; /* 1: unpack all weights to float32 at load, to measure caches; default 0 */
} narrows_model_options;

void narrows_model_options_init_size(narrows_model_options* options, size_t struct_size);
static inline void narrows_model_options_init(narrows_model_options* options) {
  narrows_model_options_init_size(options, sizeof *options);
}

/* options may be NULL: the defaults. *model is NULL after an error. The file stays open and must not be
 * overwritten while the model is in use. */
narrows_status narrows_model_load(const char* path, const narrows_model_options* options,
                                  narrows_model** model);
void narrows_model_free(narrows_model* model);

typedef struct narrows_model_info {
  size_t struct_size;       /* of the caller's struct, set before narrows_model_get_info() */
  const char* architecture; /* "llama", "qwen2", ...; texts live as long as the model's handle */
  const char* name;         /* may be "" */
  const char* fingerprint;  /* 16 hex digits */
  int64_t n_layer, n_embd, n_ff, n_head, n_head_kv, head_dim, n_vocab;
  int64_t n_ctx_train;       /* context the model was made for */
  int64_t weight_bytes;      /* tensor data in the file */
  int64_t has_chat_template; /* 1 if the file carries one */
} narrows_model_info;

narrows_status narrows_model_get_info(const narrows_model* model, narrows_model_info* info);

/* --- text and tokens */

/* add_special: put the BOS token that the file asks for; parse_special: "<|im_start|>" is one token. */
narrows_status narrows_tokenize(const narrows_model* model, const char* text, size_t n_bytes, int add_special,
                                int parse_special, narrows_token* tokens, size_t capacity, size_t* n_tokens);

/* The bytes of the tokens, with a zero byte behind them that *n_bytes does not count: capacity must be above
 * *n_bytes. special: show control tokens too. Bytes of one token may be a part of a character. */
narrows_status narrows_detokenize(const narrows_model* model, const narrows_token* tokens, size_t n_tokens,
                                  int special, char* text, size_t capacity, size_t* n_bytes);

/* 1 for every token that ends a generation, else 0 (also for NULL). */
int narrows_is_end(const narrows_model* model, narrows_token token);

typedef struct narrows_chat_message {
  const char* role; /* "system", "user" or "assistant" */
  const char* content;
} narrows_chat_message;

/* A conversation through the model's chat template (ChatML if the file has none), as text ... */
narrows_status narrows_chat_render(const narrows_model* model, const narrows_chat_message* messages, size_t n,
                                   int add_generation_prompt, char* text, size_t capacity, size_t* n_bytes);
/* ... and as tokens: what looks like a control token in a message is text. */
narrows_status narrows_chat_tokenize(const narrows_model* model, const narrows_chat_message* messages,
                                     size_t n, int add_generation_prompt, narrows_token* tokens,
                                     size_t capacity, size_t* n_tokens);

/* --- sessions */

typedef struct narrows_session_options {
  size_t struct_size;
  const char* kv;         /* cache profile, as `narrows run --kv`; NULL (default): "klt" */
  const char* basis_path; /* file made by `narrows calibrate`; NULL: the prompt calibrates */
  const char* products;   /* of prompts: "auto" (default, also NULL), "int8", "bf16" */
  const char* attention;  /* of prompts: "auto" (default, also NULL), "f32", "bf16", ...: as --attention */
  const char* prefill;    /* "dense" (default, also NULL), "sparse" or "sparse:mass=X" */
  int64_t n_ctx;          /* most tokens the cache may hold; 0 (default): the model's n_ctx_train */
  int32_t n_threads;      /* 0 (default): one a core that the process may use */
  int32_t segments;       /* 1: read prompts in segments, which prefixes can be kept and shared at */
} narrows_session_options;

void narrows_session_options_init_size(narrows_session_options* options, size_t struct_size);
static inline void narrows_session_options_init(narrows_session_options* options) {
  narrows_session_options_init_size(options, sizeof *options);
}

narrows_status narrows_session_create(const narrows_model* model, const narrows_session_options* options,
                                      narrows_session** session);
void narrows_session_free(narrows_session* session);

/* Called now and then with the share done in [0, 1]; 0 cancels, anything else goes on. */
typedef int (*narrows_progress)(double done, void* user);

/* Reads tokens on top of what the cache holds; then there are logits after the last. progress may be NULL.
 * NARROWS_CONTEXT_FULL leaves the session untouched; after NARROWS_CANCELLED or another error of the work it
 * is unusable until narrows_session_reset() or narrows_session_go_back(). */
narrows_status narrows_session_prefill(narrows_session* session, const narrows_token* tokens, size_t n_tokens,
                                       narrows_progress progress, void* user);
/* The same in pieces of some tens of milliseconds: steps until narrows_session_prefill_done() is 1. */
narrows_status narrows_session_begin_prefill(narrows_session* session, const narrows_token* tokens,
                                             size_t n_tokens);
narrows_status narrows_session_prefill_step(narrows_session* session);
double narrows_session_prefill_done(const narrows_session* session); /* -1 for NULL */
/* Of the last prompt: the share of the keys that was read where some could be left out. -1 for NULL. */
double narrows_session_prompt_read(const narrows_session* session);

/* Appends one token and computes the logits after it. */
narrows_status narrows_session_decode(narrows_session* session, narrows_token token);
/* [n_vocab] float32, valid until the next call on the session; *n (may be NULL) is their number. NULL for
 * NULL. */
const float* narrows_session_logits(const narrows_session* session, size_t* n);

int64_t narrows_session_n_past(const narrows_session* session); /* tokens in the cache; these: -1 for NULL */
int64_t narrows_session_n_ctx(const narrows_session* session);
int64_t narrows_session_n_threads(const narrows_session* session);

narrows_status narrows_session_reset(narrows_session* session); /* forgets all tokens, keeps the buffers */
/* Forgets tokens from n on, and as many before it as must go with them: *n_left (may be NULL) are left, and
 * no logits until the next prompt. */
narrows_status narrows_session_go_back(narrows_session* session, int64_t n, int64_t* n_left);

/* For sessions with `segments`: the last end of a segment at or before n that can be gone back to, 0 if none
 * (-1 for NULL); becoming the first n tokens of another session of the same model and options, n such an end.
 */
int64_t narrows_session_kept_prefix(const narrows_session* session, int64_t n);
narrows_status narrows_session_share_prefix(narrows_session* session, const narrows_session* from, int64_t n);

typedef struct narrows_cache_stats {
  size_t struct_size; /* of the caller's struct, set before narrows_session_get_cache_stats() */
  int64_t n_tokens;
  int64_t bytes;                   /* of all layers, as allocated */
  int64_t bytes_f16;               /* what the same tokens take as f16 */
  int64_t bytes_compressed_layers; /* the part of `bytes` in layers that the profile compresses */
  int64_t bytes_f16_compressed_layers;
  int64_t bytes_pages;     /* encoded pages alone */
  int64_t bytes_f16_pages; /* f16 bytes of the tokens in them */
  int64_t bytes_hot;       /* klt: rebuilt keys kept from step to step */
  int64_t n_layer_compressed;
} narrows_cache_stats;

narrows_status narrows_session_get_cache_stats(const narrows_session* session, narrows_cache_stats* stats);

/* What all models and sessions of the process have been promised of its memory, bytes, each counted once.
 * What does not fit beside it is refused with NARROWS_OUT_OF_MEMORY before it begins. */
typedef struct narrows_memory_stats {
  size_t struct_size; /* of the caller's struct, set before narrows_memory_get_stats() */
  int64_t weights;
  int64_t caches;  /* pages that sessions share once */
  int64_t scratch; /* what steps work in */
  int64_t prompts; /* what prompts that are being read work in */
  int64_t files;   /* session files that are being read */
  int64_t limit;   /* narrows_memory_set_limit(); 0: none */
  int64_t free;    /* that may still be promised; INT64_MAX: unknown, and no limit */
} narrows_memory_stats;

narrows_status narrows_memory_get_stats(narrows_memory_stats* stats);
/* Most bytes of all that together; 0 (as it is): as many as the system and its control groups can give. */
narrows_status narrows_memory_set_limit(int64_t bytes);

/* Writes the session with the n_past tokens of its cache; the file is whole or not there. */
narrows_status narrows_session_save(const narrows_session* session, const narrows_token* tokens,
                                    size_t n_tokens, const char* path);
/* Goes on to the last bit as the saved one would have. kv and segments are the file's. */
narrows_status narrows_session_load(const narrows_model* model, const narrows_session_options* options,
                                    const char* path, narrows_session** session);
/* The tokens that came with the file; none for a session that was not loaded. */
narrows_status narrows_session_saved_tokens(const narrows_session* session, narrows_token* tokens,
                                            size_t capacity, size_t* n_tokens);

/* --- sampling */

typedef struct narrows_logit_bias {
  narrows_token token;
  float bias; /* added before anything else; -infinity forbids the token */
} narrows_logit_bias;

typedef struct narrows_sampler_options {
  size_t struct_size;
  const char* grammar; /* GBNF that the answer follows, from its rule root; NULL: free text */
  const narrows_logit_bias* logit_bias; /* [n_logit_bias] */
  size_t n_logit_bias;
  float temperature;       /* 0.7; 0 is greedy, then the filters have no effect */
  int32_t top_k;           /* 40; 0 is off */
  float top_p;             /* 0.95; 1 is off */
  float min_p;             /* 0.05; 0 is off */
  float repeat_penalty;    /* 1 is off */
  float presence_penalty;  /* 0 is off */
  float frequency_penalty; /* 0 is off */
  int32_t repeat_last_n;   /* 64: tokens that the penalties look back on */
  uint32_t seed;           /* 0: a seed as any other; draws are the same for the same seed */
  uint32_t reserved;       /* 0 */
} narrows_sampler_options;

void narrows_sampler_options_init_size(narrows_sampler_options* options, size_t struct_size);
static inline void narrows_sampler_options_init(narrows_sampler_options* options) {
  narrows_sampler_options_init_size(options, sizeof *options);
}

narrows_status narrows_sampler_create(const narrows_model* model, const narrows_sampler_options* options,
                                      narrows_sampler** sampler);
void narrows_sampler_free(narrows_sampler* sampler);
/* Draws from logits [n]; does not accept the token. */
narrows_status narrows_sampler_sample(narrows_sampler* sampler, const float* logits, size_t n,
                                      narrows_token* token);
/* The token was emitted: the penalties count it, the grammar goes on. A token that the grammar forbids is an
 * error of the next sample(). */
narrows_status narrows_sampler_accept(narrows_sampler* sampler, narrows_token token);
/* The token was in the prompt: the penalties count it. */
narrows_status narrows_sampler_accept_prompt(narrows_sampler* sampler, narrows_token token);

/* --- sessions that step together */

/* For up to max_sessions (64 at most) sessions of the model with n_threads threads each, 0 as in the options.
 */
narrows_status narrows_batch_create(const narrows_model* model, int32_t max_sessions, int32_t n_threads,
                                    narrows_batch** batch);
void narrows_batch_free(narrows_batch* batch);
/* narrows_session_decode(sessions[i], tokens[i]) for i < n at the cost of one pass over the weights, with the
 * same bits; each[i] says how it went. A session that cannot is left out and as it was. The status itself is
 * of the arguments and the step as a whole. */
narrows_status narrows_batch_decode(narrows_batch* batch, narrows_session* const* sessions,
                                    const narrows_token* tokens, size_t n, narrows_status* each);
/* The sentence for each[i] of the last step, "" if it went well. Valid until the next step. */
const char* narrows_batch_error(const narrows_batch* batch, size_t i);

#ifdef __cplusplus
}
#endif

#endif
