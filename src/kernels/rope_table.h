// Rotary position embedding: cos and sin of any position, frequencies as the GGUF file says (frequency
// factors, linear scaling, YaRN). Rotation is by halves: pair (i, i + n_rot/2); models that rotate neighbours
// (2i, 2i+1) have the rows of their q and k weights reordered at load (model/weights.cpp), which no dot
// product can see.
#pragma once

#include <cstdint>
#include <vector>

namespace narrows::kernels {

/// As in GGUF: <arch>.rope.*.
struct RopeParams {
  int64_t n_rot = 0;  ///< rotated coordinates of a head, even, <= head_dim
  double freq_base = 10000.0;
  double freq_scale = 1.0;  ///< linear scaling and YaRN: 1 / factor
  double ext_factor = 0.0;  ///< YaRN's mix of interpolation and extrapolation; 0 is off
  double attn_factor = 1.0;
  double beta_fast = 32.0;
  double beta_slow = 1.0;
  int64_t n_ctx_orig = 0;                ///< context before scaling, for YaRN
  std::vector<float> freq_factors = {};  ///< [n_rot / 2] or empty (rope_freqs.weight)
  std::vector<float> long_factors = {};  ///< in their place where a context is longer than n_ctx_orig
};

/// cos/sin of pos = 256 a + b by the angle sum of two small tables: (n_ctx / 256 + 256) * n_rot / 2 pairs,
/// which stay in the L2 cache at any context; a table of all positions would be 64 MB at 128K and head_dim
/// 128. Both factors are rounded from double, so an angle is right to 2e-7 however far the position.
class RopeTable {
 public:
  RopeTable() = default;
  RopeTable(const RopeParams& params, int64_t n_ctx);

  int64_t n_rot() const { return n_rot_; }
  int64_t n_ctx() const { return n_ctx_; }
  /// Factor on rotated vectors (YaRN's mscale); cos and sin include it.
  float magnitude() const { return magnitude_; }
  /// Radians a position for each pair, [n_rot / 2].
  const std::vector<double>& frequency() const { return frequency_; }

  /// cos, sin [n_rot / 2] with stride `ld` between pairs, at 0 <= pos < n_ctx.
  void at(int64_t pos, float* cos, float* sin, int64_t ld = 1) const;

 private:
  int64_t n_rot_ = 0;
  int64_t n_ctx_ = 0;
  float magnitude_ = 1.0F;
  std::vector<double> frequency_;
  std::vector<float> coarse_;  ///< [n_ctx / 256 + 1, n_rot / 2, 2]: cos, sin of 256 a, magnitude included
  std::vector<float> fine_;    ///< [256, n_rot / 2, 2]: cos, sin of b
};

}  // namespace narrows::kernels
