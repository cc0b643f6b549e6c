// How wide a transform should be for a model with many KV heads: 32 of them, of 128 (D = 4096), with
// synthetic keys that are random projections of one hidden state, as the keys of a layer are. For every
// number of heads a transform spans: what encoding a page and rebuilding a head's keys cost, what the
// transforms take, and how far off the stored keys are.
//
//   cmake --build build --target bench_klt && build/bench/bench_klt
#include <Eigen/Core>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "kv/klt/klt_layer.h"

namespace narrows {
namespace {

constexpr int64_t kHeads = 32;
constexpr int64_t kHeadDim = 128;
constexpr int64_t kWidth = kHeads * kHeadDim;
constexpr int64_t kTokens = 4096;  ///< of statistics, as a prompt gives
constexpr int64_t kJudged = 1024;  ///< others, whose error is measured
constexpr int64_t kHidden = 2048;
constexpr double kKeyRate = 2;
constexpr double kValueRate = 3;

using Rows = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

double seconds_of(const std::function<void()>& work) {
  double best = 1e300;
  for (int i = 0; i < 3; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    work();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  return best;
}

/// [kTokens + kJudged, kWidth]: hidden states whose variances fall as 1 / i^decay, through a random matrix.
/// Some tokens are larger than others, as they are in models.
Rows synthetic(double decay, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Rows hidden(kTokens + kJudged, kHidden);
  for (int64_t t = 0; t < hidden.rows(); ++t) {
    const float gain = std::exp(0.3F * normal(random));
    for (int64_t c = 0; c < kHidden; ++c) {
      const double sd = std::pow(static_cast<double>(c + 1), -decay / 2);
      hidden(t, c) = normal(random) * static_cast<float>(sd) * gain;
    }
  }
  Rows project(kHidden, kWidth);
  for (int64_t i = 0; i < project.size(); ++i) project.data()[i] = normal(random) / 45;
  return hidden * project;
}

void run(int64_t heads, const Rows& key, const Rows& value) {
  const int64_t width = heads * kHeadDim;
  // One part is enough: all are alike.
  std::vector<double> weight(static_cast<size_t>(width * kHeadDim), 0);
  for (int64_t c = 0; c < width; ++c) weight[static_cast<size_t>(c * kHeadDim + c % kHeadDim)] = 1;
  const auto begin = std::chrono::steady_clock::now();
  CentredMoments of_keys(width), of_values(width);
  of_keys.add(key.data(), kWidth, kTokens);
  of_values.add(value.data(), kWidth, kTokens);
  auto key_basis = make_klt_basis(of_keys, weight, kHeadDim);
  auto value_basis = make_klt_basis(of_values, weight, kHeadDim);
  if (!key_basis.ok() || !value_basis.ok()) std::exit(1);
  const double made = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  auto key_transform = make_klt_transform(*key_basis, kKeyRate);
  auto value_transform = make_klt_transform(*value_basis, kValueRate);
  if (!key_transform.ok() || !value_transform.ok()) std::exit(1);
  const KltPart part(0, *key_transform, *value_transform, std::max<int64_t>(8, width / 8), 0);

  KltEncoder encoder(part);
  std::vector<std::byte> page(static_cast<size_t>(part.layout().end()));
  std::vector<int32_t> slots;
  for (int32_t t = 0; t < kPageTokens; ++t) slots.push_back(t);
  KltScratch scratch(width);
  std::vector<float> k(static_cast<size_t>(kPageTokens * width)), v(k.size());
  double error[2] = {}, size[2] = {};
  for (int64_t t = kTokens; t + kPageTokens <= kTokens + kJudged; t += kPageTokens) {
    if (!encoder.encode(key.row(t).data(), value.row(t).data(), kWidth, 0, page.data())) std::exit(1);
    part.read_rows(page.data(), slots.data(), kPageTokens, 0, scratch);
    part.rebuild_keys(scratch.key.data(), scratch.ld, kPageTokens, 0, width, k.data(), width);
    part.rebuild_values(scratch.value.data(), scratch.ld, kPageTokens, v.data(), width);
    for (int64_t i = 0; i < kPageTokens; ++i) {
      for (int64_t c = 0; c < width; ++c) {
        const double a = static_cast<double>(key(t + i, c));
        const double b = static_cast<double>(value(t + i, c));
        error[0] += std::pow(static_cast<double>(k[static_cast<size_t>(i * width + c)]) - a, 2);
        error[1] += std::pow(static_cast<double>(v[static_cast<size_t>(i * width + c)]) - b, 2);
        size[0] += a * a;
        size[1] += b * b;
      }
    }
  }
  const float* first_key = key.row(kTokens).data();
  const float* first_value = value.row(kTokens).data();
  const double encode =
      seconds_of([&] { (void)encoder.encode(first_key, first_value, kWidth, 0, page.data()); });
  const double rebuild = seconds_of([&] {
    part.read_rows(page.data(), slots.data(), kPageTokens, 0, scratch);
    part.rebuild_keys(scratch.key.data(), scratch.ld, kPageTokens, 0, kHeadDim, k.data(), kHeadDim);
  });
  const auto n_part = static_cast<double>(kHeads / heads);
  std::printf("%6ld %11.1f %12.2f %15.1f %12.1f %11.4f %11.4f\n", static_cast<long>(heads), made * n_part,
              encode * n_part * 1e3, rebuild * 1e6, static_cast<double>(part.bytes()) * n_part / 1e6,
              error[0] / size[0], error[1] / size[1]);
}

/// One layer of a model over a prompt of kTokens random tokens.
void prompt(const char* name, int64_t n_head, int64_t n_head_kv, int64_t head_dim) {
  const AttentionShape shape{n_head, n_head_kv, head_dim, 1.0F / std::sqrt(static_cast<float>(head_dim))};
  kernels::RopeParams params;
  params.n_rot = head_dim;
  params.freq_base = 10000;
  const kernels::RopeTable rope(params, 8192);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto fill = [&](int64_t n) {
    std::vector<float> x(static_cast<size_t>(n));
    for (float& y : x) y = normal(random);
    return x;
  };
  const auto k = fill(kTokens * shape.width()), v = fill(kTokens * shape.width());
  const auto q = fill(kTokens * n_head * head_dim);
  std::vector<double> weight(static_cast<size_t>(n_head_kv * head_dim * head_dim), 0);
  for (int64_t i = 0; i < n_head_kv * head_dim; ++i)
    weight[static_cast<size_t>(i * head_dim + i % head_dim)] = 1;
  const auto distances = std::make_shared<DistanceAverage>(rope, head_dim);
  KltLayerBasis basis;
  const double gather = seconds_of([&] {
    KltStatistics statistics(shape);
    statistics.add(k.data(), v.data(), kTokens);
    statistics.add_queries(q.data(), kTokens);
  });
  KltStatistics statistics(shape);
  statistics.add(k.data(), v.data(), kTokens);
  statistics.add_queries(q.data(), kTokens);
  const double make = seconds_of([&] { basis = *statistics.basis(*distances, weight); });
  double append[2];
  for (const int64_t anchors : {0, 1}) {
    append[anchors] = seconds_of([&] {
      KltLayer layer(0, shape, &rope, {16, 64, kPageTokens}, KvProfile(), {2, 3, 32, anchors}, distances, {});
      if (!layer.use_basis(basis).ok()) std::exit(1);
      if (anchors > 0) layer.observe_queries(q.data(), kTokens);
      if (!layer.append(k.data(), v.data(), kTokens).ok()) std::exit(1);
    });
  }
  const double pages = (kTokens - 80) / kPageTokens;
  std::printf(
      "%s: a layer of %ld tokens: statistics %.1f ms, transforms %.1f ms, pages %.1f ms "
      "(%.0f us a page), finding anchors %.1f ms\n",
      name, static_cast<long>(kTokens), gather * 1e3, make * 1e3, append[0] * 1e3, append[0] * 1e6 / pages,
      (append[1] - append[0]) * 1e3);
}

}  // namespace
}  // namespace narrows

int main(int argc, char** /*argv*/) {
  narrows::prompt("SmolLM2 135M", 9, 3, 64);
  narrows::prompt("Qwen2.5 0.5B", 14, 2, 64);
  narrows::prompt("Llama 3.1 8B", 32, 8, 128);
  if (argc > 1) return 0;
  std::printf("D = 4096 (32 KV heads of 128), k=2, v=3, one thread; errors relative to the variance\n");
  for (const double decay : {0.5, 1.0}) {
    std::printf("\nvariance of the hidden state falls as 1 / i^%.1f\n", decay);
    std::printf("%6s %11s %12s %15s %12s %11s %11s\n", "heads", "make (s)", "page (ms)", "head+page (us)",
                "layer (MB)", "key error", "value error");
    const narrows::Rows key = narrows::synthetic(decay, 1);
    const narrows::Rows value = narrows::synthetic(decay, 2);
    for (const int64_t heads : {1, 2, 4, 8, 16}) narrows::run(heads, key, value);
  }
  return 0;
}
