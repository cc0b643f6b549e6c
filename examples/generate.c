/* Continues a text with the likeliest tokens, through the C API:
 *
 *   generate_c MODEL.gguf "Once upon a time" [TOKENS [PROFILE]]
 *
 * The text goes to standard output, what it took to standard error. Exit codes: 0 done, 1 it failed, 2 usage.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "narrows/narrows.h"

static int fail(const char* what) {
  fprintf(stderr, "%s: %s\n", what, narrows_last_error());
  return 1;
}

/* The prompt's tokens, to be freed; NULL after an error. */
static narrows_token* tokens_of(const narrows_model* model, const char* text, size_t* n) {
  narrows_token* tokens = NULL;
  if (narrows_tokenize(model, text, strlen(text), 1, 0, NULL, 0, n) != NARROWS_OK) return NULL;
  tokens = malloc((*n + 1) * sizeof *tokens);
  if (tokens == NULL || narrows_tokenize(model, text, strlen(text), 1, 0, tokens, *n, n) == NARROWS_OK)
    return tokens;
  free(tokens);
  return NULL;
}

static int show(const narrows_model* model, narrows_token token) {
  char piece[512];
  size_t n = 0;
  if (narrows_detokenize(model, &token, 1, 0, piece, sizeof piece, &n) != NARROWS_OK) return 0;
  return fwrite(piece, 1, n, stdout) == n;
}

static int generate(const narrows_model* model, narrows_session* session, narrows_sampler* sampler,
                    const char* prompt, long n_tokens) {
  size_t n_prompt = 0, n_logits = 0;
  narrows_token* tokens = tokens_of(model, prompt, &n_prompt);
  narrows_cache_stats stats;
  narrows_status status;
  long i;
  if (tokens == NULL) return fail("the prompt");
  status = narrows_session_prefill(session, tokens, n_prompt, NULL, NULL);
  free(tokens);
  if (status != NARROWS_OK) return fail("the prompt");
  for (i = 0; i < n_tokens; ++i) {
    const float* logits = narrows_session_logits(session, &n_logits);
    narrows_token token;
    if (narrows_sampler_sample(sampler, logits, n_logits, &token) != NARROWS_OK) return fail("sampling");
    if (narrows_is_end(model, token)) break;
    if (!show(model, token)) return fail("the output");
    if (narrows_session_decode(session, token) != NARROWS_OK) return fail("a step");
  }
  printf("\n");
  stats.struct_size = sizeof stats;
  if (narrows_session_get_cache_stats(session, &stats) != NARROWS_OK) return fail("the cache");
  fprintf(stderr, "%" PRId64 " tokens in %" PRId64 " bytes of cache (f16: %" PRId64 ")\n", stats.n_tokens,
          stats.bytes, stats.bytes_f16);
  return fflush(stdout) == 0 ? 0 : 1;
}

int main(int argc, char** argv) {
  narrows_model* model = NULL;
  narrows_session* session = NULL;
  narrows_sampler* sampler = NULL;
  narrows_session_options options;
  narrows_sampler_options sampling;
  int failed = 1;
  if (argc < 3) {
    fprintf(stderr, "usage: %s MODEL.gguf PROMPT [TOKENS [PROFILE]]\n", argv[0]);
    return 2;
  }
  narrows_session_options_init(&options);
  if (argc > 4) options.kv = argv[4];
  narrows_sampler_options_init(&sampling);
  sampling.temperature = 0;
  if (narrows_model_load(argv[1], NULL, &model) != NARROWS_OK)
    fail("the model");
  else if (narrows_session_create(model, &options, &session) != NARROWS_OK)
    fail("the session");
  else if (narrows_sampler_create(model, &sampling, &sampler) != NARROWS_OK)
    fail("the sampler");
  else
    failed = generate(model, session, sampler, argv[2], argc > 3 ? strtol(argv[3], NULL, 10) : 64);
  narrows_sampler_free(sampler);
  narrows_session_free(session);
  narrows_model_free(model);
  return failed;
}
