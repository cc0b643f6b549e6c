// Reads and checks Hparams. Ranges are wide enough for any real model and tight enough that no product of two
// sizes overflows 64 bits later on.
#include "gguf/hparams.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

#include "base/utf8.h"

namespace narrows {

namespace {

/// Seven times the longest context of any model (10M); RoPE's table grows with it and stays below 140 MB at
/// head_dim 128.
constexpr int64_t kMaxContext = int64_t{1} << 26;

/// Reads keys below "<arch>." and keeps the first failure, so that the reader below is a plain list.
class KeyReader {
 public:
  KeyReader(const GgufFile& file, std::string prefix) : file_(file), prefix_(std::move(prefix)) {}

  int64_t integer(const std::string& key, std::optional<int64_t> fallback, int64_t low, int64_t high) {
    const Result<std::optional<int64_t>> r = file_.integer(prefix_ + key);
    if (!r.ok()) return fail(r.status(), low);
    if (!r->has_value() && !fallback) return fail(missing(key), low);
    const int64_t v = r->value_or(fallback.value_or(0));
    if (v < low || v > high) {
      return fail(bad(fmt::format("metadata {}{} = {} is not between {} and {}", prefix_, key, v, low, high)),
                  low);
    }
    return v;
  }

  double real(const std::string& key, std::optional<double> fallback, double low, double high) {
    const Result<std::optional<double>> r = file_.real(prefix_ + key);
    if (!r.ok()) return fail(r.status(), low);
    if (!r->has_value() && !fallback) return fail(missing(key), low);
    const double v = r->value_or(fallback.value_or(0));
    if (!(v >= low && v <= high)) {
      return fail(bad(fmt::format("metadata {}{} = {} is not between {} and {}", prefix_, key, v, low, high)),
                  low);
    }
    return v;
  }

  std::string text(const std::string& key, const std::string& fallback) {
    const Result<std::optional<std::string>> r = file_.text(prefix_ + key);
    if (!r.ok()) return fail(r.status(), std::string());
    return r->value_or(fallback);
  }

  bool has(const std::string& key) const {
    const auto r = file_.integer(prefix_ + key);
    return r.ok() && r->has_value();
  }

  const Status& status() const { return status_; }

  Status bad(const std::string& what) const {
    return {StatusCode::invalid_file, fmt::format("{}: {}", file_.path(), what)};
  }
  Status unsupported(const std::string& what) const {
    return {StatusCode::unsupported, fmt::format("{}: {}", file_.path(), what)};
  }

 private:
  template <class T>
  T fail(Status s, T value) {
    if (status_.ok()) status_ = std::move(s);
    return value;
  }
  Status missing(const std::string& key) const {
    return bad(fmt::format("metadata {}{} is missing", prefix_, key));
  }

  const GgufFile& file_;
  std::string prefix_;
  Status status_;
};

/// YaRN's growth of the attention temperature with the scaling factor.
double yarn_mscale(double factor, double mscale) {
  return factor <= 1 ? 1 : 0.1 * mscale * std::log(factor) + 1;
}

Status read_rope(KeyReader& keys, Hparams& hp) {
  kernels::RopeParams& r = hp.rope;
  r.n_rot = keys.integer("rope.dimension_count", hp.head_dim, 2, hp.head_dim);
  r.freq_base = keys.real("rope.freq_base", 10000.0, 1e-3, 1e15);
  r.n_ctx_orig = keys.integer("rope.scaling.original_context_length", hp.n_ctx_train, 1, int64_t{1} << 40);
  const double old_factor = keys.real("rope.scale_linear", 0.0, 0.0, 1e6);
  const double factor = keys.real("rope.scaling.factor", old_factor, 0.0, 1e6);
  const std::string kind = keys.text("rope.scaling.type", "linear");
  r.attn_factor = keys.real("rope.scaling.attn_factor", 1.0, 1e-6, 1e6);
  if (!keys.status().ok()) return keys.status();
  if (r.n_rot % 2 != 0) return keys.bad(fmt::format("rope.dimension_count = {} is odd", r.n_rot));

  if (kind != "none" && factor > 0) r.freq_scale = 1.0 / factor;
  if (kind == "yarn") {
    r.ext_factor = keys.real("rope.scaling.yarn_ext_factor", 1.0, -1.0, 1e3);
    if (r.ext_factor < 0) r.ext_factor = 1.0;
    r.attn_factor *= keys.real("rope.scaling.yarn_attn_factor", 1.0, 1e-6, 1e6);
    r.beta_fast = keys.real("rope.scaling.yarn_beta_fast", 32.0, 0.0, 1e6);
    r.beta_slow = keys.real("rope.scaling.yarn_beta_slow", 1.0, 0.0, 1e6);
    const double log_multiplier = keys.real("rope.scaling.yarn_log_multiplier", 0.0, 0.0, 1e3);
    if (log_multiplier != 0) r.attn_factor /= yarn_mscale(1.0 / r.freq_scale, log_multiplier);
  } else if (kind != "linear" && kind != "none") {
    return keys.unsupported(
        fmt::format("RoPE scaling {} is not supported, this build has none, linear and yarn", quote(kind)));
  }
  return keys.status();
}

}  // namespace

const std::vector<std::string>& supported_architectures() {
  static const std::vector<std::string> names = {"llama", "qwen2", "qwen3"};
  return names;
}

Result<Hparams> read_hparams(const GgufFile& file) {
  Hparams hp;
  Result<std::optional<std::string>> arch = file.text("general.architecture");
  if (!arch.ok()) return arch.status();
  if (!arch->has_value()) {
    return Status(StatusCode::invalid_file,
                  fmt::format("{}: metadata general.architecture is missing", file.path()));
  }
  hp.architecture = **arch;
  const auto& known = supported_architectures();
  if (std::find(known.begin(), known.end(), hp.architecture) == known.end()) {
    return Status(StatusCode::unsupported,
                  fmt::format("{}: architecture {} is not supported, this build runs {}", file.path(),
                              quote(hp.architecture), fmt::join(known, ", ")));
  }
  Result<std::optional<std::string>> name = file.text("general.name");
  if (!name.ok()) return name.status();
  hp.name = name->value_or("");

  KeyReader keys(file, hp.architecture + ".");
  hp.n_layer = keys.integer("block_count", std::nullopt, 1, 4096);
  hp.n_embd = keys.integer("embedding_length", std::nullopt, 1, 1 << 20);
  hp.n_ff = keys.integer("feed_forward_length", std::nullopt, 1, 1 << 22);
  hp.n_head = keys.integer("attention.head_count", std::nullopt, 1, 1 << 14);
  hp.n_head_kv = keys.integer("attention.head_count_kv", hp.n_head, 1, hp.n_head);
  hp.n_ctx_train = keys.integer("context_length", std::nullopt, 1, kMaxContext);
  const int64_t n_expert = keys.integer("expert_count", 0, 0, 1 << 20);
  const bool has_head_dim = keys.has("attention.key_length");
  if (!keys.status().ok()) return keys.status();
  if (!has_head_dim && hp.n_embd % hp.n_head != 0) {
    return keys.bad(
        fmt::format("embedding_length {} is no multiple of attention.head_count {}", hp.n_embd, hp.n_head));
  }
  hp.head_dim = keys.integer("attention.key_length", hp.n_embd / hp.n_head, 2, 4096);
  const int64_t value_dim = keys.integer("attention.value_length", hp.head_dim, 1, 4096);
  hp.rms_eps = static_cast<float>(keys.real("attention.layer_norm_rms_epsilon", std::nullopt, 0.0, 1.0));
  const double plain_scale = 1.0 / std::sqrt(static_cast<double>(hp.head_dim));
  const double scale = keys.real("attention.scale", 0.0, 0.0, 1e6);
  hp.attention_scale = static_cast<float>(scale == 0 ? plain_scale : scale);
  if (Status s = read_rope(keys, hp); !s.ok()) return s;

  const std::optional<int64_t> vocabulary = file.array_size("tokenizer.ggml.tokens");
  if (!vocabulary || *vocabulary < 1) return keys.bad("metadata tokenizer.ggml.tokens is missing or empty");
  hp.n_vocab = *vocabulary;
  if (n_expert > 0) {
    return Status(
        StatusCode::unsupported,
        fmt::format("{}: mixture-of-experts models ({} experts) are not supported", file.path(), n_expert));
  }
  if (hp.n_head % hp.n_head_kv != 0) {
    return keys.bad(
        fmt::format("attention.head_count {} is no multiple of head_count_kv {}", hp.n_head, hp.n_head_kv));
  }
  if (value_dim != hp.head_dim) {
    return Status(StatusCode::unsupported,
                  fmt::format("{}: keys of {} and values of {} coordinates a head: they must be equal",
                              file.path(), hp.head_dim, value_dim));
  }
  hp.rope_neighbours = hp.architecture == "llama";
  hp.qk_norm = hp.architecture == "qwen3";
  return hp;
}

}  // namespace narrows
