// Eigenvalues of the centred key covariance.
#include "calibrate/spectrum.h"

#include <fmt/format.h>

#include <Eigen/Eigenvalues>
#include <cmath>

#include "calibrate/key_statistics.h"

namespace narrows {

Result<std::vector<LayerSpectrum>> key_spectrum(const Model& model, std::span<const Token> text,
                                                int n_threads, const ProgressFn& progress) {
  Result<std::vector<KeyMoments>> moments = gather_key_moments(model, text, n_threads, progress);
  if (!moments.ok()) return moments.status();
  const ModelInfo& info = model.info();
  const auto width = static_cast<Eigen::Index>(info.n_head_kv * info.head_dim);
  std::vector<LayerSpectrum> out;
  for (size_t l = 0; l < moments->size(); ++l) {
    const KeyMoments& m = (*moments)[l];
    const auto n = static_cast<double>(m.n_tokens());
    const Eigen::VectorXd mean = Eigen::Map<const Eigen::VectorXd>(m.sum().data(), width) / n;
    const Eigen::MatrixXd covariance =
        Eigen::Map<const Eigen::MatrixXd>(m.moments().data(), width, width) / n - mean * mean.transpose();
    if (!covariance.allFinite()) {
      return Status(StatusCode::non_finite,
                    fmt::format("layer {}: the second moments of the keys are not finite", l));
    }
    const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(covariance, Eigen::EigenvaluesOnly);
    if (solver.info() != Eigen::Success) {
      return Status(StatusCode::internal, "the eigenvalues of a key covariance did not converge");
    }
    const Eigen::VectorXd& values = solver.eigenvalues();  // ascending
    const double total = values.cwiseMax(0.0).sum();
    const auto share = [&](Eigen::Index leading) {
      return total > 0 ? values.tail(leading).cwiseMax(0.0).sum() / total : 1.0;
    };
    out.push_back({static_cast<int64_t>(l), share(width / 8), share(width / 4), share(width / 2),
                   total > 0 ? mean.norm() / std::sqrt(total) : 0.0});
  }
  return out;
}

}  // namespace narrows
