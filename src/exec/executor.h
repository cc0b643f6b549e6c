// Who computes: an executor takes rows of the residual stream through layers, by the plan alone. The same
// call serves a chunk of a prompt (many rows of one sequence, one layer) and a step (a row of each sequence,
// all layers). It owns the device: threads, activations, weights in the form that a long prompt likes. What a
// row attends to belongs to the caller: a Mixer.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "base/workers.h"
#include "model/plan.h"
#include "narrows/status.h"

namespace narrows {

class DeviceMixer;  // exec/cuda/device_mixer.h
namespace device {
class Stream;
}

/// One of the threads that work together on a stage.
class Team {
 public:
  virtual ~Team() = default;
  virtual int ith() const = 0;
  virtual int n_threads() const = 0;
  /// No thread goes on before all have come here.
  virtual void barrier() = 0;
};

/// Queries, keys and values of all rows before norms and RoPE, row r at r * ld; where the mixed rows go,
/// [n, ldo] with MixStage::width_out() numbers each, before a gate. Of a DeltaNet layer q is the whole row.
struct MixRows {
  float* q = nullptr;
  float* k = nullptr;
  float* v = nullptr;
  int64_t ld = 0;
  float* out = nullptr;
  int64_t ldo = 0;
  int64_t n = 0;
};

/// y [n] = the norm of x; x itself if there is no such norm.
void norm_row(const NormOp& norm, const float* x, int64_t n, float* y);
/// Runs [first, end) of a row's heads, each normed in place; nothing if there is no such norm.
void norm_heads(const HeadNorms& norms, int64_t first, int64_t end, float* x);

/// The mix stage of a run: attention of its rows over whatever they may see.
class Mixer {
 public:
  virtual ~Mixer() = default;
  /// Called by every thread at once. When it has returned on all threads after a barrier that it makes as its
  /// last act, rows.out is complete from Run::from on. Throws nothing.
  virtual void mix(const LayerPlan& layer, const MixRows& rows, Team& team) = 0;

  /// Not null: what the rows attend to is on the executor's device, and this works there in place of mix().
  virtual DeviceMixer* on_device() { return nullptr; }

  /// Around mix(), on the first thread, while the executor measures: the time, and what of it went to the
  /// stages score, select, rebuild, attend.
  virtual void measure_from(int64_t now_ns) { begun_ns_ = now_ns; }
  virtual std::array<int64_t, 4> measured(int64_t now_ns) { return {0, 0, 0, now_ns - begun_ns_}; }

 private:
  int64_t begun_ns_ = 0;
};

/// What the time of a run goes to, as the first thread sees it, waiting included: products, and in between
/// the stages of attention, as the mixer tells them.
enum class RunStage { qkv, score, select, rebuild, attend, out, ffn, down, logits };
inline constexpr size_t kRunStages = 9;
constexpr bool is_product(RunStage s) { return s < RunStage::score || s > RunStage::attend; }

struct Run {
  std::span<const LayerPlan> layers;  ///< none, on the CPU: the output of rows that have been through all
  float* x = nullptr;  ///< [n, n_embd] residual stream, updated (after all of the model's layers maybe not)
  int64_t n = 0;
  /// Rows before it end with the mix stage of the last layer: only their keys and values are wanted.
  int64_t from = 0;
  Mixer* mixer = nullptr;
  const OutputPlan* output = nullptr;  ///< null: no logits
  float* logits = nullptr;             ///< [n - from, n_vocab], of 64 rows at most
  /// Multiply by what load_layer() has loaded, which must be the (only) layer of the run. Logits are never.
  bool loaded = false;
  float* x_on_device = nullptr;  ///< x in the memory of the executor's device, in place of it
};

class Executor : public Workers {
 public:
  /// Room for runs of up to n rows, of loaded layers or not. out_of_memory.
  virtual Status reserve(int64_t n, bool loaded) = 0;
  /// Lets go of all but what a step of a few rows takes, loaded layers included.
  virtual void shrink() = 0;

  /// True if load_layer() has a form for this layer that a prompt gains by.
  virtual bool can_load(const LayerPlan& layer) const = 0;
  /// A layer's weights in the form for many rows, in place of the layer loaded before. out_of_memory,
  /// internal.
  virtual Status load_layer(const LayerPlan& layer) = 0;

  /// Does it; rows as reserved. A row's numbers depend on `loaded` and its own numbers alone, to the last
  /// bit: not on the other rows, nor on the number of threads. (Of a loaded layer oneDNN orders the sums by
  /// the number of rows of a product where it uses AMX: there only within that.) Errors: out_of_memory,
  /// internal (of loaded weights).
  virtual Status run(const Run& run) = 0;

  /// Nanoseconds of each RunStage, summed over the runs since measure(true).
  using Times = std::array<int64_t, kRunStages>;
  virtual void measure(bool on) = 0;
  virtual const Times& times() const = 0;

  /// Of the layer that is loaded, the matrix after the mix stage, bf16 [n_embd, width_q] on the device; null:
  /// it is not there.
  virtual const void* loaded_output() const { return nullptr; }

  /// The order of a device's work; null: the executor is the CPU's.
  virtual device::Stream* stream() { return nullptr; }
};

}  // namespace narrows
