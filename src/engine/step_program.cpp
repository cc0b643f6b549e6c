#include "engine/step_program.h"

#include <algorithm>
#include <numeric>

#include "decode/scratch.h"
#include "decode/stages.h"
#include "kernels/ops.h"

namespace narrows {

namespace {

const float* floats(const ggml_tensor* t) {
  return t == nullptr ? nullptr : static_cast<const float*>(t->data);
}

/// What attention of a lane costs beside its tokens, in tokens.
constexpr int64_t kLaneTokens = 256;

/// Rows of `w` that thread ith takes when all the bytes of the stage are shared equally; those of w begin at
/// byte `begin` of `total`. Parts end at units, all threads' together are all rows.
Part rows_of(const Linear& w, int64_t begin, int64_t total, int ith, int n_threads) {
  const auto cut = [&](int i) {
    const int64_t row = (total / n_threads * i + total % n_threads * i / n_threads - begin) / w.row_bytes();
    const int64_t up = (std::max<int64_t>(row, 0) + w.unit() - 1) / w.unit() * w.unit();
    return i == n_threads ? w.n_out() : std::min(up, w.n_out());
  };
  return {cut(ith), cut(ith + 1)};
}

}  // namespace

Result<std::unique_ptr<StepProgram>> StepProgram::create(const ModelWeights& weights, int max_lanes,
                                                         ThreadPool& pool) {
  std::unique_ptr<StepProgram> program(new StepProgram(weights, max_lanes, pool));
  if (!program->allocate())
    return Status(StatusCode::out_of_memory, "no memory for the activations of a step");
  program->plan();
  return program;
}

StepProgram::StepProgram(const ModelWeights& weights, int max_lanes, ThreadPool& pool)
    : weights_(weights),
      hp_(weights.hparams()),
      max_lanes_(max_lanes),
      pool_(pool),
      width_q_(hp_.n_head * hp_.head_dim),
      width_qkv_(width_q_ + 2 * hp_.n_head_kv * hp_.head_dim) {}

bool StepProgram::allocate() {
  const int64_t kept = max_lanes_ == 1 ? hp_.n_layer : 1;
  if (kept > 1) {
    qkv_stride_ = width_qkv_;
    out_stride_ = width_q_;
  }
  x_ = AlignedArray<float>(max_lanes_ * hp_.n_embd);
  qkv_ = AlignedArray<float>(kept * max_lanes_ * width_qkv_);
  out_ = AlignedArray<float>(kept * max_lanes_ * width_q_);
  gate_up_ = AlignedArray<float>(2 * max_lanes_ * hp_.n_ff);
  logits_ = AlignedArray<float>(max_lanes_ * hp_.n_vocab);
  bool ok = x_.ok() && qkv_.ok() && out_.ok() && gate_up_.ok() && logits_.ok();
  workers_.resize(static_cast<size_t>(pool_.n_threads()));
  load_.resize(workers_.size());
  by_tokens_.resize(static_cast<size_t>(max_lanes_));
  owner_.resize(static_cast<size_t>(max_lanes_));
  for (Worker& worker : workers_) {
    worker.norm = AlignedArray<float>(max_lanes_ * hp_.n_embd);
    ok = worker.input.reserve(max_lanes_, std::max({hp_.n_embd, width_q_, hp_.n_ff})) && worker.norm.ok() &&
         ok;
  }
  return ok;
}

void StepProgram::plan() {
  const int64_t width_kv = hp_.n_head_kv * hp_.head_dim;
  for (int64_t i = 0; i < hp_.n_layer; ++i) {
    const LayerWeights& w = weights_.layer(i);
    Layer l;
    l.w = &w;
    float* rows = qkv_rows(static_cast<size_t>(i));
    if (w.wqkv != nullptr) {
      l.qkv.push_back({Linear(weights_, w.wqkv), floats(w.bqkv), rows, width_qkv_, false});
    } else {
      l.qkv.push_back({Linear(weights_, w.wq), floats(w.bq), rows, width_qkv_, false});
      l.qkv.push_back({Linear(weights_, w.wk), floats(w.bk), rows + width_q_, width_qkv_, false});
      l.qkv.push_back({Linear(weights_, w.wv), floats(w.bv), rows + width_q_ + width_kv, width_qkv_, false});
    }
    l.wo = {Linear(weights_, w.wo), floats(w.bo), x_.data(), hp_.n_embd, true};
    l.down = {Linear(weights_, w.down), floats(w.b_down), x_.data(), hp_.n_embd, true};
    if (w.gate_up != nullptr) {
      const Linear both(weights_, w.gate_up);
      l.gate = both.rows(0, hp_.n_ff);
      l.up = both.rows(hp_.n_ff, hp_.n_ff);
    } else {
      l.gate = Linear(weights_, w.gate);
      l.up = Linear(weights_, w.up);
      l.b_gate = floats(w.b_gate);
      l.b_up = floats(w.b_up);
    }
    layers_.push_back(std::move(l));
  }
  output_ = {Linear(weights_, weights_.output()), floats(weights_.output_bias()), logits_.data(), hp_.n_vocab,
             false};
}

void StepProgram::run(std::span<const DecodeLane> lanes) {
  lanes_ = lanes;
  share_lanes();
  if (measure_) last_ns_ = monotonic_ns();
  pool_.run([](void* program, int ith, int /*n*/) { static_cast<StepProgram*>(program)->run_thread(ith); },
            this);
  if (measure_) times_[static_cast<size_t>(StepStage::logits)] += monotonic_ns() - last_ns_;
  lanes_ = {};
}

void StepProgram::run_thread(int ith) {
  Worker& worker = workers_[static_cast<size_t>(ith)];
  for (size_t l = 0; l < layers_.size(); ++l) run_layer(l, ith, worker);
  norm_input(floats(weights_.output_norm()), worker);
  multiply({&output_, 1}, ith, worker.input);
}

void StepProgram::run_layer(size_t l, int ith, Worker& worker) {
  const Layer& layer = layers_[l];
  const auto n_lane = static_cast<int64_t>(lanes_.size());
  norm_input(floats(layer.w->attn_norm), worker);
  multiply(layer.qkv, ith, worker.input);
  finish_stage(StepStage::qkv, ith);
  attention(l, ith);
  worker.input.set(attention_rows(l), width_q_, n_lane, width_q_);
  multiply({&layer.wo, 1}, ith, worker.input);
  finish_stage(StepStage::wo, ith);
  norm_input(floats(layer.w->ffn_norm), worker);
  gate_and_up(layer, ith, worker);
  finish_stage(StepStage::gate_up, ith);
  worker.input.set(gate_up_.data(), hp_.n_ff, n_lane, hp_.n_ff);
  multiply({&layer.down, 1}, ith, worker.input);
  finish_stage(StepStage::down, ith);
}

void StepProgram::norm_input(const float* weight, Worker& worker) {
  const auto n_lane = static_cast<int64_t>(lanes_.size());
  for (int64_t r = 0; r < n_lane; ++r) {
    const int64_t at = r * hp_.n_embd;
    kernels::ops().rms_norm(x_.data() + at, weight, hp_.n_embd, hp_.rms_eps, worker.norm.data() + at);
  }
  worker.input.set(worker.norm.data(), hp_.n_embd, n_lane, hp_.n_embd);
}

void StepProgram::multiply(std::span<const Output> outputs, int ith, LinearInput& input) {
  int64_t total = 0, begin = 0;
  for (const Output& o : outputs) total += o.w.n_out() * o.w.row_bytes();
  for (const Output& o : outputs) {
    const Part rows = rows_of(o.w, begin, total, ith, pool_.n_threads());
    begin += o.w.n_out() * o.w.row_bytes();
    if (o.bias != nullptr) {
      for (int64_t r = 0; r < input.n_row(); ++r) {
        float* y = o.y + r * o.ldy;
        for (int64_t i = rows.begin; i < rows.end; ++i) y[i] = o.accumulate ? y[i] + o.bias[i] : o.bias[i];
      }
    }
    o.w.multiply(rows.begin, rows.end, input, o.y, o.ldy, o.accumulate || o.bias != nullptr);
  }
}

void StepProgram::gate_and_up(const Layer& layer, int ith, Worker& worker) {
  // The same rows of both, so that a thread has what its activations need.
  const int64_t unit = std::max(layer.gate.unit(), layer.up.unit());
  const Part units = part_of((hp_.n_ff + unit - 1) / unit, ith, pool_.n_threads());
  const int64_t begin = units.begin * unit, end = std::min(units.end * unit, hp_.n_ff);
  float* gate = gate_up_.data();
  float* up = gate + max_lanes_ * hp_.n_ff;
  for (int64_t r = 0; r < worker.input.n_row(); ++r) {
    const int64_t at = r * hp_.n_ff;
    if (layer.b_gate != nullptr) std::copy(layer.b_gate + begin, layer.b_gate + end, gate + at + begin);
    if (layer.b_up != nullptr) std::copy(layer.b_up + begin, layer.b_up + end, up + at + begin);
  }
  layer.gate.multiply(begin, end, worker.input, gate, hp_.n_ff, layer.b_gate != nullptr);
  layer.up.multiply(begin, end, worker.input, up, hp_.n_ff, layer.b_up != nullptr);
  for (int64_t r = 0; r < worker.input.n_row(); ++r) {
    float* at = gate + r * hp_.n_ff + begin;
    kernels::ops().swiglu(at, up + r * hp_.n_ff + begin, end - begin, at);
  }
}

/// Which lanes a thread attends for alone: that needs no barriers, and parts that do not fit the number of
/// threads (3 KV heads on 2 threads) cost nothing. The longest lanes are shared by all threads where the rest
/// would keep one of them waiting.
void StepProgram::share_lanes() {
  const auto n_lane = static_cast<int>(lanes_.size());
  const auto n_threads = static_cast<int64_t>(load_.size());
  const auto cost = [&](int lane) { return lanes_[static_cast<size_t>(lane)].n_tokens + kLaneTokens; };
  const auto by_tokens = std::span(by_tokens_).first(lanes_.size());
  std::iota(by_tokens.begin(), by_tokens.end(), 0);
  std::sort(by_tokens.begin(), by_tokens.end(),
            [&](int a, int b) { return cost(a) != cost(b) ? cost(a) > cost(b) : a < b; });
  for (n_shared_ = 0; n_shared_ < n_lane; ++n_shared_) {
    std::fill(owner_.begin(), owner_.end(), -1);
    std::fill(load_.begin(), load_.end(), 0);
    int64_t total = 0;
    for (const int lane : by_tokens.subspan(static_cast<size_t>(n_shared_))) {
      const auto least = std::min_element(load_.begin(), load_.end());
      *least += cost(lane);
      total += cost(lane);
      owner_[static_cast<size_t>(lane)] = static_cast<int>(least - load_.begin());
    }
    // A tenth more than its share is what barriers cost anyway.
    if (*std::max_element(load_.begin(), load_.end()) * n_threads * 10 <= total * 11) break;
  }
  if (n_shared_ == n_lane) std::fill(owner_.begin(), owner_.end(), -1);
  // The clock of the first lane is read by the first thread.
  if (const int first = owner_[0]; first > 0) {
    for (int& o : owner_) o = o == first ? 0 : o == 0 ? first : o;
  }
}

/// Heads [first, end) of q, then k, of lane after lane.
void StepProgram::norm_heads(size_t l, int64_t first, int64_t end) {
  const LayerWeights& w = *layers_[l].w;
  const int64_t heads = hp_.n_head + hp_.n_head_kv;
  for (int64_t i = first; i < end; ++i) {
    const int64_t h = i % heads;
    const float* weight = floats(h < hp_.n_head ? w.q_norm : w.k_norm);
    float* at = qkv_rows(l) + i / heads * width_qkv_ + h * hp_.head_dim;
    if (weight != nullptr) kernels::ops().rms_norm(at, weight, hp_.head_dim, hp_.rms_eps, at);
  }
}

void StepProgram::attention(size_t l, int ith) {
  const LayerWeights& w = *layers_[l].w;
  const int n_threads = pool_.n_threads();
  const bool measured = measure_ && ith == 0;
  if (measured) lanes_[0].scratch->thread(0).clock.start(last_ns_);
  const bool norms = w.q_norm != nullptr || w.k_norm != nullptr;
  const int64_t heads = hp_.n_head + hp_.n_head_kv;
  for (size_t i = 0; i < lanes_.size(); ++i) {
    if (owner_[i] != ith) continue;
    const auto lane = static_cast<int64_t>(i);
    if (norms) norm_heads(l, lane * heads, (lane + 1) * heads);
    LayerDecoder& decoder = *lanes_[i].decoders[l];
    for (int p = 0; p < decoder.n_phase(); ++p) {
      decoder.run_phase(p, step(static_cast<int64_t>(l), static_cast<int>(i)), *lanes_[i].scratch, 0, 1);
    }
  }
  int n_phase = 0;
  if (norms && n_shared_ > 0) {
    // A product's parts do not end where heads do, hence a stage of its own.
    for (size_t i = 0; i < lanes_.size(); ++i) {
      if (owner_[i] >= 0) continue;
      const Part mine = part_of(heads, ith, n_threads);
      const auto lane = static_cast<int64_t>(i);
      norm_heads(l, lane * heads + mine.begin, lane * heads + mine.end);
    }
    pool_.barrier();
  }
  for (size_t i = 0; i < lanes_.size(); ++i) {
    if (owner_[i] < 0) n_phase = std::max(n_phase, lanes_[i].decoders[l]->n_phase());
  }
  if (n_phase == 0) pool_.barrier();
  for (int p = 0; p < n_phase; ++p) {
    for (size_t i = 0; i < lanes_.size(); ++i) {
      if (owner_[i] >= 0) continue;
      LayerDecoder& decoder = *lanes_[i].decoders[l];
      // A lane with fewer phases joins late: all end together.
      const int phase = p - (n_phase - decoder.n_phase());
      if (phase < 0) continue;
      decoder.run_phase(phase, step(static_cast<int64_t>(l), static_cast<int>(i)), *lanes_[i].scratch, ith,
                        n_threads);
    }
    pool_.barrier();
  }
  if (!measured) return;
  last_ns_ = monotonic_ns();
  const StageClock::Times& stages = lanes_[0].scratch->thread(0).clock.stop(last_ns_);
  for (size_t i = 0; i < kAttentionStages; ++i)
    times_[static_cast<size_t>(StepStage::score) + i] += stages[i];
}

void StepProgram::finish_stage(StepStage stage, int ith) {
  pool_.barrier();
  if (!measure_ || ith != 0) return;
  const int64_t now = monotonic_ns();
  times_[static_cast<size_t>(stage)] += now - last_ns_;
  last_ns_ = now;
}

std::span<const float> StepProgram::logits(int lane) const {
  return {logits_.data() + lane * hp_.n_vocab, static_cast<size_t>(hp_.n_vocab)};
}

DecodeStep StepProgram::step(int64_t layer, int lane) {
  float* row = qkv_rows(static_cast<size_t>(layer)) + lane * width_qkv_;
  return {row, row + width_q_, row + width_q_ + hp_.n_head_kv * hp_.head_dim,
          attention_rows(static_cast<size_t>(layer)) + lane * width_q_};
}

void StepProgram::measure(bool on) {
  measure_ = on;
  times_ = {};
}

}  // namespace narrows
