// Key moments and their eigenvectors. SALS section 3 (uncentred PCA over pre-RoPE keys, joint over KV heads).
// keys [n, D] in; moments [D, D] in double; u [D, rank] out.
#include "kv/basis.h"

#include <Eigen/Eigenvalues>
#include <algorithm>
#include <cmath>

#include "kernels/ops.h"

namespace narrows {

namespace {

/// Tokens whose products are summed in float32 before they join the double sums. So short a sum is wrong by
/// 1e-6 of the largest moment, which is less than what f16 keys lose, and runs at the speed of the float
/// kernels: 20 times as fast.
constexpr int64_t kShortSum = 256;

/// Tokens transposed at a time, and rows of the product computed at a time (only on and above the diagonal).
constexpr int64_t kPiece = 64;

/// Tokens that wait for a block, in bytes little beside the sums.
constexpr int64_t kWaiting = 32;

}  // namespace

KeyMoments::KeyMoments(int64_t width)
    : width_(width), sum_(static_cast<size_t>(width)), moments_(static_cast<size_t>(width * width)) {}

const std::vector<double>& KeyMoments::sum() const {
  add_waiting();
  return sum_;
}

const std::vector<double>& KeyMoments::moments() const {
  add_waiting();
  return moments_;
}

void KeyMoments::add(const float* keys, int64_t n) {
  if (n <= 0) return;
  const auto size = static_cast<size_t>(n * width_);
  if (n >= kWaiting) {
    add_waiting();
    add_block(keys, n);
  } else {
    waiting_.reserve(static_cast<size_t>(2 * kWaiting * width_));
    waiting_.insert(waiting_.end(), keys, keys + size);
    if (waiting_.size() >= static_cast<size_t>(kWaiting * width_)) add_waiting();
  }
  n_ += n;
}

void KeyMoments::add_waiting() const {
  if (waiting_.empty()) return;
  add_block(waiting_.data(), static_cast<int64_t>(waiting_.size()) / width_);
  waiting_.clear();
}

void KeyMoments::add_block(const float* keys, int64_t n) const {
  const int64_t d = width_;
  std::vector<float> columns(static_cast<size_t>(d * kPiece));  // [D, piece]
  std::vector<float> product(static_cast<size_t>(d * d));
  for (int64_t begin = 0; begin < n; begin += kShortSum) {
    const int64_t end = std::min(n, begin + kShortSum);
    for (int64_t first = begin; first < end; first += kPiece) {
      const int64_t m = std::min(kPiece, end - first);
      const float* x = keys + first * d;
      for (int64_t i = 0; i < d; ++i) {
        double sum = 0;
        for (int64_t t = 0; t < m; ++t) {
          columns[static_cast<size_t>(i * kPiece + t)] = x[t * d + i];
          sum += static_cast<double>(x[t * d + i]);
        }
        sum_[static_cast<size_t>(i)] += sum;
      }
      for (int64_t i = 0; i < d; i += kPiece) {
        kernels::ops().gemm(std::min(kPiece, d - i), d - i, m, columns.data() + i * kPiece, kPiece, x + i, d,
                            product.data() + i * d + i, d, first > begin);
      }
    }
    for (int64_t i = 0; i < d; ++i) {
      for (int64_t j = i; j < d; ++j)
        moments_[static_cast<size_t>(i * d + j)] +=
            static_cast<double>(product[static_cast<size_t>(i * d + j)]);
    }
  }
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t j = 0; j < i; ++j)
      moments_[static_cast<size_t>(i * d + j)] = moments_[static_cast<size_t>(j * d + i)];
  }
}

void KeyMoments::add(const KeyMoments& other) {
  other.add_waiting();
  for (size_t i = 0; i < sum_.size(); ++i) sum_[i] += other.sum_[i];
  for (size_t i = 0; i < moments_.size(); ++i) moments_[i] += other.moments_[i];
  n_ += other.n_;
}

void KeyMoments::add_sums(int64_t n, const double* sum, const double* moments) {
  for (size_t i = 0; i < sum_.size(); ++i) sum_[i] += sum[i];
  for (size_t i = 0; i < moments_.size(); ++i) moments_[i] += moments[i];
  n_ += n;
}

void KeyMoments::save(SnapshotWriter& out) const {
  out.number(n_);
  out.array(sum_);
  out.array(moments_);
  out.number(static_cast<int64_t>(waiting_.size()) / width_);
  out.array(waiting_);
}

void KeyMoments::load(SnapshotReader& in) {
  n_ = in.count(0, int64_t{1} << 40);
  std::vector<double> sum = in.array<double>(sum_.size());
  std::vector<double> moments = in.array<double>(moments_.size());
  const int64_t n_waiting = in.count(0, kWaiting - 1);
  std::vector<float> waiting = in.array<float>(static_cast<uint64_t>(n_waiting * width_));
  const auto finite = [](const auto& x) {
    return std::all_of(x.begin(), x.end(), [](auto y) { return std::isfinite(y); });
  };
  if (!finite(sum) || !finite(moments) || !finite(waiting) || n_waiting > n_) in.fail();
  if (!in.ok()) return;
  sum_ = std::move(sum);
  moments_ = std::move(moments);
  waiting_ = std::move(waiting);
}

Result<LayerBasis> KeyMoments::leading(int64_t rank) const {
  if (n_ == 0) return Status{StatusCode::invalid_argument, "a basis needs at least one token"};
  if (rank < 1 || rank > width_) {
    return Status{StatusCode::invalid_argument, "a basis of rank " + std::to_string(rank) +
                                                    " does not exist for keys of width " +
                                                    std::to_string(width_)};
  }
  add_waiting();
  if (!std::all_of(moments_.begin(), moments_.end(), [](double x) { return std::isfinite(x); })) {
    return Status{StatusCode::non_finite, "the second moments of the keys are not finite"};
  }
  using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  const Eigen::Map<const Matrix> sums(moments_.data(), width_, width_);
  const Matrix mean = sums / static_cast<double>(n_);
  const Eigen::SelfAdjointEigenSolver<Matrix> solver(mean);
  if (solver.info() != Eigen::Success) {
    return Status{StatusCode::non_finite, "the eigenvectors of the key moments did not converge"};
  }

  LayerBasis basis;
  basis.width = width_;
  basis.rank = rank;
  basis.u.resize(static_cast<size_t>(width_ * rank));
  basis.energy.resize(static_cast<size_t>(width_));
  const double total = solver.eigenvalues().cwiseMax(0.0).sum();
  for (int64_t c = 0; c < width_; ++c) {
    const int64_t from = width_ - 1 - c;  // Eigen sorts ascending
    const double share = total > 0 ? std::max(0.0, solver.eigenvalues()[from]) / total : 0.0;
    basis.energy[static_cast<size_t>(c)] = static_cast<float>(share);
    if (c >= rank) continue;
    // Of the two directions, the one whose largest coordinate is positive: files from two machines then
    // compare.
    Eigen::Index largest = 0;
    solver.eigenvectors().col(from).cwiseAbs().maxCoeff(&largest);
    const double sign = solver.eigenvectors()(largest, from) < 0 ? -1.0 : 1.0;
    for (int64_t i = 0; i < width_; ++i) {
      basis.u[static_cast<size_t>(i * rank + c)] = static_cast<float>(sign * solver.eigenvectors()(i, from));
    }
  }
  return basis;
}

}  // namespace narrows
