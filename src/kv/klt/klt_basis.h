// The transform behind klt pages: a Karhunen-Loeve transform of keys before RoPE (or of values), centred and
// weighted by what an error costs: for keys by the queries that will look at them, for values by the output
// projection that they go through. Coordinates of the latent z are uncorrelated, the plain squared error of z
// is the weighted error of x, and bits go where they remove most of it (reverse water-filling). The weighting
// follows KQ-SVD and SAKI; docs/klt.md has the algebra. Pipeline step 5.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/ops.h"
#include "kernels/rope_table.h"
#include "kv/basis.h"
#include "narrows/status.h"

namespace narrows {

/// Second moments of rows about a point near their mean, summed in double: the means of keys may be 50 times
/// their spread (Qwen2, layer 0), and plain sums of squares would lose the spread.
class CentredMoments {
 public:
  explicit CentredMoments(int64_t width) : moments_(width), width_(width) {}
  /// n rows of `width` finite numbers, ld between rows.
  void add(const float* x, int64_t ld, int64_t n);
  /// n rows whose sums were made elsewhere, sum [width] and moments [width, width] about `centre` [width]; of
  /// none other.
  void set_sums(const float* centre, int64_t n, const double* sum, const double* moments);
  int64_t n_tokens() const { return moments_.n_tokens(); }
  int64_t width() const { return width_; }
  std::vector<double> mean() const;        ///< [width]
  std::vector<double> covariance() const;  ///< [width, width], about the mean

 private:
  KeyMoments moments_;  ///< of x - centre
  int64_t width_;
  std::vector<float> centre_;  ///< [width], mean of the first rows that came
};

/// A transform of `width` channels, for any number of bits. z = (x - mean) W decode^T, x^ = mean + z decode,
/// W block diagonal. Scaled so that the first coordinate has variance 1.
struct KltBasis {
  int64_t width = 0;
  int64_t block = 0;            ///< side of a block of W: head_dim
  std::vector<float> mean;      ///< [width]
  std::vector<float> weight;    ///< [width / block, block, block], symmetric
  std::vector<float> decode;    ///< [width, width], a row a coordinate
  std::vector<float> variance;  ///< [width], descending
};

/// Keys and values of one layer: a KltBasis each for every part.
struct KltLayerBasis {
  std::vector<KltBasis> key;
  std::vector<KltBasis> value;
};

/// weight [width / block, block, block]: cost of an error, block by block. non_finite if a moment or a weight
/// is not finite; a channel of zero variance or weight is harmless.
Result<KltBasis> make_klt_basis(const CentredMoments& moments, const std::vector<double>& weight,
                                int64_t block);

/// Whole bits 0 to 8 for each octet of coordinates, falling, rate * width in all (rounded down to octets):
/// the next bit goes to the octet where it removes most error of a uniform quantiser on Gaussian numbers.
std::vector<uint8_t> allocate_octets(const std::vector<float>& variance, double rate);

/// A basis with its bits: what a cache holds. Half precision, because its rounding is far below that of the
/// codes.
struct KltTransform {
  int64_t width = 0;
  int64_t block = 0;
  int64_t n_coord = 0;                 ///< coordinates with bits, a multiple of 8
  std::vector<float> mean;             ///< [width]
  float weight_unit = 1;               ///< of weight: small values have weights far beyond half precision
  std::vector<kernels::f16_t> weight;  ///< [width / block, block, block], in units of weight_unit
  std::vector<kernels::f16_t> decode;  ///< [n_coord, width]
  std::vector<uint8_t> octet_bits;     ///< [pad_latent(n_coord) / 8], padded with 1

  int64_t bytes() const;
  void save(SnapshotWriter& out) const;
};

/// A transform of this shape that was saved; leaves the reader failed if it is none.
KltTransform load_klt_transform(SnapshotReader& in, int64_t width, int64_t block);

/// non_finite if a number of the inverse transform leaves half precision.
Result<KltTransform> make_klt_transform(const KltBasis& basis, double rate);

/// Averages over distances: what the second moment of queries before RoPE becomes when they look back by t
/// tokens, t log-uniform in 1 .. n_ctx. One weight then serves all positions.
class DistanceAverage {
 public:
  DistanceAverage(const kernels::RopeTable& rope, int64_t head_dim);
  /// c [head_dim, head_dim] -> the mean over t of R_t c R_t^T.
  std::vector<double> apply(const double* c) const;

 private:
  double at(const double* c, int64_t i, int64_t j) const {
    return i < 0 || j < 0 ? 0.0 : c[i * head_dim_ + j];
  }

  int64_t head_dim_;
  std::vector<int64_t> first_;   ///< coordinates of each rotated pair; those that are not rotated turn by 0
  std::vector<int64_t> second_;  ///< -1: none
  std::vector<double> cc_, cs_, sc_, ss_;  ///< [pair, pair]: means of cos a cos b, cos a sin b, ..
};

}  // namespace narrows
