#include "exec/cpu/expert_ffn.h"

#include <algorithm>
#include <cmath>

#include "base/part.h"
#include "exec/cpu/gated.h"
#include "kernels/ops.h"

namespace narrows {

namespace {

/// Sums of chosen weights below are taken for this, as half precision's smallest number: no division by zero.
constexpr double kLeastSum = 6.103515625e-5;

/// What an output of gate and up costs beside its rows, in rows: its weights come from memory once.
constexpr int64_t kWeightCost = 2;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// y [begin, end) += factor * bias, which may be null.
void add_bias(const float* bias, int64_t begin, int64_t end, float* y, float factor = 1) {
  if (bias == nullptr) return;
  for (int64_t i = begin; i < end; ++i) y[i] += factor * bias[i];
}

}  // namespace

void choose_experts(const ExpertSpec& spec, const float* logits, int32_t* expert, float* weight) {
  const auto n_used = static_cast<int32_t>(spec.n_used), n_expert = static_cast<int32_t>(spec.n_expert);
  const auto more = [&](int32_t a, int32_t b) {
    return logits[a] > logits[b] || (std::isnan(logits[b]) && !std::isnan(logits[a]));
  };
  int32_t n = 0;  // the best so far, best first
  for (int32_t e = 0; e < n_expert; ++e) {
    if (n == n_used && !more(e, expert[n - 1])) continue;
    if (n < n_used) ++n;
    int32_t at = n - 1;
    for (; at > 0 && more(e, expert[at - 1]); --at) expert[at] = expert[at - 1];
    expert[at] = e;
  }
  const auto largest = static_cast<double>(logits[expert[0]]);
  const auto exponential = [&](int32_t e) { return std::exp(static_cast<double>(logits[e]) - largest); };
  double all = 0, chosen = 0;
  for (int32_t e = 0; e < n_expert; ++e) all += exponential(e);
  std::sort(expert, expert + n_used);
  for (int32_t i = 0; i < n_used; ++i) chosen += exponential(expert[i]) / all;
  const double divisor = spec.normalised ? std::max(chosen, kLeastSum) : 1;
  for (int32_t i = 0; i < n_used; ++i) {
    weight[i] = static_cast<float>(exponential(expert[i]) / all / divisor * static_cast<double>(spec.scale));
  }
}

ExpertFfn::Sizes ExpertFfn::sizes_of(const Plan& plan, int64_t n_embd) {
  Sizes s;
  for (const LayerPlan& l : plan.layers) {
    if (!l.experts) continue;
    s.n_embd = n_embd;
    s.n_ff = std::max(s.n_ff, l.experts.n_ff);
    s.n_expert = std::max(s.n_expert, l.experts.spec.n_expert);
    s.n_used = std::max(s.n_used, l.experts.spec.n_used);
  }
  return s;
}

ExpertFfn::ExpertFfn(const Sizes& sizes, int n_threads)
    : sizes_(sizes), workers_(static_cast<size_t>(n_threads)) {}

bool ExpertFfn::reserve(int64_t n) {
  if (n <= rows_ || sizes_.n_used == 0) return true;
  rows_ = 0;
  const Sizes& s = sizes_;
  const int64_t pairs = n * s.n_used, block = std::min(n, kBlock);
  logits_ = AlignedArray<float>(n * s.n_expert);
  chosen_ = AlignedArray<int32_t>(pairs);
  weight_ = AlignedArray<float>(pairs);
  gate_up_ = AlignedArray<float>(2 * pairs * s.n_ff);
  shared_weight_ = AlignedArray<float>(n);
  bool ok = shared_weight_.ok() && logits_.ok() && chosen_.ok() && weight_.ok() && gate_up_.ok();
  if (n > kBlock) {
    normed_ = AlignedArray<float>(n * s.n_embd);
    ok = ok && normed_.ok();
  }
  if (pairs > kBlock) ok = ok && bytes_.reserve(pairs, s.n_ff);
  for (Worker& w : workers_) {
    for (AlignedArray<float>* a : {&w.normed, &w.gathered, &w.sums}) {
      *a = AlignedArray<float>(block * s.n_embd);
      ok = ok && a->ok();
    }
    ok = ok && w.input.reserve(std::min(pairs, kBlock), std::max(s.n_embd, s.n_ff));
    w.begin.resize(static_cast<size_t>(s.n_expert + 1));
    w.row.resize(static_cast<size_t>(pairs));
    w.weight.resize(static_cast<size_t>(pairs));
  }
  if (ok) rows_ = n;
  return ok;
}

void ExpertFfn::shrink() {
  rows_ = 0;
  for (AlignedArray<float>* a : {&normed_, &logits_, &weight_, &gate_up_, &shared_weight_})
    *a = AlignedArray<float>();
  chosen_ = AlignedArray<int32_t>();
  bytes_ = ByteInput();
  for (Worker& w : workers_) w = Worker();
}

int64_t ExpertFfn::bytes_needed(const Sizes& s, int64_t n, int n_threads) {
  if (s.n_used == 0) return 0;
  const int64_t pairs = n * s.n_used, block = std::min(n, kBlock);
  int64_t floats = n * (s.n_expert + 1) + pairs * (2 + 2 * s.n_ff);
  if (n > kBlock) floats += n * s.n_embd;
  if (pairs > kBlock) floats += pairs * s.n_ff * 2 / 5;
  const int64_t input = std::min(pairs, kBlock) * std::max(s.n_embd, s.n_ff) * 3 / 2;
  floats += n_threads * (3 * block * s.n_embd + input + 2 * (s.n_expert + 1) + 2 * pairs);
  return floats * static_cast<int64_t>(sizeof(float));
}

/// Norms, router and choice; a barrier is its last act.
void ExpertFfn::route(const LayerPlan& layer, const float* x, int64_t n, Team& team) {
  const int64_t d = sizes_.n_embd;
  const ExpertsStage& experts = layer.experts;
  Worker& w = workers_[static_cast<size_t>(team.ith())];
  const bool few = n <= kBlock;
  const Part rows = part_of(n, team.ith(), team.n_threads()), normed = few ? Part{0, n} : rows;
  float* y = few ? w.normed.data() : normed_.data();
  for (int64_t r = normed.begin; r < normed.end; ++r) norm_row(layer.ffn.norm, x + r * d, d, y + r * d);
  if (!few) team.barrier();

  const Linear router(*experts.router.w);
  const int64_t n_expert = router.n_out(), unit = router.unit();
  const Part units = part_of(ceil_div(n_expert, unit), team.ith(), team.n_threads());
  const int64_t begin = units.begin * unit, end = std::min(units.end * unit, n_expert);
  for (int64_t first = 0; first < n && begin < end; first += kBlock) {
    w.input.set(y + first * d, d, std::min(kBlock, n - first), d);
    router.multiply(begin, end, w.input, logits_.data() + first * n_expert, n_expert, false);
  }
  team.barrier();
  const int64_t n_used = experts.spec.n_used;
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    add_bias(experts.router.bias, 0, n_expert, logits_.data() + r * n_expert);
    choose_experts(experts.spec, logits_.data() + r * n_expert, chosen_.data() + r * n_used,
                   weight_.data() + r * n_used);
    shared_weight_[r] = 1;
    if (experts.shared_gate == nullptr) continue;
    double sum = 0;
    for (int64_t i = 0; i < d; ++i)
      sum += static_cast<double>(experts.shared_gate[i]) * static_cast<double>(y[r * d + i]);
    shared_weight_[r] = static_cast<float>(1 / (1 + std::exp(-sum)));
  }
  team.barrier();
}

void ExpertFfn::sort_pairs(const ExpertSpec& spec, int64_t n, Worker& w) const {
  const auto n_expert = static_cast<size_t>(spec.n_expert);
  std::fill_n(w.begin.begin(), n_expert + 1, 0);
  // Counted one place further on, so that while pairs are placed an expert's begin grows to the next one's.
  const int64_t pairs = n * spec.n_used;
  for (int64_t i = 0; i < pairs; ++i) {
    const auto e = static_cast<size_t>(chosen_[i]);
    if (e + 2 <= n_expert) ++w.begin[e + 2];
  }
  for (size_t e = 1; e <= n_expert; ++e) w.begin[e] += w.begin[e - 1];
  for (int64_t i = 0; i < pairs; ++i) {
    const auto at = static_cast<size_t>(w.begin[static_cast<size_t>(chosen_[i]) + 1]++);
    w.row[at] = static_cast<int32_t>(i / spec.n_used);
    w.weight[at] = weight_[i];
  }
}

void ExpertFfn::activate(const LayerPlan& layer, const float* x, int64_t n, Team& team) {
  route(layer, x, n, team);
  const ExpertsStage& experts = layer.experts;
  Worker& w = workers_[static_cast<size_t>(team.ith())];
  sort_pairs(experts.spec, n, w);
  // An expert's outputs, in units, cost the same each; a thread's part may begin and end within an expert.
  const auto& gate_up = experts.all.front().gate_up;
  const int64_t unit = std::max(Linear(*gate_up.front().w).unit(), Linear(*gate_up.back().w).unit());
  const int64_t units = ceil_div(layer.experts.n_ff, unit);
  const auto cost = [&](size_t e) {
    const int64_t rows = w.begin[e + 1] - w.begin[e];
    return rows > 0 ? rows + kWeightCost : 0;
  };
  int64_t total = 0;
  for (size_t e = 0; e < experts.all.size(); ++e) total += cost(e) * units;
  const Part mine = part_of(total, team.ith(), team.n_threads());
  int64_t before = 0;
  for (size_t e = 0; e < experts.all.size() && before < mine.end; ++e) {
    const int64_t each = cost(e);
    if (each == 0) continue;
    const int64_t begin = std::clamp<int64_t>(ceil_div(mine.begin - before, each), 0, units);
    const int64_t end = std::clamp<int64_t>(ceil_div(mine.end - before, each), 0, units);
    before += each * units;
    if (begin < end) activate_outputs(layer, e, begin * unit, std::min(end * unit, layer.experts.n_ff), n, w);
  }
}

/// Outputs [begin, end) of gate and up of one expert for all of its pairs.
void ExpertFfn::activate_outputs(const LayerPlan& layer, size_t expert, int64_t begin, int64_t end, int64_t n,
                                 Worker& w) {
  const int64_t d = sizes_.n_embd, n_ff = layer.experts.n_ff;
  const ExpertOp& op = layer.experts.all[expert];
  const auto& linears = op.gate_up;
  const bool joined = linears.size() == 1;
  const Linear gate = Linear(*linears.front().w).rows(0, n_ff),
               up = Linear(*linears.back().w).rows(joined ? n_ff : 0, n_ff);
  const float* normed = n <= kBlock ? w.normed.data() : normed_.data();
  const int64_t n_pair = n * layer.experts.spec.n_used;
  const auto gated = gated_by(layer.activation);
  for (int64_t first = w.begin[expert]; first < w.begin[expert + 1]; first += kBlock) {
    const int64_t m = std::min(kBlock, w.begin[expert + 1] - first);
    const int32_t* rows = w.row.data() + first;
    const float* input = normed + rows[0] * d;
    if (m > 1) {
      for (int64_t r = 0; r < m; ++r) std::copy_n(normed + rows[r] * d, d, w.gathered.data() + r * d);
      input = w.gathered.data();
    }
    w.input.set(input, d, m, d);
    float* g = gate_up_.data() + first * n_ff;
    float* u = g + n_pair * n_ff;
    gate.multiply(begin, end, w.input, g, n_ff, false);
    up.multiply(begin, end, w.input, u, n_ff, false);
    for (int64_t r = 0; r < m; ++r) {
      float* at = g + r * n_ff;
      add_bias(op.gate_bias, begin, end, at);
      add_bias(op.up_bias, begin, end, u + r * n_ff);
      gated(at + begin, u + r * n_ff + begin, end - begin, at + begin);
      const float weight = w.weight[static_cast<size_t>(first + r)];
      for (int64_t i = begin; i < end; ++i) at[i] *= weight;
    }
  }
}

void ExpertFfn::add(const LayerPlan& layer, float* x, int64_t n, Team& team) {
  const int64_t d = sizes_.n_embd, n_ff = layer.experts.n_ff, n_pair = n * layer.experts.spec.n_used;
  const ExpertsStage& experts = layer.experts;
  Worker& w = workers_[static_cast<size_t>(team.ith())];
  const float* act = gate_up_.data();
  const Linear any(*experts.all.front().down.w);
  const bool rounds = n_pair > kBlock && any.takes_bytes();
  if (rounds) {
    const Part mine = part_of(n_pair, team.ith(), team.n_threads());
    bytes_.round(act, n_ff, n_ff, mine.begin, mine.end);
    team.barrier();
  }
  const int64_t unit = any.unit();
  const Part units = part_of(ceil_div(d, unit), team.ith(), team.n_threads());
  const int64_t begin = units.begin * unit, end = std::min(units.end * unit, d);
  if (begin >= end) return;
  for (size_t e = 0; e < experts.all.size(); ++e) {
    const Linear down(*experts.all[e].down.w);
    for (int64_t first = w.begin[e]; first < w.begin[e + 1]; first += kBlock) {
      const int64_t m = std::min(kBlock, w.begin[e + 1] - first);
      if (rounds) {
        w.input.set(act + first * n_ff, n_ff, m, n_ff, bytes_.rows(first, n_ff));
      } else {
        w.input.set(act + first * n_ff, n_ff, m, n_ff);
      }
      const int32_t* rows = w.row.data() + first;
      // Not onto x at once: a kernel may add up in more bits than x has, and then a lone row would differ.
      down.multiply(begin, end, w.input, w.sums.data(), d, false);
      for (int64_t r = 0; r < m; ++r) {
        float* to = x + rows[r] * d;
        const float* from = w.sums.data() + r * d;
        for (int64_t i = begin; i < end; ++i) to[i] += from[i];
        // Its input was multiplied by the expert's weight, its bias was not.
        add_bias(experts.all[e].down.bias, begin, end, to, w.weight[static_cast<size_t>(first + r)]);
      }
    }
  }
}

}  // namespace narrows
