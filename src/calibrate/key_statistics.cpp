// Runs the text through a Prefill whose hook adds the keys up.
#include "calibrate/key_statistics.h"

#include <fmt/format.h>

#include <algorithm>
#include <functional>

#include "base/cgroup.h"
#include "engine/session_impl.h"
#include "engine/value_weight.h"
#include "kv/klt/klt_layer.h"
#include "narrows/sampling.h"

namespace narrows {

namespace {

/// Called with the rows of one sequence, n of them: keys before RoPE and values [n, D], or queries [n,
/// n_head, head_dim].
struct Gather {
  std::function<void(int64_t layer, const float* k, const float* v, int64_t n)> rows;
  std::function<void(int64_t layer, const float* q, int64_t n)> queries;
};

/// Runs the text through the model in sequences; the first kSkipTokens of each are left out of `rows`.
Status run_text(const Model& model, std::span<const Token> text, int n_threads, const ProgressFn& progress,
                const Gather& gather) {
  const ModelParts& parts = parts_of(model);
  if (parts.spec().n_recurrent() > 0) {
    return {StatusCode::unsupported,
            "statistics of keys are not made of models with recurrent layers yet; klt and the SALS profiles "
            "learn from the prompt instead"};
  }
  const int64_t width = model.info().n_head_kv * model.info().head_dim;
  const auto n = static_cast<int64_t>(text.size());
  if (n < 2 * width + kSkipTokens) {
    return Status(
        StatusCode::invalid_argument,
        fmt::format("{} tokens are too few for statistics of {} key coordinates, give a text of at least {}",
                    n, width, 2 * width + kSkipTokens));
  }
  const int64_t sequence = std::min(kSequence, model.info().n_ctx_train);
  if (n_threads == 0) n_threads = usable_cores();
  const std::vector<kernels::RopeTable> ropes = rope_tables(parts.spec(), sequence);
  Result<ExecutorLease> executor = ExecutorLease::take(parts.executors, n_threads);
  if (!executor.ok()) return executor.status();
  Prefill prefill(*parts.weights, parts.plan, ropes, **executor);
  PrefillHooks hooks;
  hooks.queries = gather.queries;
  hooks.layer_done = [&](int64_t layer, const float* k, const float* v, int64_t rows) -> Status {
    const int64_t skip = std::min(kSkipTokens, rows);
    gather.rows(layer, k + skip * width, v + skip * width, rows - skip);
    return {};
  };
  std::vector<float> logits(static_cast<size_t>(model.info().n_vocab));
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
  return {};
}

}  // namespace

Result<std::vector<KeyMoments>> gather_key_moments(const Model& model, std::span<const Token> text,
                                                   int n_threads, const ProgressFn& progress) {
  const ModelInfo& info = model.info();
  std::vector<KeyMoments> moments(static_cast<size_t>(info.n_layer),
                                  KeyMoments(info.n_head_kv * info.head_dim));
  Gather gather;
  gather.rows = [&](int64_t layer, const float* k, const float* /*v*/, int64_t n) {
    moments[static_cast<size_t>(layer)].add(k, n);
  };
  if (Status s = run_text(model, text, n_threads, progress, gather); !s.ok()) return s;
  return moments;
}

Result<BasisFile> calibrate(const Model& model, std::span<const Token> text, const std::string& made_from,
                            int n_threads, const ProgressFn& progress) {
  const ModelInfo& info = model.info();
  const ModelSpec& spec = parts_of(model).spec();
  const auto n_layer = static_cast<size_t>(info.n_layer);
  std::vector<KeyMoments> moments(n_layer, KeyMoments(info.n_head_kv * info.head_dim));
  std::vector<KltStatistics> statistics(n_layer, KltStatistics(attention_shape(spec)));
  Gather gather;
  gather.rows = [&](int64_t layer, const float* k, const float* v, int64_t n) {
    moments[static_cast<size_t>(layer)].add(k, n);
    statistics[static_cast<size_t>(layer)].add(k, v, n);
  };
  gather.queries = [&](int64_t layer, const float* q, int64_t n) {
    statistics[static_cast<size_t>(layer)].add_queries(q, n);
  };
  if (Status s = run_text(model, text, n_threads, progress, gather); !s.ok()) return s;

  BasisFile file;
  file.fingerprint = info.fingerprint;
  file.made_from = made_from;
  file.n_tokens = static_cast<int64_t>(text.size());
  // Caches that use the file may be longer than its text: distances up to a usual context.
  const std::vector<kernels::RopeTable> ropes =
      rope_tables(spec, std::min<int64_t>(kCalibratedReach, spec.n_ctx_train));
  std::vector<DistanceAverage> distances;
  for (const kernels::RopeTable& rope : ropes) distances.emplace_back(rope, info.head_dim);
  const auto rope_of = [&](size_t i) { return static_cast<size_t>(spec.layers[i].attention.rope); };
  for (size_t i = 0; i < n_layer; ++i) {
    const auto in_layer = [i](const Status& s) {
      return Status(s.code(), fmt::format("layer {}: {}", i, s.message()));
    };
    Result<LayerBasis> basis = moments[i].leading(info.n_head_kv * info.head_dim);
    if (!basis.ok()) return in_layer(basis.status());
    file.layers.push_back(std::move(*basis));
    std::vector<double> weight;
    if (Status s = value_weight(*parts_of(model).weights, static_cast<int64_t>(i), weight); !s.ok())
      return in_layer(s);
    Result<KltLayerBasis> klt = statistics[i].basis(distances[rope_of(i)], weight);
    if (!klt.ok()) return in_layer(klt.status());
    file.klt.push_back(std::move(*klt));
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
