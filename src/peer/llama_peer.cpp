// The peer over libllama's C API, with llama.cpp's own batch sizes: n_batch 2048 in steps of 512.
#include "peer/llama_peer.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <llama.h>

#include <algorithm>
#include <array>
#include <vector>

#include "base/utf8.h"
#include "text/llama_log.h"

namespace narrows {

struct LlamaPeer::Impl {
  llama_model* model = nullptr;
  llama_context* context = nullptr;
  int64_t n_past = 0;
  int64_t n_vocab = 0;
  int64_t n_ctx = 0;

  ~Impl() {
    if (context != nullptr) llama_free(context);
    if (model != nullptr) llama_model_free(model);
  }
};

namespace {

void override_rope(const RopeOverrides& o, llama_context_params& cp) {
  using Scaling = RopeOverrides::Scaling;
  if (o.scaling == Scaling::none) cp.rope_scaling_type = LLAMA_ROPE_SCALING_TYPE_NONE;
  if (o.scaling == Scaling::linear) cp.rope_scaling_type = LLAMA_ROPE_SCALING_TYPE_LINEAR;
  if (o.scaling == Scaling::yarn) cp.rope_scaling_type = LLAMA_ROPE_SCALING_TYPE_YARN;
  cp.rope_freq_base = static_cast<float>(o.freq_base);
  cp.rope_freq_scale = static_cast<float>(o.freq_scale);
  cp.yarn_orig_ctx = static_cast<uint32_t>(o.yarn_orig_ctx);
  cp.yarn_ext_factor = static_cast<float>(o.yarn_ext_factor);
  cp.yarn_attn_factor = static_cast<float>(o.yarn_attn_factor);
  cp.yarn_beta_slow = static_cast<float>(o.yarn_beta_slow);
  cp.yarn_beta_fast = static_cast<float>(o.yarn_beta_fast);
}

/// As llama.cpp's --cache-type-k takes them.
constexpr std::array<ggml_type, 9> kKvTypes = {GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16,
                                               GGML_TYPE_Q8_0, GGML_TYPE_Q5_1, GGML_TYPE_Q5_0,
                                               GGML_TYPE_Q4_1, GGML_TYPE_Q4_0, GGML_TYPE_IQ4_NL};

struct KvTypes {
  ggml_type k, v;
};

/// Of "q8_0" or "q8_0/q4_0".
Result<KvTypes> parse_kv(const std::string& kv) {
  const size_t stroke = kv.find('/');
  KvTypes types = {};
  for (ggml_type* type : {&types.k, &types.v}) {
    const std::string name = stroke == std::string::npos ? kv
                             : type == &types.k          ? kv.substr(0, stroke)
                                                         : kv.substr(stroke + 1);
    const auto found = std::find_if(kKvTypes.begin(), kKvTypes.end(),
                                    [&](ggml_type t) { return name == ggml_type_name(t); });
    if (found == kKvTypes.end()) {
      return Status(
          StatusCode::invalid_argument,
          fmt::format("llama.cpp has no cache {}; it has {}, or two of them with a stroke between, keys "
                      "first: q8_0/q4_0",
                      quote(kv), fmt::join(LlamaPeer::kv_types(), ", ")));
    }
    *type = *found;
  }
  return types;
}

}  // namespace

std::vector<std::string> LlamaPeer::kv_types() {
  std::vector<std::string> names;
  for (const ggml_type type : kKvTypes) names.emplace_back(ggml_type_name(type));
  return names;
}

Status LlamaPeer::check_kv(const std::string& kv) { return parse_kv(kv).status(); }

LlamaPeer::LlamaPeer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
LlamaPeer::~LlamaPeer() = default;

Result<std::unique_ptr<LlamaPeer>> LlamaPeer::create(const std::string& gguf_path,
                                                     const LlamaPeerOptions& options) {
  const Result<KvTypes> types = parse_kv(options.kv);
  if (!types.ok()) return types.status();
  const LlamaAbortGuard guard;  // libllama asserts what a file says: a RoPE over half a head, for one
  clear_llama_error();
  llama_backend_init();
  auto impl = std::make_unique<Impl>();
  llama_model_params mp = llama_model_default_params();
  mp.n_gpu_layers = 0;
  impl->model = llama_model_load_from_file(gguf_path.c_str(), mp);
  if (impl->model == nullptr) {
    return Status(StatusCode::invalid_file,
                  fmt::format("{}: llama.cpp cannot load it: {}", gguf_path, llama_error()));
  }
  llama_context_params cp = llama_context_default_params();
  cp.n_ctx = static_cast<uint32_t>(options.n_ctx);
  cp.n_batch = 2048;
  cp.n_ubatch = 512;
  cp.n_threads = options.n_threads;
  cp.n_threads_batch = options.n_threads;
  cp.flash_attn_type =
      options.flash_attention ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
  cp.type_k = types->k;
  cp.type_v = types->v;
  override_rope(options.rope, cp);
  impl->context = llama_init_from_model(impl->model, cp);
  if (impl->context == nullptr) {
    const std::string reason = llama_error();
    const auto says = [&](const char* text) { return reason.find(text) != std::string::npos; };
    const bool refused =
        says("GGML_ASSERT") || says("does not divide") || says("Flash Attention") || says("flash_attn");
    return Status(refused ? StatusCode::unsupported : StatusCode::out_of_memory,
                  fmt::format("{}: llama.cpp gave no context of {} tokens with a cache of {}: {}", gguf_path,
                              options.n_ctx, options.kv, reason));
  }
  impl->n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(impl->model));
  impl->n_ctx = options.n_ctx;
  return std::unique_ptr<LlamaPeer>(new LlamaPeer(std::move(impl)));
}

Status LlamaPeer::prefill(std::span<const Token> tokens) {
  const auto n_batch = static_cast<int64_t>(llama_n_batch(impl_->context));
  for (size_t at = 0; at < tokens.size(); at += static_cast<size_t>(n_batch)) {
    std::vector<llama_token> part(tokens.begin() + static_cast<std::ptrdiff_t>(at),
                                  tokens.begin() + static_cast<std::ptrdiff_t>(std::min(
                                                       tokens.size(), at + static_cast<size_t>(n_batch))));
    const int32_t code =
        llama_decode(impl_->context, llama_batch_get_one(part.data(), static_cast<int32_t>(part.size())));
    if (code != 0) {
      return {StatusCode::internal,
              fmt::format("llama.cpp could not compute {} tokens (code {})", part.size(), code)};
    }
    impl_->n_past += static_cast<int64_t>(part.size());
  }
  return {};
}

std::span<const float> LlamaPeer::logits() const {
  return {llama_get_logits_ith(impl_->context, -1), static_cast<size_t>(impl_->n_vocab)};
}

int64_t LlamaPeer::n_past() const { return impl_->n_past; }

int64_t LlamaPeer::kv_bytes() const {
  return static_cast<int64_t>(llama_state_seq_get_size(impl_->context, 0));
}

void LlamaPeer::clear() {
  llama_memory_clear(llama_get_memory(impl_->context), true);
  impl_->n_past = 0;
}

}  // namespace narrows
