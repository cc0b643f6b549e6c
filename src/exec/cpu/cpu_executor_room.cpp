// What a run of so many rows takes: sizes of the largest layer, memory made and given back.
#include <algorithm>

#include "exec/cpu/cpu_executor.h"
#include "kv/layout.h"

namespace narrows {

CpuExecutor::Widths CpuExecutor::widths_of(const ModelSpec& spec, const Plan& plan) {
  Widths w = {spec.n_embd, 0, 0, 0, 0, spec.n_embd, 0};
  for (const LayerPlan& l : plan.layers) {
    w.qkv = std::max(w.qkv, l.project.n_out);
    w.q = std::max(w.q, l.mix.width_out());
    w.ff = std::max(w.ff, l.n_ff);
    if (l.out_norm.weight != nullptr || l.down_norm.weight != nullptr || l.residual_scale != 1)
      w.added = spec.n_embd;
    w.wide = std::max({w.wide, l.ffn.n_out, l.project.n_out, spec.n_embd});
  }
  w.input = std::max({w.embd, w.q, w.ff});
  return w;
}

int64_t CpuExecutor::block_rows(int64_t n, int n_threads) {
  return ceil_div(n, n_threads * ceil_div(n, n_threads * LoadedLayer::kBlock));
}

Status CpuExecutor::reserve(int64_t n, bool loaded) {
  const Status no_memory(StatusCode::out_of_memory, "no memory for the activations of a layer");
  if (n > std::max(rows_, loaded_rows_)) {
    qkv_ = AlignedArray<float>(n * width_.qkv);
    mixed_ = AlignedArray<float>(n * width_.q);
    if (!qkv_.ok() || !mixed_.ok()) {
      rows_ = loaded_rows_ = 0;
      return no_memory;
    }
  }
  // Logits are always by outputs.
  const int64_t few = std::min(n, kFewRows);
  const int64_t block = loaded ? block_rows(n, n_threads()) : 0;
  for (Worker& w : workers_) {
    const int64_t norm = std::max(few, block) * width_.embd;
    if (w.norm.size() < norm) w.norm = AlignedArray<float>(norm);
    if (w.wide.size() < block * width_.wide) w.wide = AlignedArray<float>(block * width_.wide);
    if (!w.act.ok() || w.act.size() < block * width_.ff) w.act = AlignedArray<float>(block * width_.ff);
    if (!w.input.reserve(few, width_.input) || !w.norm.ok() || (loaded && (!w.wide.ok() || !w.act.ok())))
      return no_memory;
  }
  if (!experts_->reserve(n)) {
    rows_ = loaded_rows_ = 0;
    return no_memory;
  }
  if (loaded) {
    loaded_rows_ = std::max(loaded_rows_, n);
  } else if (n > rows_) {
    gate_up_ = AlignedArray<float>(2 * n * width_.ff);
    added_ = AlignedArray<float>(n * width_.added);
    bool ok = gate_up_.ok() && added_.ok();
    if (n > kFewRows) {
      normed_ = AlignedArray<float>(n * width_.embd);
      ok = ok && normed_.ok() && bytes_.reserve(n, width_.input);
    }
    rows_ = ok ? n : 0;
    if (!ok) return no_memory;
  }
  return {};
}

void CpuExecutor::shrink() {
  loaded_.reset();
  if (std::max(rows_, loaded_rows_) <= kFewRows) return;
  rows_ = loaded_rows_ = 0;
  for (AlignedArray<float>* a : {&qkv_, &mixed_, &gate_up_, &added_, &normed_}) *a = AlignedArray<float>();
  bytes_ = ByteInput();
  experts_->shrink();
  for (Worker& w : workers_) w = Worker();
}

int64_t CpuExecutor::bytes_needed(const ModelSpec& spec, const Plan& plan, int64_t n, bool loaded,
                                  int n_threads) {
  const Widths w = widths_of(spec, plan);
  const int64_t few = std::min(n, kFewRows), block = loaded ? block_rows(n, n_threads) : 0;
  int64_t floats = n * (w.qkv + w.q) + n_threads * (std::max(few, block) * w.embd + few * w.input * 3 / 2);
  int64_t bytes = 0;
  if (loaded) {
    floats += n_threads * block * (w.wide + w.ff);
    for (const LayerPlan& l : plan.layers) bytes = std::max(bytes, LoadedLayer::bytes_needed(l, n_threads));
  } else {
    floats += n * (2 * w.ff + w.added);
    if (n > kFewRows) floats += n * (w.embd + w.input * 2 / 5);
  }
  bytes += ExpertFfn::bytes_needed(ExpertFfn::sizes_of(plan, spec.n_embd), n, n_threads);
  return floats * static_cast<int64_t>(sizeof(float)) + bytes;
}

}  // namespace narrows
