// Share of the exact attention probability that falls on the tokens a sparse step reads.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "base/aligned.h"
#include "engine/session_impl.h"

namespace narrows {

/// Exact rotated keys of the prompt, shared by all profiles of an eval: one transposed matrix a layer and KV
/// head.
class ExactKeys {
 public:
  /// Copies the keys out of an f16 session.
  explicit ExactKeys(const Session::Impl& reference);
  int64_t n_context() const { return n_; }
  const float* head(int64_t layer, int64_t h) const;  ///< [head_dim, n_context]

 private:
  AttentionShape shape_;
  int64_t n_ = 0;
  std::vector<AlignedArray<float>> layers_;  ///< [n_head_kv, head_dim, n]
};

/// Follows one session step by step. Keys of the decoded tokens are the session's own.
class MassKept {
 public:
  /// Watches the session's steps as long as it lives.
  MassKept(const ExactKeys& prompt, Session::Impl& session);
  ~MassKept();
  MassKept(const MassKept&) = delete;
  MassKept& operator=(const MassKept&) = delete;
  /// Queries [n_head, head_dim] and keys [D] of the last step before RoPE.
  const std::vector<float>& step_q(int64_t layer) const { return step_q_[static_cast<size_t>(layer)]; }
  const std::vector<float>& step_k(int64_t layer) const { return step_k_[static_cast<size_t>(layer)]; }

  /// After each decode().
  void observe();
  /// Mean so far; 1 if no layer was sparse.
  double mean() const { return count_ == 0 ? 1.0 : sum_ / static_cast<double>(count_); }
  /// The same if the tokens of each KV head had been ranked by their exact probability, summed over its
  /// heads.
  double best() const { return count_ == 0 ? 1.0 : best_ / static_cast<double>(count_); }

 private:
  void observe_layer(int64_t layer);

  const ExactKeys& prompt_;
  Session::Impl& session_;
  AttentionShape shape_;
  std::vector<std::vector<float>> step_q_, step_k_;  ///< per layer, of the last step, before RoPE
  int64_t n_decoded_ = 0;
  std::vector<std::vector<float>> decoded_keys_;  ///< per layer [n_decoded, D] rotated
  double sum_ = 0;
  double best_ = 0;
  int64_t count_ = 0;
};

}  // namespace narrows
