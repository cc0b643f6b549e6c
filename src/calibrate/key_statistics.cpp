// Runs the text through a Prefill whose hook adds the keys up.
#include "calibrate/key_statistics.h"

#include <fmt/format.h>

#include <algorithm>
#include <thread>

#include "engine/session_impl.h"
#include "narrows/sampling.h"

namespace narrows {

Result<std::vector<KeyMoments>> gather_key_moments(const Model& model, std::span<const Token> text,
                                                   int n_threads, const ProgressFn& progress) {
  const Hparams& hp = model.weights().hparams();
  const int64_t width = hp.n_head_kv * hp.head_dim;
  const auto n = static_cast<int64_t>(text.size());
  if (n < 2 * width + kSkipTokens) {
    return Status(
        StatusCode::invalid_argument,
        fmt::format("{} tokens are too few for statistics of {} key coordinates, give a text of at least {}",
                    n, width, 2 * width + kSkipTokens));
  }
  const int64_t sequence = std::min(kSequence, hp.n_ctx_train);
  if (n_threads == 0) n_threads = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  kernels::RopeTable rope(hp.rope, sequence);
  GraphRunner runner(n_threads);
  Prefill prefill(model.weights(), rope, runner);
  std::vector<KeyMoments> moments(static_cast<size_t>(hp.n_layer), KeyMoments(width));
  PrefillHooks hooks;
  hooks.layer_done = [&](int64_t layer, const float* k, const float* /*v*/, int64_t rows) -> Status {
    const int64_t skip = std::min(kSkipTokens, rows);
    moments[static_cast<size_t>(layer)].add(k + skip * width, rows - skip);
    return {};
  };
  std::vector<float> logits(static_cast<size_t>(hp.n_vocab));
  for (int64_t at = 0; at < n; at += sequence) {
    const int64_t rows = std::min(sequence, n - at);
    const auto part = [&](double done) {
      const double whole =
          (static_cast<double>(at) + done * static_cast<double>(rows)) / static_cast<double>(n);
      return !progress || progress(whole);
    };
    const auto tokens = text.subspan(static_cast<size_t>(at), static_cast<size_t>(rows));
    if (Status s = prefill.run(tokens, 0, hooks, part, logits.data()); !s.ok()) return s;
  }
  return moments;
}

Result<BasisFile> calibrate(const Model& model, std::span<const Token> text, const std::string& made_from,
                            int n_threads, const ProgressFn& progress) {
  Result<std::vector<KeyMoments>> moments = gather_key_moments(model, text, n_threads, progress);
  if (!moments.ok()) return moments.status();
  const ModelInfo& info = model.info();
  BasisFile file;
  file.fingerprint = info.fingerprint;
  file.made_from = made_from;
  file.n_tokens = static_cast<int64_t>(text.size());
  for (size_t i = 0; i < moments->size(); ++i) {
    Result<LayerBasis> basis = (*moments)[i].leading(info.n_head_kv * info.head_dim);
    if (!basis.ok())
      return Status(basis.status().code(), fmt::format("layer {}: {}", i, basis.status().message()));
    file.layers.push_back(std::move(*basis));
  }
  return file;
}

Result<std::vector<Token>> write_own_text(std::shared_ptr<const Model> model, int64_t n_tokens, int n_threads,
                                          const ProgressFn& progress) {
  const Tokenizer& tokenizer = model->tokenizer();
  Result<std::vector<Token>> start = tokenizer.encode("\n", true, false);
  if (!start.ok()) return start.status();
  SessionOptions options;
  options.n_threads = n_threads;
  Result<std::unique_ptr<Session>> session = Session::create(model, options);
  if (!session.ok()) return session.status();
  SamplerOptions sampling;
  sampling.temperature = 1.0F;
  sampling.top_k = 0;
  sampling.top_p = 1.0F;
  sampling.min_p = 0.0F;
  Result<std::unique_ptr<Sampler>> sampler = Sampler::create(sampling);
  if (!sampler.ok()) return sampler.status();
  std::vector<Token> text;
  bool fresh = true;
  while (static_cast<int64_t>(text.size()) < n_tokens) {
    // A document ends at an end token or a full context; then the model begins another.
    if (fresh) {
      (*session)->reset();
      if (Status s = (*session)->prefill(*start); !s.ok()) return s;
    }
    Result<Token> token = (*sampler)->sample((*session)->logits());
    if (!token.ok()) return token.status();
    fresh = tokenizer.is_end(*token) || (*session)->n_past() >= (*session)->n_ctx();
    if (fresh) continue;
    text.push_back(*token);
    if (Status s = (*session)->decode(*token); !s.ok()) return s;
    if (progress && !progress(static_cast<double>(text.size()) / static_cast<double>(n_tokens))) {
      return Status(StatusCode::cancelled, "calibration was cancelled");
    }
  }
  return text;
}

}  // namespace narrows
