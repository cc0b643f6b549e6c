#include "exec/cpu/cpu_executor.h"

#include <algorithm>
#include <initializer_list>

#include "base/clock.h"
#include "base/part.h"
#include "exec/cpu/gated.h"
#include "kernels/ops.h"

namespace narrows {

/// One thread in a run.
class CpuExecutor::Thread final : public Team {
 public:
  Thread(CpuExecutor& executor, int ith)
      : worker(executor.workers_[static_cast<size_t>(ith)]), pool_(*executor.pool_), ith_(ith) {}
  int ith() const override { return ith_; }
  int n_threads() const override { return pool_.n_threads(); }
  void barrier() override { pool_.barrier(); }
  Part part(int64_t n) const { return part_of(n, ith_, n_threads()); }

  Worker& worker;

 private:
  ThreadPool& pool_;
  int ith_;
};

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Outputs of `w` that thread ith takes when all the bytes of the stage are shared equally; those of w begin
/// at byte `begin` of `total`. Parts end at units, all threads' together are all outputs.
Part outputs_of(const Linear& w, int64_t begin, int64_t total, int ith, int n_threads) {
  const auto cut = [&](int i) {
    const int64_t row = (total / n_threads * i + total % n_threads * i / n_threads - begin) / w.row_bytes();
    const int64_t up = ceil_div(std::max<int64_t>(row, 0), w.unit()) * w.unit();
    return i == n_threads ? w.n_out() : std::min(up, w.n_out());
  };
  return {cut(ith), cut(ith + 1)};
}

bool takes_bytes(const LinearOp& l) { return l.w->tiles.has_value(); }

void add_bias(const float* bias, int64_t n, float* y) {
  for (int64_t i = 0; bias != nullptr && i < n; ++i) y[i] += bias[i];
}

/// x [n] += scale norm(y); y is written over.
void add_normed(const NormOp& norm, float scale, int64_t n, float* y, float* x) {
  if (norm.weight != nullptr) norm_row(norm, y, n, y);
  for (int64_t i = 0; i < n; ++i) x[i] += scale * y[i];
}

}  // namespace

CpuExecutor::CpuExecutor(const ModelSpec& spec, const Plan& plan)
    : spec_(spec), plan_(plan), width_(widths_of(spec, plan)) {}

Result<std::unique_ptr<CpuExecutor>> CpuExecutor::create(const ModelSpec& spec, const Plan& plan,
                                                         int n_threads) {
  std::unique_ptr<CpuExecutor> made(new CpuExecutor(spec, plan));
  if (!made->claim_.resize(bytes_needed(spec, plan, kFewRows, false, n_threads)))
    return Status(StatusCode::out_of_memory, "no memory for the activations of a step");
  Result<std::unique_ptr<ThreadPool>> pool = ThreadPool::create(n_threads);
  if (!pool.ok()) return pool.status();
  made->pool_ = std::move(*pool);
  made->workers_.resize(static_cast<size_t>(n_threads));
  made->experts_ = std::make_unique<ExpertFfn>(ExpertFfn::sizes_of(plan, spec.n_embd), n_threads);
  return made;
}

Status CpuExecutor::load_layer(const LayerPlan& layer) {
  if (loaded_ == nullptr) {
    Result<std::unique_ptr<LoadedLayer>> made = LoadedLayer::create(*pool_);
    if (!made.ok()) return made.status();
    loaded_ = std::move(*made);
  }
  return loaded_->load(layer);
}

Status CpuExecutor::run(const Run& run) {
  if (run.n > (run.loaded ? loaded_rows_ : rows_) || (run.output != nullptr && run.n - run.from > kFewRows))
    return {StatusCode::internal, "more rows than room was made for"};
  if (run.loaded) {
    if (run.layers.size() != 1 || loaded_ == nullptr || !loaded_->holds(run.layers.front()))
      return {StatusCode::internal, "a layer that is not loaded"};
    for (const int64_t n : {run.n, run.n - run.from}) {
      const int64_t block = block_rows(std::max<int64_t>(n, 1), n_threads());
      if (Status s = loaded_->prepare(std::min(block, n), n % block); !s.ok()) return s;
    }
  }
  run_ = &run;
  if (measure_) last_ns_ = monotonic_ns();
  pool_->run(
      [](void* executor, int ith, int /*n*/) {
        auto& self = *static_cast<CpuExecutor*>(executor);
        Thread thread(self, ith);
        self.run_thread(thread);
      },
      this);
  if (measure_) times_[static_cast<size_t>(RunStage::logits)] += monotonic_ns() - last_ns_;
  run_ = nullptr;
  return error_.take();
}

void CpuExecutor::run_thread(Thread& t) {
  for (const LayerPlan& layer : run_->layers) {
    const int64_t from = &layer == &run_->layers.back() ? run_->from : 0;
    if (run_->loaded) {
      run_by_rows(layer, from, t);
    } else {
      run_by_outputs(layer, from, t);
    }
  }
  if (run_->output != nullptr) run_logits(t);
}

void CpuExecutor::mix(const LayerPlan& layer, Thread& t) {
  const bool measured = measure_ && t.ith() == 0;
  if (measured) run_->mixer->measure_from(last_ns_);
  const AttentionSpec& a = layer.mix.attention;
  float* q = qkv_.data();
  MixRows rows = {q,
                  q + a.width_q(),
                  q + a.width_q() + a.width_kv(),
                  layer.project.n_out,
                  mixed_.data(),
                  layer.mix.width_out(),
                  run_->n};
  if (layer.mix.is_recurrent()) rows.k = rows.v = nullptr;
  run_->mixer->mix(layer, rows, t);
  if (!measured) return;
  last_ns_ = monotonic_ns();
  const auto stages = run_->mixer->measured(last_ns_);
  for (size_t i = 0; i < stages.size(); ++i) times_[static_cast<size_t>(RunStage::score) + i] += stages[i];
}

/// What the heads gave times sigmoid of their gates, if there are such; rows are shared out.
void CpuExecutor::gate_mixed(const LayerPlan& layer, int64_t from, Thread& t) {
  const MixStage& mix = layer.mix;
  if (!mix.attention.output_gate) return;
  const Part mine = t.part((run_->n - from) * mix.attention.n_head);
  const int64_t d = mix.attention.head_dim;
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    const int64_t r = from + i / mix.attention.n_head, at = i % mix.attention.n_head * d;
    kernels::ops().sigmoid_gate(qkv_.data() + r * layer.project.n_out + mix.at_gate() + at, d,
                                mixed_.data() + r * mix.width_out() + at);
  }
  t.barrier();
}

// --- by outputs

void CpuExecutor::run_by_outputs(const LayerPlan& layer, int64_t from, Thread& t) {
  const int64_t n = run_->n - from, d = width_.embd, width = layer.mix.width_out();
  float* x = run_->x + from * d;
  Output qkv[kMostDeltaParts];
  size_t n_qkv = 0;
  int64_t at = 0;
  for (const LinearOp& l : layer.project.linears) {
    qkv[n_qkv++] = {Linear(*l.w), l.bias, qkv_.data() + at, layer.project.n_out, false};
    at += l.w->n_out;
  }
  multiply({qkv, n_qkv}, normed(layer.project.norm, layer.project.linears, 0, t), t);
  finish_stage(RunStage::qkv, t);
  mix(layer, t);
  if (n == 0) return;
  gate_mixed(layer, from, t);
  add_product(layer, layer.out, layer.out_norm, taken(mixed_.data() + from * width, width, n, layer.out, t),
              x, t);
  finish_stage(RunStage::out, t);
  if (layer.experts) experts_->activate(layer, x, n, t);
  if (layer.n_ff > 0) {
    if (layer.experts) t.barrier();  // for what the shared expert weighs
    activate(layer, normed(layer.ffn.norm, layer.ffn.linears, from, t), t);
  }
  finish_stage(RunStage::ffn, t);
  if (layer.n_ff > 0) {
    add_product(layer, layer.down, layer.down_norm, taken(gate_up_.data(), layer.n_ff, n, layer.down, t), x,
                t);
    if (layer.experts) t.barrier();  // both add to all of x, shared out in other parts
  }
  if (layer.experts) experts_->add(layer, x, n, t);
  finish_stage(RunStage::down, t);
}

/// x [in.n, n_embd] += scale norm(W in + b). A norm wants whole rows, which no thread has.
void CpuExecutor::add_product(const LayerPlan& layer, const LinearOp& linear, const NormOp& norm,
                              const Input& in, float* x, Thread& t) {
  const int64_t d = width_.embd;
  const bool normed = norm.weight != nullptr || layer.residual_scale != 1;
  const Output out = {Linear(*linear.w), linear.bias, normed ? added_.data() : x, d, !normed};
  multiply({&out, 1}, in, t);
  if (!normed) return;
  t.barrier();
  const Part mine = t.part(in.n);
  for (int64_t r = mine.begin; r < mine.end; ++r)
    add_normed(norm, layer.residual_scale, d, added_.data() + r * d, x + r * d);
}

/// Rows [first, first + m) of the residual stream, normed, into y.
void CpuExecutor::norm_rows(const NormOp& norm, int64_t first, int64_t m, float* y) const {
  const int64_t d = width_.embd;
  for (int64_t r = 0; r < m; ++r) norm_row(norm, run_->x + (first + r) * d, d, y + r * d);
}

void CpuExecutor::run_logits(Thread& t) {
  const OutputPlan& o = *run_->output;
  const int64_t n = run_->n - run_->from, d = width_.embd;
  float* normed = t.worker.norm.data();
  norm_rows(o.norm, run_->from, n, normed);
  const Output logits = {Linear(*o.logits.w), o.logits.bias, run_->logits, spec_.n_vocab, false};
  multiply({&logits, 1}, {normed, d, n, d, false}, t);
}

/// Rows from `from` on of the residual stream.
CpuExecutor::Input CpuExecutor::normed(const NormOp& norm, std::span<const LinearOp> linears, int64_t from,
                                       Thread& t) {
  const int64_t n = run_->n - from, d = width_.embd;
  const bool few = n <= kFewRows;
  float* y = few ? t.worker.norm.data() : normed_.data();
  const Part mine = few ? Part{0, n} : t.part(n);
  norm_rows(norm, from + mine.begin, mine.end - mine.begin, y + mine.begin * d);
  if (few) return {y, d, n, d, false};
  const bool rounds = std::any_of(linears.begin(), linears.end(), takes_bytes);
  if (rounds) bytes_.round(y, d, d, mine.begin, mine.end);
  t.barrier();
  return {y, d, n, d, rounds};
}

CpuExecutor::Input CpuExecutor::taken(const float* x, int64_t ld, int64_t n, const LinearOp& linear,
                                      Thread& t) {
  const int64_t n_in = linear.w->n_in;
  if (n <= kFewRows || !takes_bytes(linear)) return {x, ld, n, n_in, false};
  const Part mine = t.part(n);
  bytes_.round(x, ld, n_in, mine.begin, mine.end);
  t.barrier();
  return {x, ld, n, n_in, true};
}

/// Rows from `first` on, as many as a product takes at once.
LinearInput& CpuExecutor::block_of(const Input& in, int64_t first, Thread& t) {
  LinearInput& input = t.worker.input;
  const float* x = in.x + first * in.ld;
  const int64_t n = std::min(kFewRows, in.n - first);
  if (in.rounded) {
    input.set(x, in.ld, n, in.n_in, bytes_.rows(first, in.n_in));
  } else {
    input.set(x, in.ld, n, in.n_in);
  }
  return input;
}

void CpuExecutor::multiply(std::span<const Output> outputs, const Input& in, Thread& t) {
  int64_t total = 0;
  for (const Output& o : outputs) total += o.w.n_out() * o.w.row_bytes();
  for (int64_t first = 0; first < in.n; first += kFewRows) {
    LinearInput& input = block_of(in, first, t);
    const int64_t n = input.n_row();
    int64_t begin = 0;
    for (const Output& o : outputs) {
      const Part mine = outputs_of(o.w, begin, total, t.ith(), t.n_threads());
      begin += o.w.n_out() * o.w.row_bytes();
      float* y = o.y + first * o.ldy;
      if (o.bias != nullptr) {
        for (int64_t r = 0; r < n; ++r) {
          for (int64_t i = mine.begin; i < mine.end; ++i)
            y[r * o.ldy + i] = o.accumulate ? y[r * o.ldy + i] + o.bias[i] : o.bias[i];
        }
      }
      o.w.multiply(mine.begin, mine.end, input, y, o.ldy, o.accumulate || o.bias != nullptr);
    }
  }
}

/// Activations of row r (from the first that is not only mixed on) of the expert that all go through.
void CpuExecutor::weigh_shared(const LayerPlan& layer, int64_t r, int64_t n, float* act) const {
  if (layer.experts.shared_gate == nullptr) return;
  for (int64_t i = 0; i < n; ++i) act[i] *= experts_->shared_weight()[r];
}

/// The same rows of gate and up, so that a thread has what its activations need.
void CpuExecutor::activate(const LayerPlan& layer, const Input& in, Thread& t) {
  const int64_t n_ff = layer.n_ff;
  const auto& linears = layer.ffn.linears;
  const bool joined = linears.size() == 1;
  const Linear gate = Linear(*linears.front().w).rows(0, n_ff),
               up = Linear(*linears.back().w).rows(joined ? n_ff : 0, n_ff);
  const float* b_gate = linears.front().bias;
  const float* b_up = joined && b_gate != nullptr ? b_gate + n_ff : linears.back().bias;
  const int64_t unit = std::max(gate.unit(), up.unit());
  const Part units = t.part(ceil_div(n_ff, unit));
  const int64_t begin = units.begin * unit, end = std::min(units.end * unit, n_ff);
  const auto gated = gated_by(layer.activation);
  for (int64_t first = 0; first < in.n; first += kFewRows) {
    LinearInput& input = block_of(in, first, t);
    const int64_t n = input.n_row();
    float* g = gate_up_.data() + first * n_ff;
    float* u = g + rows_ * width_.ff;
    for (int64_t r = 0; r < n; ++r) {
      const int64_t at = r * n_ff;
      if (b_gate != nullptr) std::copy(b_gate + begin, b_gate + end, g + at + begin);
      if (b_up != nullptr) std::copy(b_up + begin, b_up + end, u + at + begin);
    }
    gate.multiply(begin, end, input, g, n_ff, b_gate != nullptr);
    up.multiply(begin, end, input, u, n_ff, b_up != nullptr);
    for (int64_t r = 0; r < n; ++r) {
      float* at = g + r * n_ff + begin;
      gated(at, u + r * n_ff + begin, end - begin, at);
      weigh_shared(layer, first + r, end - begin, at);
    }
  }
}

// --- by rows

void CpuExecutor::run_by_rows(const LayerPlan& layer, int64_t from, Thread& t) {
  using Step = Status (CpuExecutor::*)(const LayerPlan&, int64_t, int64_t, Thread&);
  // A block a thread at a time: all read the same weights at the same time, which then come from memory once.
  const auto through = [&](int64_t first, std::initializer_list<Step> steps) {
    const int64_t n = run_->n - first, block = n > 0 ? block_rows(n, t.n_threads()) : 1;
    for (int64_t begin = 0; begin < n; begin += t.n_threads() * block) {
      const int64_t r = begin + t.ith() * block, m = std::min(block, n - r);
      for (const Step* step = steps.begin(); step != steps.end(); ++step) {
        if (step != steps.begin()) t.barrier();
        if (m > 0)
          error_.run("a layer of the prompt", [&] { return (this->**step)(layer, first + r, m, t); });
      }
    }
  };
  through(0, {&CpuExecutor::project_rows});
  finish_stage(RunStage::qkv, t);
  mix(layer, t);
  gate_mixed(layer, from, t);
  if (layer.experts) {
    through(from, {&CpuExecutor::out_rows});
    finish_stage(RunStage::out, t);
    float* x = run_->x + from * width_.embd;
    if (from < run_->n) experts_->activate(layer, x, run_->n - from, t);
    finish_stage(RunStage::ffn, t);
    if (layer.n_ff > 0) {
      through(from, {&CpuExecutor::ffn_rows, &CpuExecutor::down_rows});
      t.barrier();
    }
    if (from < run_->n) experts_->add(layer, x, run_->n - from, t);
  } else {
    through(from, {&CpuExecutor::out_rows, &CpuExecutor::ffn_rows, &CpuExecutor::down_rows});
  }
  finish_stage(RunStage::down, t);
}

Status CpuExecutor::project_rows(const LayerPlan& layer, int64_t first, int64_t m, Thread& t) {
  norm_rows(layer.project.norm, first, m, t.worker.norm.data());
  const int64_t ld = layer.project.n_out;
  float* to = qkv_.data() + first * ld;
  const bool one = layer.project.linears.size() == 1;
  for (const LinearOp& l : layer.project.linears) {
    const int64_t n_out = l.w->n_out;
    float* y = one ? to : t.worker.wide.data();
    if (Status s = loaded_->multiply(*l.w, t.worker.norm.data(), m, y, t.ith()); !s.ok()) return s;
    for (int64_t r = 0; r < m; ++r) {
      if (!one) std::copy_n(y + r * n_out, n_out, to + r * ld);
      add_bias(l.bias, n_out, to + r * ld);
    }
    to += n_out;
  }
  return {};
}

/// Rows [first, first + m) of x += scale norm(W from + b).
Status CpuExecutor::add_rows(const LayerPlan& layer, const LinearOp& linear, const NormOp& norm,
                             const float* from, int64_t first, int64_t m, Thread& t) {
  const int64_t d = width_.embd;
  float* const x = run_->x + first * d;
  float* const wide = t.worker.wide.data();
  if (Status s = loaded_->multiply(*linear.w, from, m, wide, t.ith()); !s.ok()) return s;
  for (int64_t r = 0; r < m; ++r) {
    float* y = wide + r * d;
    add_bias(linear.bias, d, y);
    add_normed(norm, layer.residual_scale, d, y, x + r * d);
  }
  return {};
}

Status CpuExecutor::out_rows(const LayerPlan& layer, int64_t first, int64_t m, Thread& t) {
  const float* mixed = mixed_.data() + first * layer.mix.width_out();
  return add_rows(layer, layer.out, layer.out_norm, mixed, first, m, t);
}

Status CpuExecutor::ffn_rows(const LayerPlan& layer, int64_t first, int64_t m, Thread& t) {
  const int64_t n_ff = layer.n_ff;
  Worker& w = t.worker;
  norm_rows(layer.ffn.norm, first, m, w.norm.data());
  // Gate and up: rows of one matrix's outputs, or one matrix's after the other's.
  const bool joined = layer.ffn.linears.size() == 1;
  float* y = w.wide.data();
  for (const LinearOp& l : layer.ffn.linears) {
    if (Status s = loaded_->multiply(*l.w, w.norm.data(), m, y, t.ith()); !s.ok()) return s;
    for (int64_t r = 0; r < m; ++r) add_bias(l.bias, l.w->n_out, y + r * l.w->n_out);
    y += m * l.w->n_out;
  }
  const int64_t ld = joined ? 2 * n_ff : n_ff;
  const float* gate = w.wide.data();
  const float* up = gate + (joined ? n_ff : m * n_ff);
  const auto gated = gated_by(layer.activation);
  for (int64_t r = 0; r < m; ++r) {
    float* act = w.act.data() + r * n_ff;
    gated(gate + r * ld, up + r * ld, n_ff, act);
    weigh_shared(layer, first + r - run_->from, n_ff, act);
  }
  return {};
}

Status CpuExecutor::down_rows(const LayerPlan& layer, int64_t first, int64_t m, Thread& t) {
  return add_rows(layer, layer.down, layer.down_norm, t.worker.act.data(), first, m, t);
}

void CpuExecutor::finish_stage(RunStage stage, Thread& t) {
  t.barrier();
  if (!measure_ || t.ith() != 0) return;
  const int64_t now = monotonic_ns();
  times_[static_cast<size_t>(stage)] += now - last_ns_;
  last_ns_ = now;
}

void CpuExecutor::measure(bool on) {
  measure_ = on;
  times_ = {};
}

}  // namespace narrows
