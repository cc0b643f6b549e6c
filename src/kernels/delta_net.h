// A gated DeltaNet layer (arXiv:2412.06464) as numbers: what stands in a projected row, what the layer holds
// beside its matrices. In place of keys and values it has a state of one size: for each value head a matrix S
// [head_dim, head_dim], a row a key coordinate, that a token changes by the delta rule,
//
//   S = decay S + k (x) beta (v - decay S^T k),   out = S^T q
//
// where q, k and v have gone through a short causal convolution, silu, and q and k through an l2 norm.
#pragma once

#include <cstdint>

namespace narrows::kernels {

struct DeltaNetShape {
  int64_t n_head_k = 0;  ///< of q and k; 0: there is no such layer
  int64_t n_head_v = 0;  ///< a multiple of it
  int64_t head_dim = 0;  ///< of all of them
  int64_t n_conv = 0;    ///< tokens that the convolution sees, the last of them its own
  /// Value heads of one key head stand together: head h has key head h / (n_head_v / n_head_k), else h %
  /// n_head_k.
  bool grouped = false;

  explicit operator bool() const { return n_head_k > 0; }
  int64_t key_head(int64_t h) const { return grouped ? h / (n_head_v / n_head_k) : h % n_head_k; }
  int64_t width_k() const { return n_head_k * head_dim; }
  int64_t width_v() const { return n_head_v * head_dim; }

  // A projected row: q, k, v of all heads (the convolution's channels), a gate [width_v] of what the heads
  // give, then beta and the step before their functions, [n_head_v] each.
  int64_t n_channel() const { return 2 * width_k() + width_v(); }
  int64_t at_gate() const { return n_channel(); }
  int64_t at_beta() const { return at_gate() + width_v(); }
  int64_t at_step() const { return at_beta() + n_head_v; }
  int64_t n_row() const { return at_step() + n_head_v; }

  bool operator==(const DeltaNetShape&) const = default;
};

struct DeltaNet {
  DeltaNetShape shape;
  const float* conv = nullptr;       ///< [n_conv, n_channel], the oldest token's first
  const float* rate = nullptr;       ///< [n_head_v], at most 0: decay = exp(rate softplus(step + step_bias))
  const float* step_bias = nullptr;  ///< [n_head_v]
  const float* norm = nullptr;       ///< [head_dim] RMS norm of what a head gives
  float eps = 0;                     ///< of all its norms
};

/// Tokens of a sequence that Ops::delta_rows() takes at once: the products within a tile grow with its
/// square, those with the state do not.
inline constexpr int64_t kDeltaTile = 64;
/// Largest n_conv.
inline constexpr int64_t kMostConv = 8;
/// Largest head_dim.
inline constexpr int64_t kMaxDeltaDim = 256;

/// Floats that Ops::delta_rows() works in.
constexpr int64_t delta_work_floats(int64_t head_dim) {
  return kDeltaTile * (4 * head_dim + 2 * kDeltaTile + 4);
}

}  // namespace narrows::kernels
