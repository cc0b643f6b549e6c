// Heads are judged one by one as the model's layers pass, so that one layer's numbers are held at a time.
#include "eval/precision.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <random>
#include <thread>

#include "base/aligned.h"
#include "base/cgroup.h"
#include "engine/session_impl.h"
#include "kernels/half.h"
#include "prompt/attention.h"
#include "prompt/prefill.h"

namespace narrows {
namespace {

using kernels::kPrefillTile;
using kernels::PrefillKernel;

/// Every other kRun consecutive rows of the model's are judged: half of them, since few rows of few heads
/// overflow, and a sparser sample misses them.
constexpr int64_t kRun = 32;
/// Query rows of a random case; each sees all keys.
constexpr int64_t kRandomRows = 128;

struct Shape {
  int64_t head_dim, length;
};
constexpr std::array<Shape, 3> kShapes = {{{64, 1280}, {128, 1280}, {128, 4096}}};
constexpr std::array<double, 4> kMeans = {0, 10, 20, 30};
constexpr std::array<double, 4> kAmplitudes = {0.5, 5, 10, 20};
/// The hybrid numbers: mostly normal around the mean, one in a thousand ten times as far.
constexpr double kOutliers = 0.001;
constexpr double kOutlierSize = 10;
/// The random benchmark's part of the work, for the progress bar.
constexpr double kRandomShare = 0.3;

/// Of one shape: uniform numbers of every amplitude, and the hybrid ones.
constexpr int64_t kCases = kMeans.size() * (kAmplitudes.size() + 1);

/// Exact outputs and what scores look like.
struct Exact {
  std::vector<double> out;  ///< [n_row, head_dim]
  double qk_max = 0, qk_max_shifted = 0, resonance = 0;
};

std::vector<double> tile_means(const PrecisionHead& h) {
  std::vector<double> means(static_cast<size_t>((h.n_key + kPrefillTile - 1) / kPrefillTile * h.head_dim));
  for (int64_t j = 0; j < h.n_key; ++j) {
    const int64_t tile = j / kPrefillTile, n = std::min(kPrefillTile, h.n_key - tile * kPrefillTile);
    for (int64_t d = 0; d < h.head_dim; ++d)
      means[static_cast<size_t>(tile * h.head_dim + d)] +=
          double{h.k[static_cast<size_t>(j * h.head_dim + d)]} / static_cast<double>(n);
  }
  return means;
}

/// sum q_i k_i and sum |q_i k_i|, in four parts that do not wait for each other.
std::pair<double, double> dot(const float* q, const float* k, int64_t n) {
  double sum[4] = {}, size[4] = {};
  for (int64_t d = 0; d < n; ++d) {
    const double product = double{q[d]} * double{k[d]};
    sum[d % 4] += product;
    size[d % 4] += std::fabs(product);
  }
  return {sum[0] + sum[1] + sum[2] + sum[3], size[0] + size[1] + size[2] + size[3]};
}

Exact exact_attention(const PrecisionHead& h) {
  const auto n_row = static_cast<int64_t>(h.position.size());
  const std::vector<double> means = tile_means(h);
  Exact e;
  e.out.resize(h.q.size());
  std::vector<double> score(static_cast<size_t>(h.n_key));
  double pairs = 0;
  for (int64_t r = 0; r < n_row; ++r) {
    const float* q = h.q.data() + r * h.head_dim;
    const int64_t end = std::min(h.n_key, h.position[static_cast<size_t>(r)] + 1);
    double top = -std::numeric_limits<double>::infinity(), mean_score = 0;
    for (int64_t j = 0; j < end; ++j) {
      if (j % kPrefillTile == 0) {
        mean_score = 0;
        for (int64_t d = 0; d < h.head_dim; ++d)
          mean_score += double{q[d]} * means[static_cast<size_t>(j / kPrefillTile * h.head_dim + d)];
      }
      const auto [sum, size] = dot(q, h.k.data() + j * h.head_dim, h.head_dim);
      e.qk_max = std::max(e.qk_max, std::fabs(sum));
      e.qk_max_shifted = std::max(e.qk_max_shifted, std::fabs(sum - mean_score));
      if (size > 0) e.resonance += std::fabs(sum) / size;
      pairs += 1;
      score[static_cast<size_t>(j)] = sum * double{h.scale};
      top = std::max(top, score[static_cast<size_t>(j)]);
    }
    double total = 0;
    double* out = e.out.data() + r * h.head_dim;
    for (int64_t j = 0; j < end; ++j) {
      const double w = std::exp(score[static_cast<size_t>(j)] - top);
      total += w;
      for (int64_t d = 0; d < h.head_dim; ++d)
        out[d] += w * double{h.v[static_cast<size_t>(j * h.head_dim + d)]};
    }
    for (int64_t d = 0; d < h.head_dim; ++d) out[d] /= total;
  }
  e.resonance /= std::max(pairs, 1.0);
  return e;
}

/// Outputs [n_row, head_dim] of a kernel; rows of consecutive positions go together.
std::vector<float> run_kernel(const PrefillKernel& kernel, const PrecisionHead& h) {
  const int64_t bytes = kernel.tile_bytes(h.head_dim), n_row = static_cast<int64_t>(h.position.size());
  const int64_t n_tile = PromptAttention::tiles(h.n_key);
  AlignedArray<std::byte> tiles(n_tile * bytes), scratch(kernel.scratch_bytes(h.head_dim));
  for (int64_t t = 0; t < n_tile; ++t) {
    const int64_t at = t * kPrefillTile;
    kernel.pack(h.k.data() + at * h.head_dim, h.head_dim, h.v.data() + at * h.head_dim, h.head_dim,
                std::min(kPrefillTile, h.n_key - at), h.head_dim, h.scale, tiles.data() + t * bytes);
  }
  std::vector<float> out(h.q.size());
  for (int64_t r = 0, n = 0; r < n_row; r += n) {
    const auto position = [&](int64_t i) { return std::min(h.position[static_cast<size_t>(i)], h.n_key); };
    for (n = 1; r + n < n_row && (position(r + n) == position(r) + n || position(r + n) == h.n_key); ++n) {
    }
    kernels::PrefillRows rows;
    rows.q = h.q.data() + r * h.head_dim;
    rows.ldq = h.head_dim;
    rows.n_row = n;
    rows.head_dim = h.head_dim;
    rows.tiles = tiles.data();
    rows.end = h.n_key;
    rows.first = position(r);
    rows.scale = h.scale;
    rows.out = out.data() + r * h.head_dim;
    rows.ldo = h.head_dim;
    rows.scratch = scratch.data();
    kernel.attend(rows);
  }
  return out;
}

/// NaN without a finite row.
void compare(const PrecisionHead& h, const Exact& e, const std::vector<float>& out, PrecisionRow& row) {
  double square = 0, finite = 0;
  row.rows = static_cast<int64_t>(h.position.size());
  for (int64_t r = 0; r < row.rows; ++r) {
    double sum = 0;
    for (int64_t d = 0; d < h.head_dim; ++d) {
      const auto at = static_cast<size_t>(r * h.head_dim + d);
      sum += std::pow(double{out[at]} - e.out[at], 2);
    }
    if (std::isfinite(sum)) {
      square += sum;
      finite += static_cast<double>(h.head_dim);
    } else {
      ++row.nan_rows;
    }
  }
  double size = 0;
  for (const float x : h.v) size += double{x} * double{x};
  size /= static_cast<double>(h.v.size());
  row.rmse = finite > 0 ? std::sqrt(square / finite / size) : std::numeric_limits<double>::quiet_NaN();
}

std::vector<PrefillAttention> all_kernels() {
  std::vector<PrefillAttention> all;
  for (const std::string& name : attention_names()) {
    const PrefillAttention a = *parse_attention(name);
    if (a != PrefillAttention::automatic) all.push_back(a);
  }
  return all;
}

Status cancelled() { return {StatusCode::cancelled, "eval was cancelled"}; }

/// Calls work(i) for i < n on threads.
template <class Work>
void in_parallel(int64_t n, int n_threads, Work work) {
  std::atomic<int64_t> next{0};
  const auto run = [&] {
    for (int64_t i = next++; i < n; i = next++) work(i);
  };
  std::vector<std::thread> threads;
  for (int t = 1; t < n_threads; ++t) threads.emplace_back(run);
  run();
  for (std::thread& t : threads) t.join();
}

struct Sink {
  std::span<const PrefillAttention> kernels;
  int n_threads;
  std::vector<PrecisionRow> rows;

  /// judge(i, head) gives the name of head i.
  template <class Make>
  void judge(int64_t n, Make make) {
    std::vector<std::vector<PrecisionRow>> found(static_cast<size_t>(n));
    in_parallel(n, n_threads, [&](int64_t i) {
      PrecisionHead head;
      PrecisionRow label;
      make(i, head, label);
      std::vector<PrecisionRow> all = judge_head(head, kernels);
      for (PrecisionRow& row : all) {
        row.name = label.name;
        row.layer = label.layer;
        row.head = label.head;
      }
      found[static_cast<size_t>(i)] = std::move(all);
    });
    for (auto& all : found) rows.insert(rows.end(), all.begin(), all.end());
  }
};

/// Catches a layer's queries as they come and judges its heads when the layer is done.
class ModelHeads {
 public:
  ModelHeads(const AttentionSpec& attention, const kernels::RopeTable& rope, int64_t n, Sink& sink)
      : spec_(attention), rope_(rope), sink_(sink) {
    for (int64_t r = 0; r < n; ++r) {
      if ((n - 1 - r) / kRun % 2 == 0) position_.push_back(r);
    }
  }

  void queries(const float* q, int64_t n) {
    const int64_t width = spec_.n_head * spec_.head_dim;
    for (int64_t r = 0; r < n; ++r, ++seen_) {
      if (std::binary_search(position_.begin(), position_.end(), seen_))
        q_.insert(q_.end(), q + r * width, q + (r + 1) * width);
    }
  }

  void layer_done(int64_t layer, const float* k, const float* v, int64_t n) {
    const int64_t group = spec_.n_head / spec_.n_head_kv, width = spec_.n_head_kv * spec_.head_dim;
    sink_.judge(spec_.n_head, [&](int64_t h, PrecisionHead& head, PrecisionRow& label) {
      label.name = fmt::format("layer {} head {}", layer, h);
      label.layer = layer;
      label.head = h;
      head.head_dim = spec_.head_dim;
      head.n_key = n;
      head.scale = spec_.scale;
      head.position = position_;
      for (size_t i = 0; i < position_.size(); ++i)
        rotate(q_.data() + (static_cast<int64_t>(i) * spec_.n_head + h) * spec_.head_dim, position_[i],
               head.q);
      for (int64_t j = 0; j < n; ++j) {
        const float* at = v + j * width + h / group * spec_.head_dim;
        head.v.insert(head.v.end(), at, at + spec_.head_dim);
        rotate(k + j * width + h / group * spec_.head_dim, j, head.k);
      }
    });
    seen_ = 0;
    q_.clear();
  }

 private:
  void rotate(const float* x, int64_t position, std::vector<float>& to) const {
    std::vector<float> angle(static_cast<size_t>(rope_.n_rot()));
    const int64_t half = rope_.n_rot() / 2;
    rope_.at(position, angle.data(), angle.data() + half);
    to.resize(to.size() + static_cast<size_t>(spec_.head_dim));
    kernels::ops().rope_rows(x, 1, spec_.head_dim, rope_.n_rot(), angle.data(), angle.data() + half, 0, false,
                             to.data() + to.size() - static_cast<size_t>(spec_.head_dim));
  }

  const AttentionSpec& spec_;
  const kernels::RopeTable& rope_;
  Sink& sink_;
  std::vector<int64_t> position_;  ///< of the judged rows, ascending
  std::vector<float> q_;           ///< [judged, n_head, head_dim] of the running layer, before RoPE
  int64_t seen_ = 0;
};

}  // namespace

std::vector<PrecisionRow> judge_head(const PrecisionHead& head, std::span<const PrefillAttention> kernels) {
  const Exact exact = exact_attention(head);
  std::vector<PrecisionRow> rows;
  for (const PrefillAttention kernel : kernels) {
    PrecisionRow row;
    row.kernel = kernel;
    row.head_dim = head.head_dim;
    row.length = head.n_key;
    row.qk_max = exact.qk_max;
    row.qk_max_shifted = exact.qk_max_shifted;
    row.resonance = exact.resonance;
    compare(head, exact, run_kernel(*kernels::ops().prefill[static_cast<int>(attention_kind(kernel))], head),
            row);
    rows.push_back(std::move(row));
  }
  return rows;
}

int64_t random_cases() { return kCases * static_cast<int64_t>(kShapes.size()); }

std::string random_case(int64_t number, PrecisionHead& head) {
  const Shape shape = kShapes[static_cast<size_t>(number / kCases)];
  const auto which = static_cast<size_t>(number % kCases);
  const double mean = kMeans[which % kMeans.size()];
  const size_t kind = which / kMeans.size();
  std::mt19937 random(static_cast<uint32_t>(number + 1));
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> uniform;
  const auto draw = [&] {
    double x = mean;
    if (kind < kAmplitudes.size()) {
      x += (2 * uniform(random) - 1) * kAmplitudes[kind];
    } else {
      x += normal(random);
      if (uniform(random) < kOutliers) x += kOutlierSize * normal(random);
    }
    return kernels::half_to_float(kernels::float_to_half(static_cast<float>(x)));
  };
  const auto fill = [&](std::vector<float>& x, int64_t n) {
    x.resize(static_cast<size_t>(n));
    for (float& y : x) y = draw();
  };
  head.head_dim = shape.head_dim;
  head.n_key = shape.length;
  head.scale = 1 / std::sqrt(static_cast<float>(shape.head_dim));
  head.position.assign(kRandomRows, shape.length);
  fill(head.q, kRandomRows * shape.head_dim);
  fill(head.k, shape.length * shape.head_dim);
  fill(head.v, shape.length * shape.head_dim);
  const std::string numbers = kind < kAmplitudes.size()
                                  ? fmt::format("uniform mean {} amplitude {}", mean, kAmplitudes[kind])
                                  : fmt::format("hybrid mean {}", mean);
  return fmt::format("{} head_dim {} length {}", numbers, shape.head_dim, shape.length);
}

Result<std::vector<PrecisionRow>> measure_precision(const std::shared_ptr<const Model>& model,
                                                    std::span<const Token> text,
                                                    const PrecisionOptions& options,
                                                    const ProgressFn& progress) {
  if (static_cast<int64_t>(text.size()) < options.context) {
    return Status(StatusCode::invalid_argument,
                  fmt::format("the text has {} tokens but the context is {}; give a longer text or lower "
                              "--context",
                              text.size(), options.context));
  }
  const std::vector<PrefillAttention> kernels = options.kernels.empty() ? all_kernels() : options.kernels;
  const int n_threads = options.n_threads > 0 ? options.n_threads : usable_cores();
  Sink sink{kernels, n_threads, {}};
  for (int64_t i = 0; options.random && i < random_cases(); i += n_threads) {
    const int64_t n = std::min<int64_t>(n_threads, random_cases() - i);
    sink.judge(n, [&](int64_t j, PrecisionHead& head, PrecisionRow& label) {
      label.name = random_case(i + j, head);
    });
    const double done = static_cast<double>(i + n) / static_cast<double>(random_cases());
    if (progress && !progress(kRandomShare * done)) return cancelled();
  }
  if (options.context == 0) return std::move(sink.rows);

  const ModelParts& parts = parts_of(*model);
  const std::vector<kernels::RopeTable> ropes = rope_tables(parts.spec(), options.context);
  Result<ExecutorLease> executor = ExecutorLease::take(parts.executors, n_threads);
  if (!executor.ok()) return executor.status();
  if (parts.spec().n_recurrent() > 0)
    return Status(StatusCode::unsupported, "a model with recurrent layers is not judged head by head yet");
  ModelHeads heads(parts.spec().layer(0).attention, ropes.front(), options.context, sink);
  PrefillHooks hooks;
  hooks.queries = [&](int64_t, const float* q, int64_t n) { heads.queries(q, n); };
  hooks.layer_done = [&](int64_t layer, const float* k, const float* v, int64_t n) {
    heads.layer_done(layer, k, v, n);
    return Status();
  };
  Prefill prefill(*parts.weights, parts.plan, ropes, **executor, {.attention = PrefillAttention::f32});
  std::vector<float> logits(static_cast<size_t>(model->info().n_vocab));
  const double before = options.random ? kRandomShare : 0;
  const Status status = prefill.run(
      text.first(static_cast<size_t>(options.context)), 0, hooks,
      [&](double done) { return !progress || progress(before + (1 - before) * done); }, logits.data());
  if (!status.ok()) return status;
  return std::move(sink.rows);
}

}  // namespace narrows
