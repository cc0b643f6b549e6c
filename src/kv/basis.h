// The latent basis of a model: per layer the leading eigenvectors of K^T K over pre-RoPE keys (SALS section
// 3, uncentred, joint over KV heads). Made from the prompt or read from a file that `narrows calibrate`
// wrote.
#pragma once

#include <cstdint>
#include <vector>

#include "kv/snapshot.h"
#include "narrows/status.h"

namespace narrows {

/// Leading eigenvectors of one layer.
struct LayerBasis {
  int64_t width = 0;          ///< D
  int64_t rank = 0;           ///< vectors held, most important first
  std::vector<float> u;       ///< [D, rank]: column c is eigenvector c; z = k u, k^ = z u^T
  std::vector<float> energy;  ///< [D] eigenvalues, descending, as shares of their sum
};

/// Streaming second moments of keys: C += x^T x, products of a few tokens in float32, sums in double.
class KeyMoments {
 public:
  explicit KeyMoments(int64_t width);
  /// keys [n, D]; must be finite. Few at a time wait until they are a block of 32 or the sums are read: a sum
  /// of one token moves all of [D, D].
  void add(const float* keys, int64_t n);
  void save(SnapshotWriter& out) const;
  /// Sums that were saved at this width; leaves the reader failed if they are none.
  void load(SnapshotReader& in);
  /// The sums of another one of this width.
  void add(const KeyMoments& other);
  /// Sums of n rows that were made elsewhere: sum [D], moments [D, D], both sides of the diagonal.
  void add_sums(int64_t n, const double* sum, const double* moments);
  int64_t n_tokens() const { return n_; }
  /// non_finite if a moment is not finite; invalid_argument if no token was added.
  Result<LayerBasis> leading(int64_t rank) const;
  /// Mean [D] and second moments [D, D] for other users (spectra, centred transforms).
  const std::vector<double>& sum() const;
  const std::vector<double>& moments() const;

 private:
  void add_waiting() const;
  void add_block(const float* keys, int64_t n) const;

  int64_t width_;
  int64_t n_ = 0;
  // Reading adds what waits; one thread at a time, as for add().
  mutable std::vector<double> sum_;      ///< [D]
  mutable std::vector<double> moments_;  ///< [D, D], both sides of the diagonal
  mutable std::vector<float> waiting_;   ///< [n, D], n < kWaiting
};

}  // namespace narrows
