// One llama_context, one batch, logits of every token.
#include "support/llama_reference.h"

#include <llama.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "text/llama_log.h"

namespace narrows::testing {

LogitRows llama_logits(const std::string& gguf_path, std::span<const Token> tokens, LlamaWay way) {
  silence_llama_log();
  clear_llama_error();
  llama_backend_init();
  const auto give_up = [&] {
    (void)std::fprintf(stderr, "libllama refuses %s: %s\n", gguf_path.c_str(), llama_error().c_str());
    std::abort();
  };
  const auto n = static_cast<int32_t>(tokens.size());
  llama_model_params mp = llama_model_default_params();
  // The plain kernels, the same on every CPU: with AMX f16 weights are multiplied in float32, and what half
  // precision costs could not be told from them.
  mp.use_extra_bufts = false;
  mp.n_gpu_layers = 0;
  llama_model* model = llama_model_load_from_file(gguf_path.c_str(), mp);
  if (model == nullptr) give_up();
  llama_context_params cp = llama_context_default_params();
  cp.n_ctx = static_cast<uint32_t>(n);
  cp.n_batch = static_cast<uint32_t>(n);
  cp.n_ubatch = 512;
  cp.n_threads = 1;
  cp.n_threads_batch = 1;
  cp.flash_attn_type =
      way == LlamaWay::f16_flash ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
  cp.type_k = way == LlamaWay::exact ? GGML_TYPE_F32 : GGML_TYPE_F16;
  cp.type_v = cp.type_k;
  llama_context* context = llama_init_from_model(model, cp);
  if (context == nullptr) give_up();

  LogitRows rows;
  rows.n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
  llama_batch batch = llama_batch_init(n, 0, 1);
  for (int32_t i = 0; i < n; ++i) {
    batch.token[i] = tokens[static_cast<size_t>(i)];
    batch.pos[i] = i;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = 0;
    batch.logits[i] = 1;
  }
  batch.n_tokens = n;
  if (llama_decode(context, batch) != 0) give_up();
  for (int32_t i = 0; i < n; ++i) {
    const float* row = llama_get_logits_ith(context, i);
    rows.data.insert(rows.data.end(), row, row + rows.n_vocab);
  }
  llama_batch_free(batch);
  llama_free(context);
  llama_model_free(model);
  return rows;
}

std::vector<float> llama_embedding(const std::string& gguf_path, std::span<const Token> tokens,
                                   LlamaPooling pooling) {
  silence_llama_log();
  clear_llama_error();
  llama_backend_init();
  const auto give_up = [&] {
    (void)std::fprintf(stderr, "libllama refuses %s: %s\n", gguf_path.c_str(), llama_error().c_str());
    std::abort();
  };
  const auto n = static_cast<uint32_t>(tokens.size());
  llama_model_params mp = llama_model_default_params();
  mp.use_extra_bufts = false;
  mp.n_gpu_layers = 0;
  llama_model* model = llama_model_load_from_file(gguf_path.c_str(), mp);
  if (model == nullptr) give_up();
  llama_context_params cp = llama_context_default_params();
  cp.n_ctx = cp.n_batch = cp.n_ubatch = n;
  cp.n_threads = cp.n_threads_batch = 1;
  cp.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
  cp.type_k = cp.type_v = GGML_TYPE_F32;
  cp.embeddings = true;
  cp.pooling_type = pooling == LlamaPooling::mean ? LLAMA_POOLING_TYPE_MEAN : LLAMA_POOLING_TYPE_LAST;
  llama_context* context = llama_init_from_model(model, cp);
  if (context == nullptr) give_up();
  std::vector<Token> copy(tokens.begin(), tokens.end());
  if (llama_decode(context, llama_batch_get_one(copy.data(), static_cast<int32_t>(n))) != 0) give_up();
  const float* pooled = llama_get_embeddings_seq(context, 0);
  if (pooled == nullptr) give_up();
  std::vector<float> result(pooled, pooled + llama_model_n_embd(model));
  llama_free(context);
  llama_model_free(model);
  return result;
}

}  // namespace narrows::testing
