// Moments -> basis -> bits. All of it runs once a layer and prompt, in double.
#include "kv/klt/klt_basis.h"

#include <Eigen/Eigenvalues>
#include <algorithm>
#include <cmath>

#include "kernels/half.h"
#include "kernels/latent_page.h"
#include "kernels/ops.h"

namespace narrows {

namespace {

using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
/// The large decomposition is half of what a layer's transforms cost, and twice as fast in float. Its vectors
/// are stored as halves, its values decide on whole bits: 1e-6 of the largest is nothing to either.
using Singles = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using kernels::kOctet;

/// Weights below this share of the largest count as this share: directions that no query has looked at yet
/// would otherwise be stored with any error at all.
constexpr double kLeastWeight = 1e-4;

/// Mean squared error of a uniform quantiser of 0 .. 8 bits on a unit Gaussian, each with its best step (Max
/// 1960; computed by integration).
constexpr double kDistortion[] = {1,        0.3634,  0.1188,   0.03744,  0.01154,
                                  0.003495, 0.00104, 0.000304, 0.0000869};

constexpr int kDistances = 256;

/// c [m, n] = a [m, k] b [k, n], row-major. Products of what the decompositions give are made in float too.
void multiply(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
              float* c, int64_t ldc) {
  kernels::ops().gemm(m, n, k, a, lda, b, ldb, c, ldc, false);
}

/// Powers of a matrix whose eigenvectors are the columns of u, e its eigenvalues.
struct Roots {
  Singles half, inverse, whole;  ///< to 1/2, -1/2, 1

  Roots(const Matrix& u, const Eigen::VectorXd& e) {
    const int64_t n = u.rows();
    const Singles turned = u.transpose().cast<float>();
    const auto power = [&](const Eigen::VectorXd& of) {
      const Singles scaled = (u * of.asDiagonal()).cast<float>();
      Singles made(n, n);
      multiply(n, n, n, scaled.data(), n, turned.data(), n, made.data(), n);
      return made;
    };
    half = power(e.cwiseSqrt());
    inverse = power(e.cwiseSqrt().cwiseInverse());
    whole = power(e);
  }
};

}  // namespace

void CentredMoments::add(const float* x, int64_t ld, int64_t n) {
  if (n <= 0) return;
  const auto width = static_cast<size_t>(width_);
  if (centre_.empty()) {
    std::vector<double> sum(width);
    for (int64_t t = 0; t < n; ++t) {
      for (size_t c = 0; c < width; ++c) sum[c] += static_cast<double>(x[t * ld + static_cast<int64_t>(c)]);
    }
    centre_.resize(width);
    for (size_t c = 0; c < width; ++c) centre_[c] = static_cast<float>(sum[c] / static_cast<double>(n));
  }
  constexpr int64_t kPiece = 256;
  std::vector<float> shifted(width * static_cast<size_t>(std::min(n, kPiece)));
  for (int64_t first = 0; first < n; first += kPiece) {
    const int64_t m = std::min(kPiece, n - first);
    for (int64_t t = 0; t < m; ++t) {
      const float* row = x + (first + t) * ld;
      float* to = shifted.data() + t * width_;
      for (size_t c = 0; c < width; ++c) to[c] = row[c] - centre_[c];
    }
    moments_.add(shifted.data(), m);
  }
}

void CentredMoments::set_sums(const float* centre, int64_t n, const double* sum, const double* moments) {
  centre_.assign(centre, centre + width_);
  moments_ = KeyMoments(width_);
  moments_.add_sums(n, sum, moments);
}

std::vector<double> CentredMoments::mean() const {
  std::vector<double> mean = moments_.sum();
  for (size_t c = 0; c < mean.size(); ++c) {
    mean[c] =
        n_tokens() > 0 ? mean[c] / static_cast<double>(n_tokens()) + static_cast<double>(centre_[c]) : 0.0;
  }
  return mean;
}

std::vector<double> CentredMoments::covariance() const {
  const auto n = static_cast<double>(std::max<int64_t>(1, n_tokens()));
  const std::vector<double>& sum = moments_.sum();
  std::vector<double> c = moments_.moments();
  const auto width = static_cast<size_t>(width_);
  for (size_t i = 0; i < width; ++i) {
    for (size_t j = 0; j < width; ++j) c[i * width + j] = c[i * width + j] / n - sum[i] / n * (sum[j] / n);
  }
  return c;
}

Result<KltBasis> make_klt_basis(const CentredMoments& moments, const std::vector<double>& weight,
                                int64_t block) {
  const int64_t width = moments.width();
  if (block < 1 || width % block != 0 || static_cast<int64_t>(weight.size()) != width * block) {
    return Status{StatusCode::internal, "the weight of a transform does not fit its width"};
  }
  const std::vector<double> covariance = moments.covariance();
  const std::vector<double> mean = moments.mean();
  const auto finite = [](double x) { return std::isfinite(x); };
  if (moments.n_tokens() == 0 || !std::all_of(covariance.begin(), covariance.end(), finite) ||
      !std::all_of(weight.begin(), weight.end(), finite) || !std::all_of(mean.begin(), mean.end(), finite)) {
    return Status{StatusCode::non_finite, "the statistics of keys, values or queries are not finite"};
  }

  // W^(1/2) and W^(-1/2), block by block; the floor is relative to the largest eigenvalue of all blocks.
  const int64_t n_block = width / block;
  std::vector<Eigen::SelfAdjointEigenSolver<Matrix>> solvers;
  double largest = 0;
  for (int64_t b = 0; b < n_block; ++b) {
    const Eigen::Map<const Matrix> w(weight.data() + b * block * block, block, block);
    solvers.emplace_back(Matrix((w + w.transpose()) / 2));
    if (solvers.back().info() != Eigen::Success)
      return Status{StatusCode::non_finite, "the eigenvectors of a weight did not converge"};
    largest = std::max(largest, solvers.back().eigenvalues().maxCoeff());
  }
  if (!(largest > 0)) largest = 1;
  std::vector<Roots> roots;
  for (const auto& solver : solvers)
    roots.emplace_back(solver.eigenvectors(), solver.eigenvalues().cwiseMax(largest * kLeastWeight));
  Singles weighted(width, width);
  {
    const Singles c = Eigen::Map<const Matrix>(covariance.data(), width, width).cast<float>();
    Singles left(width, width);
    for (int64_t i = 0; i < n_block; ++i)
      multiply(block, width, block, roots[static_cast<size_t>(i)].half.data(), block,
               c.data() + i * block * width, width, left.data() + i * block * width, width);
    for (int64_t j = 0; j < n_block; ++j)
      multiply(width, block, block, left.data() + j * block, width, roots[static_cast<size_t>(j)].half.data(),
               block, weighted.data() + j * block, width);
  }
  const Eigen::SelfAdjointEigenSolver<Singles> solver(weighted);
  if (solver.info() != Eigen::Success)
    return Status{StatusCode::non_finite, "the eigenvectors of a covariance did not converge"};

  KltBasis basis;
  basis.width = width;
  basis.block = block;
  const double top = double{solver.eigenvalues()[width - 1]};
  const double sd = top > 0 ? std::sqrt(top) : 1.0;
  basis.mean.assign(mean.begin(), mean.end());
  basis.weight.resize(weight.size());
  basis.decode.resize(static_cast<size_t>(width * width));
  basis.variance.resize(static_cast<size_t>(width));
  for (int64_t b = 0; b < n_block; ++b) {
    const float* floored = roots[static_cast<size_t>(b)].whole.data();
    for (int64_t i = 0; i < block * block; ++i) {
      basis.weight[static_cast<size_t>(b * block * block + i)] =
          static_cast<float>(double{floored[i]} / (sd * sd));
    }
  }
  Singles vectors(width, width);  // a row a coordinate
  for (int64_t c = 0; c < width; ++c) {
    const int64_t from = width - 1 - c;  // Eigen sorts ascending
    basis.variance[static_cast<size_t>(c)] =
        static_cast<float>(std::max(0.0, double{solver.eigenvalues()[from]}) / (sd * sd));
    vectors.row(c) = solver.eigenvectors().col(from).transpose();
  }
  for (int64_t b = 0; b < n_block; ++b)
    multiply(width, block, block, vectors.data() + b * block, width,
             roots[static_cast<size_t>(b)].inverse.data(), block, basis.decode.data() + b * block, width);
  for (float& x : basis.decode) x = static_cast<float>(sd * double{x});
  return basis;
}

std::vector<uint8_t> allocate_octets(const std::vector<float>& variance, double rate) {
  const auto width = static_cast<int64_t>(variance.size());
  const auto n_octet = static_cast<size_t>((width + kOctet - 1) / kOctet);
  std::vector<double> mass(n_octet);
  for (int64_t c = 0; c < width; ++c)
    mass[static_cast<size_t>(c / kOctet)] += static_cast<double>(variance[static_cast<size_t>(c)]);
  std::vector<uint8_t> bits(n_octet, 0);
  const auto total = static_cast<int64_t>(std::floor(rate * static_cast<double>(width) / kOctet + 1e-9));
  for (int64_t i = 0; i < total; ++i) {
    size_t best = n_octet;
    double most = -1;
    for (size_t o = 0; o < n_octet; ++o) {
      if (bits[o] == kernels::kMaxBits) continue;
      const double gain = mass[o] * (kDistortion[bits[o]] - kDistortion[bits[o] + 1]);
      if (gain > most) {
        most = gain;
        best = o;
      }
    }
    if (best == n_octet) break;
    ++bits[best];
  }
  // Variances fall, so bits do too, but for equal ones: planes are prefixes only if they do.
  std::sort(bits.begin(), bits.end(), std::greater<>());
  return bits;
}

int64_t KltTransform::bytes() const {
  const size_t n = mean.capacity() * sizeof(float) + weight.capacity() * sizeof(kernels::f16_t) +
                   decode.capacity() * sizeof(kernels::f16_t) + octet_bits.capacity();
  return static_cast<int64_t>(n);
}

void KltTransform::save(SnapshotWriter& out) const {
  out.number(n_coord);
  out.number(weight_unit);
  out.array(mean);
  out.array(weight);
  out.array(decode);
  out.array(octet_bits);
}

KltTransform load_klt_transform(SnapshotReader& in, int64_t width, int64_t block) {
  KltTransform t;
  t.width = width;
  t.block = block;
  t.n_coord = in.count(0, (width + kernels::kOctet - 1) / kernels::kOctet * kernels::kOctet);
  t.weight_unit = in.number<float>();
  if (t.n_coord % kernels::kOctet != 0 || !std::isfinite(t.weight_unit)) in.fail();
  t.mean = in.array<float>(static_cast<uint64_t>(width));
  t.weight = in.array<kernels::f16_t>(static_cast<uint64_t>(width * block));
  t.decode = in.array<kernels::f16_t>(static_cast<uint64_t>(t.n_coord * width));
  t.octet_bits = in.array<uint8_t>(static_cast<uint64_t>(kernels::pad_latent(t.n_coord) / kernels::kOctet));
  const auto finite_half = [](kernels::f16_t x) { return (x & 0x7C00) != 0x7C00; };
  const bool good = std::all_of(t.mean.begin(), t.mean.end(), [](float x) { return std::isfinite(x); }) &&
                    std::all_of(t.weight.begin(), t.weight.end(), finite_half) &&
                    std::all_of(t.decode.begin(), t.decode.end(), finite_half) &&
                    std::is_sorted(t.octet_bits.rbegin(), t.octet_bits.rend()) &&
                    std::all_of(t.octet_bits.begin(), t.octet_bits.end(),
                                [](uint8_t bits) { return bits >= 1 && bits <= kernels::kMaxBits; });
  if (!good) in.fail();
  return t;
}

Result<KltTransform> make_klt_transform(const KltBasis& basis, double rate) {
  KltTransform t;
  t.width = basis.width;
  t.block = basis.block;
  t.mean = basis.mean;
  t.octet_bits = allocate_octets(basis.variance, rate);
  while (!t.octet_bits.empty() && t.octet_bits.back() == 0) t.octet_bits.pop_back();
  t.n_coord = static_cast<int64_t>(t.octet_bits.size()) * kOctet;
  t.octet_bits.resize(static_cast<size_t>(kernels::pad_latent(t.n_coord) / kOctet), 1);
  t.octet_bits.shrink_to_fit();
  bool fits = true;
  const auto half = [&fits](float x) {
    fits = fits && std::fabs(x) <= 65504.0F;
    return kernels::float_to_half(x);
  };
  t.weight.reserve(basis.weight.size());
  float largest = 0;
  for (const float w : basis.weight) largest = std::max(largest, std::fabs(w));
  int exponent = 0;
  std::frexp(largest, &exponent);
  t.weight_unit = std::ldexp(1.0F, exponent);
  for (const float w : basis.weight) t.weight.push_back(half(w / t.weight_unit));
  t.decode.assign(static_cast<size_t>(t.n_coord * t.width), 0);
  const auto held = static_cast<size_t>(std::min(t.n_coord, t.width) * t.width);
  for (size_t i = 0; i < held; ++i) t.decode[i] = half(basis.decode[i]);
  if (!fits) {
    return Status{StatusCode::non_finite, "a transform of keys or values leaves the range of half precision"};
  }
  return t;
}

DistanceAverage::DistanceAverage(const kernels::RopeTable& rope, int64_t head_dim) : head_dim_(head_dim) {
  const int64_t n_rot = rope.n_rot();
  std::vector<double> frequency;
  for (int64_t i = 0; i < n_rot / 2; ++i) {
    first_.push_back(i);
    second_.push_back(i + n_rot / 2);
    frequency.push_back(rope.frequency()[static_cast<size_t>(i)]);
  }
  for (int64_t i = n_rot; i < head_dim; ++i) {
    first_.push_back(i);
    second_.push_back(-1);
    frequency.push_back(0);
  }
  const size_t n = first_.size();
  for (auto* table : {&cc_, &cs_, &sc_, &ss_}) table->assign(n * n, 0);
  std::vector<double> cosine(n), sine(n);
  const double log_reach = std::log(static_cast<double>(std::max<int64_t>(2, rope.n_ctx())));
  for (int k = 0; k < kDistances; ++k) {
    const double t = std::exp((k + 0.5) / kDistances * log_reach);
    for (size_t i = 0; i < n; ++i) {
      cosine[i] = std::cos(t * frequency[i]);
      sine[i] = std::sin(t * frequency[i]);
    }
    for (size_t i = 0; i < n; ++i) {
      for (size_t j = 0; j < n; ++j) {
        cc_[i * n + j] += cosine[i] * cosine[j] / kDistances;
        cs_[i * n + j] += cosine[i] * sine[j] / kDistances;
        sc_[i * n + j] += sine[i] * cosine[j] / kDistances;
        ss_[i * n + j] += sine[i] * sine[j] / kDistances;
      }
    }
  }
}

std::vector<double> DistanceAverage::apply(const double* c) const {
  std::vector<double> out(static_cast<size_t>(head_dim_ * head_dim_));
  const size_t n = first_.size();
  const auto put = [&](int64_t i, int64_t j, double x) {
    if (i >= 0 && j >= 0) out[static_cast<size_t>(i * head_dim_ + j)] = x;
  };
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = 0; j < n; ++j) {
      const int64_t a = first_[i], b = second_[i], e = first_[j], f = second_[j];
      const double cc = cc_[i * n + j], cs = cs_[i * n + j], sc = sc_[i * n + j], ss = ss_[i * n + j];
      put(a, e, cc * at(c, a, e) - cs * at(c, a, f) - sc * at(c, b, e) + ss * at(c, b, f));
      put(a, f, cs * at(c, a, e) + cc * at(c, a, f) - ss * at(c, b, e) - sc * at(c, b, f));
      put(b, e, sc * at(c, a, e) - ss * at(c, a, f) + cc * at(c, b, e) - cs * at(c, b, f));
      put(b, f, ss * at(c, a, e) + sc * at(c, a, f) + cs * at(c, b, e) + cc * at(c, b, f));
    }
  }
  return out;
}

}  // namespace narrows
