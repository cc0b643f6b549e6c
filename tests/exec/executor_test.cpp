// The CPU's executor: what it computes of a layer against the same in double, by outputs and by rows; and a
// row's numbers have the same bits whatever the other rows are, with any number of threads.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/model_parts.h"
#include "exec/cpu/cpu_executor.h"
#include "support/sanitized.h"
#include "support/session.h"
#include "support/tiny_cases.h"

namespace narrows::testing {
namespace {

/// Mixes by taking the queries as they are, on one thread; enough to see what comes before and after.
class TakeQueries final : public Mixer {
 public:
  void mix(const LayerPlan& layer, const MixRows& rows, Team& team) override {
    const int64_t width = layer.mix.width_out();
    if (team.ith() == 0) {
      seen_rows = rows.n;
      for (int64_t r = 0; r < rows.n; ++r) {
        std::copy_n(rows.q + r * rows.ld, width, rows.out + r * rows.ldo);
        if (rows.k == nullptr) continue;
        for (const float* x : {rows.k + r * rows.ld, rows.v + r * rows.ld})
          kv.insert(kv.end(), x, x + layer.mix.attention.width_kv());
      }
    }
    team.barrier();
  }
  int64_t seen_rows = 0;
  std::vector<float> kv;  ///< k and v of each row
};

std::vector<float> some_rows(int64_t n, int64_t width) {
  std::vector<float> x(static_cast<size_t>(n * width));
  for (size_t i = 0; i < x.size(); ++i) x[i] = std::sin(static_cast<float>(i * i % 1009));
  return x;
}

using Doubles = std::vector<double>;

Doubles unpacked(const Matrix& w) {
  std::vector<float> all(static_cast<size_t>(w.n_in * w.n_out));
  w.unpack(0, w.n_out, all.data());
  return {all.begin(), all.end()};
}

Doubles product(const LinearOp& l, const Doubles& x) {
  const Doubles w = unpacked(*l.w);
  Doubles y(static_cast<size_t>(l.w->n_out));
  for (size_t o = 0; o < y.size(); ++o) {
    y[o] = l.bias != nullptr ? static_cast<double>(l.bias[o]) : 0;
    for (size_t i = 0; i < x.size(); ++i) y[o] += w[o * x.size() + i] * x[i];
  }
  return y;
}

Doubles normed(const NormOp& norm, const Doubles& x) {
  if (norm.weight == nullptr) return x;
  double square = 0;
  for (const double v : x) square += v * v;
  const double scale = 1 / std::sqrt(square / static_cast<double>(x.size()) + static_cast<double>(norm.eps));
  Doubles y(x);
  for (size_t i = 0; i < y.size(); ++i) y[i] *= scale * static_cast<double>(norm.weight[i]);
  return y;
}

Doubles project(const ProjectStage& stage, const Doubles& x) {
  Doubles all;
  for (const LinearOp& l : stage.linears) {
    const Doubles y = product(l, normed(stage.norm, x));
    all.insert(all.end(), y.begin(), y.end());
  }
  return all;
}

Doubles activated(const LayerPlan& layer, const Doubles& gate_up) {
  const size_t n_ff = gate_up.size() / 2;
  Doubles act(n_ff);
  for (size_t i = 0; i < n_ff; ++i) {
    const double g = gate_up[i];
    if (layer.activation == Activation::clamped) {
      const double x = std::min(g, 7.0), up = std::clamp(gate_up[n_ff + i], -7.0, 7.0);
      act[i] = x / (1 + std::exp(-1.702 * x)) * (up + 1);
      continue;
    }
    const double one = layer.activation == Activation::silu
                           ? g / (1 + std::exp(-g))
                           : g / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g)));
    act[i] = one * gate_up[n_ff + i];
  }
  return act;
}

/// Of a row that is normed already.
Doubles experts_in_double(const LayerPlan& layer, const Doubles& x) {
  const ExpertsStage& stage = layer.experts;
  const Doubles logits = product(stage.router, x);
  std::vector<size_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return logits[a] > logits[b]; });
  double all = 0, chosen = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    all += std::exp(logits[i]);
    if (i < static_cast<size_t>(stage.spec.n_used)) chosen += std::exp(logits[order[i]]);
  }
  Doubles sum(x.size());
  for (size_t i = 0; i < static_cast<size_t>(stage.spec.n_used); ++i) {
    const ExpertOp& expert = stage.all[order[i]];
    const double weight = std::exp(logits[order[i]]) / (stage.spec.normalised ? chosen : all) *
                          static_cast<double>(stage.spec.scale);
    Doubles gate_up;
    for (const LinearOp& l : expert.gate_up) {
      const Doubles y = product(l, x);
      gate_up.insert(gate_up.end(), y.begin(), y.end());
    }
    const size_t n_ff = gate_up.size() / 2;
    for (size_t f = 0; f < n_ff; ++f) {
      if (expert.gate_bias != nullptr) gate_up[f] += static_cast<double>(expert.gate_bias[f]);
      if (expert.up_bias != nullptr) gate_up[n_ff + f] += static_cast<double>(expert.up_bias[f]);
    }
    const Doubles y = product(expert.down, activated(layer, gate_up));
    for (size_t o = 0; o < sum.size(); ++o) sum[o] += weight * y[o];
  }
  if (layer.n_ff == 0) return sum;
  double weight = 1;
  if (stage.shared_gate != nullptr) {
    double gate = 0;
    for (size_t i = 0; i < x.size(); ++i) gate += static_cast<double>(stage.shared_gate[i]) * x[i];
    weight = 1 / (1 + std::exp(-gate));
  }
  Doubles gate_up;
  for (const LinearOp& l : layer.ffn.linears) {
    const Doubles y = product(l, x);
    gate_up.insert(gate_up.end(), y.begin(), y.end());
  }
  const Doubles y = product(layer.down, activated(layer, gate_up));
  for (size_t o = 0; o < sum.size(); ++o) sum[o] += weight * static_cast<double>(layer.residual_scale) * y[o];
  return sum;
}

/// A row of the residual stream through a layer that mixes as TakeQueries does.
Doubles layer_in_double(const LayerPlan& layer, Doubles x) {
  const auto add = [&](const Doubles& y) {
    for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
  };
  const auto scaled = [&](Doubles y) {
    for (double& v : y) v *= static_cast<double>(layer.residual_scale);
    return y;
  };
  Doubles q = project(layer.project, x);
  for (size_t i = 0; layer.mix.attention.output_gate && i < static_cast<size_t>(layer.mix.width_out()); ++i)
    q[i] /= 1 + std::exp(-q[static_cast<size_t>(layer.mix.at_gate()) + i]);
  q.resize(static_cast<size_t>(layer.mix.width_out()));
  add(scaled(normed(layer.out_norm, product(layer.out, q))));
  if (layer.experts) {
    add(experts_in_double(layer, normed(layer.ffn.norm, x)));
    return x;
  }
  add(scaled(normed(layer.down_norm, product(layer.down, activated(layer, project(layer.ffn, x))))));
  return x;
}

struct Layered {
  explicit Layered(const TinyModel& m, int n_threads = 1) : loaded(m), parts(parts_of(*loaded.model)) {
    auto made = CpuExecutor::create(parts.spec(), parts.plan, n_threads);
    EXPECT_TRUE(made.ok());
    executor = std::move(*made);
  }
  const LayerPlan& layer() const { return parts.plan.layers[index]; }
  int64_t n_embd() const { return parts.spec().n_embd; }

  /// n rows through the layer.
  std::vector<float> rows_through(int64_t n, bool by_rows, int64_t from = 0) {
    std::vector<float> x = some_rows(n, n_embd());
    mixer = {};
    EXPECT_OK(executor->reserve(n, by_rows));
    if (by_rows) EXPECT_OK(executor->load_layer(layer()));
    EXPECT_OK(executor->run({{&layer(), 1}, x.data(), n, from, &mixer, nullptr, nullptr, by_rows}));
    return x;
  }

  LoadedTiny loaded;
  const ModelParts& parts;
  std::unique_ptr<CpuExecutor> executor;
  TakeQueries mixer;
  size_t index = 0;  ///< of the layer
};

class EveryCase : public ::testing::TestWithParam<TinyCase> {};

TEST_P(EveryCase, ALayerIsWhatItIsInDouble) {
  Layered s(GetParam().model, 2);
  const size_t n_layer = GetParam().model.is_hybrid() ? s.parts.plan.layers.size() : 1;
  for (size_t which = 0; which < 2 * n_layer; ++which) {
    const bool by_rows = which % 2 == 1;
    s.index = which / 2;
    if (by_rows && !s.executor->can_load(s.layer())) continue;
    // Weights and inputs in 8 bits, or as they are.
    const double tolerance = GetParam().float_weights ? 2e-4 : 0.12;
    const std::vector<float> got = s.rows_through(3, by_rows);
    const std::vector<float> x = some_rows(3, s.n_embd());
    for (int64_t r = 0; r < 3; ++r) {
      const auto row =
          std::span(x).subspan(static_cast<size_t>(r * s.n_embd()), static_cast<size_t>(s.n_embd()));
      const Doubles want = layer_in_double(s.layer(), {row.begin(), row.end()});
      double size = 0;
      for (const double v : want) size = std::max(size, std::fabs(v));
      for (int64_t i = 0; i < s.n_embd(); ++i) {
        ASSERT_NEAR(static_cast<double>(got[static_cast<size_t>(r * s.n_embd() + i)]),
                    want[static_cast<size_t>(i)], tolerance * size)
            << r << ", " << i << (by_rows ? " by rows" : " by outputs");
      }
    }
  }
}

/// oneDNN orders the sums of a product by its number of rows where it uses AMX.
double order_of_sums(bool by_rows) { return by_rows && LoadedLayer::has_bf16() ? 1e-4 : 0; }

TEST_P(EveryCase, ARowIsTheSameWhateverTheOthersAre) {
  for (const bool by_rows : {false, true}) {
    Layered one(GetParam().model);
    if (by_rows && !one.executor->can_load(one.layer())) continue;
    // The first rows of every number of rows are the same numbers.
    const std::vector<float> want = one.rows_through(300, by_rows);
    const std::vector<float> want_kv = one.mixer.kv;
    for (const int n_threads : thinned<int>({1, 3})) {
      Layered s(GetParam().model, n_threads);
      for (const int64_t n : thinned<int64_t>({1, 2, 7, 65, 63, 64, 130, 257})) {
        if (by_rows && n != 65) continue;  // each number of rows takes oneDNN some time to prepare
        const std::vector<float> got = s.rows_through(n, by_rows);
        ASSERT_EQ(s.mixer.seen_rows, n);
        const double most = order_of_sums(by_rows);
        ASSERT_LE(max_difference(got, std::span(want).first(got.size())), most)
            << n << " rows, " << n_threads << " threads";
        ASSERT_LE(max_difference(s.mixer.kv, std::span(want_kv).first(s.mixer.kv.size())), most) << n;
      }
    }
  }
}

TEST_P(EveryCase, RowsBeforeFromAreOnlyMixed) {
  for (const bool by_rows : {false, true}) {
    Layered s(GetParam().model, 2);
    if (by_rows && !s.executor->can_load(s.layer())) continue;
    const std::vector<float> before = some_rows(70, s.n_embd()), all = s.rows_through(70, by_rows);
    for (const int64_t from : {1, 69, 70}) {
      const std::vector<float> got = s.rows_through(70, by_rows, from);
      const auto at = static_cast<size_t>(from * s.n_embd());
      EXPECT_EQ(max_difference(std::span(got).first(at), std::span(before).first(at)), 0);
      EXPECT_LE(max_difference(std::span(got).subspan(at), std::span(all).subspan(at)),
                order_of_sums(by_rows));
      EXPECT_EQ(s.mixer.seen_rows, 70);
    }
  }
}

std::string case_name(const ::testing::TestParamInfo<TinyCase>& info) { return info.param.name; }

INSTANTIATE_TEST_SUITE_P(Cases, EveryCase, ::testing::ValuesIn(all_cases()), case_name);

TEST(Executor, RefusesWhatItIsNotReadyFor) {
  Layered s{TinyModel()};
  std::vector<float> x = some_rows(9, s.n_embd());
  const auto run = [&](int64_t n, bool by_rows) {
    return s.executor->run({{&s.layer(), 1}, x.data(), n, 0, &s.mixer, nullptr, nullptr, by_rows});
  };
  EXPECT_EQ(run(1, false).code(), StatusCode::internal);
  EXPECT_OK(s.executor->reserve(8, false));
  EXPECT_OK(run(8, false));
  EXPECT_EQ(run(9, false).code(), StatusCode::internal);
  EXPECT_OK(s.executor->reserve(9, true));
  EXPECT_EQ(run(9, true).code(), StatusCode::internal);  // nothing is loaded
  if (!s.executor->can_load(s.layer())) return;
  EXPECT_OK(s.executor->load_layer(s.parts.plan.layers[1]));
  EXPECT_EQ(run(9, true).code(), StatusCode::internal);
  EXPECT_OK(s.executor->load_layer(s.layer()));
  EXPECT_OK(run(9, true));
  s.executor->shrink();
  EXPECT_EQ(run(9, true).code(), StatusCode::internal);
}

TEST(Executor, TellsWhatTheTimeGoesTo) {
  Layered s{TinyModel()};
  (void)s.rows_through(4, false);
  s.executor->measure(true);
  (void)s.rows_through(4, false);
  for (const RunStage stage : {RunStage::qkv, RunStage::attend, RunStage::out, RunStage::ffn, RunStage::down})
    EXPECT_GT(s.executor->times()[static_cast<size_t>(stage)], 0);
  s.executor->measure(false);
  EXPECT_EQ(s.executor->times(), Executor::Times{});
}

// A prompt and the same tokens in steps, with all keys exact in both: the products are the same, the
// attention's order of sums is not.
TEST(Executor, APromptIsItsSteps) {
  for (const TinyCase& c : quantised_cases()) {
    const LoadedTiny loaded(c.model);
    const auto tokens = random_tokens(40);
    auto prompt = make_session(loaded.model), steps = make_session(loaded.model);
    ASSERT_OK(prompt->prefill(tokens));
    ASSERT_OK(steps->prefill(std::span(tokens).first(1)));
    const auto rows = decode_all(*steps, std::span(tokens).subspan(1));
    EXPECT_LT(kl_divergence(prompt->logits(), rows.back()), 5e-3) << c.name;
  }
}

}  // namespace
}  // namespace narrows::testing
