// Layer-major prefill: the whole prompt goes through layer 0, then layer 1, ... Only one layer's exact keys
// and values are alive at a time, however many layers the model has; when a layer is done they are handed to
// the cache. Pipeline step 4.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "base/aligned.h"
#include "exec/executor.h"
#include "kernels/rope_table.h"
#include "kv/kv_layer.h"
#include "model/plan.h"
#include "narrows/engine.h"
#include "narrows/status.h"

namespace narrows {

class BlockSequence;  // kv/f16/cuda/block_pool.h
class KltPrompt;      // kv/klt/cuda/klt_prompt.h
struct DeviceRows;    // exec/cuda/device_mixer.h

/// D = n_head_kv * head_dim of the layer.
struct PrefillHooks {
  /// Queries before RoPE of a chunk of new tokens, [n, n_head, head_dim], in order and before layer_done. May
  /// be empty.
  std::function<void(int64_t layer, const float* q, int64_t n)> queries;
  /// Of a recurrent layer, which is asked for nothing else but layer_done, with null, and seal: a chunk of n
  /// tokens comes, all of it that can fail; then its rows, by all threads, phase by phase.
  std::function<Status(int64_t layer, int64_t n)> begin_rows = {};
  std::function<void(int64_t layer, int phase, const RecurrentRows& rows, int ith, int n_threads)> run_rows =
      {};
  /// A segment of a layer is done: keys before RoPE and values of its tokens, [n, D] each, valid during the
  /// call.
  std::function<Status(int64_t layer, const float* k, const float* v, int64_t n)> layer_done;
  /// Ends of segments among the new tokens, ascending, in (0, n); the last segment ends with them. Tokens of
  /// later segments attend to what read_past gives for earlier ones.
  std::vector<int64_t> segment_ends = {};
  /// After layer_done of a segment that is not the last. changed_from: the first position before the segment
  /// for which read_past now gives other numbers than it gave, if there is one.
  std::function<Status(int64_t layer, int64_t* changed_from)> seal = {};
  /// The last segment is sealed too: tokens of the same prompt are to follow in another run.
  bool goes_on = false;
  /// Rotated keys and values of tokens [first, first + n) that the cache held before, [n, D] each.
  std::function<void(int64_t layer, int64_t first, int64_t n, float* k, float* v)> read_past;
  /// Where the cache keeps its tokens on the executor's device; then the prompt is read there, keys and
  /// values are written into it, and layer_done gets null for them. Null: the cache is the host's.
  BlockSequence* blocks = nullptr;
  /// Not null: blocks is this, of one layer after the other. The cache keeps tokens elsewhere, and the hooks
  /// get keys, values and queries as of a prompt that is read on the host.
  std::shared_ptr<BlockSequence> scratch = {};
  /// Not null, with scratch: the cache is there too, encodes there, and gets its rows so; of queries and
  /// layer_done nothing is called. There are no segments.
  std::shared_ptr<KltPrompt> klt = {};
  /// Of `queries`, with scratch: only those at positions that this divides are looked at. Empty: all.
  std::function<int64_t(int64_t layer)> query_stride = {};
  /// Of each new token, by its index among them (host only): the hidden state after the last norm, [n_embd],
  /// in order; the logits, [n_vocab], in any order and on all threads at once.
  std::function<void(int64_t index, std::span<const float> row)> hidden = {};
  std::function<void(int64_t index, std::span<const float> row)> logits = {};
};

class Prefill {
 public:
  /// ropes: one for each of the model's. All outlive it.
  Prefill(const ModelWeights& weights, const Plan& plan, std::span<const kernels::RopeTable> ropes,
          Executor& executor, const PromptOptions& options = {});
  ~Prefill();

  /// Runs tokens at positions n_past .. and writes the logits after the last one, [n_vocab].
  /// Memory beside the weights: see bytes_needed(). cancelled if progress returns false; hooks' errors are
  /// passed on with the layer's number. non_finite names the layer whose attention overflows.
  Status run(std::span<const Token> tokens, int64_t n_past, PrefillHooks hooks, const ProgressFn& progress,
             float* logits);

  /// The same in pieces: begin(), then step() until done(). Between steps the
  /// executor may do anything but other prompts. logits outlives it. After an error, or to give up, just
  /// destroy it. When it is done, another begin() may follow with more of the same prompt.
  Status begin(std::span<const Token> tokens, int64_t n_past, PrefillHooks hooks, float* logits);
  /// A chunk of one layer: some tens of milliseconds.
  Status step();
  /// True if something of what it has begun may touch a cache between steps.
  bool leaves_work() const { return hooks_.klt != nullptr && buffers_ != nullptr; }
  /// Returns when nothing does any more.
  void wait() const;
  bool done() const { return buffers_ == nullptr; }
  /// The share done in [0, 1].
  double progress() const;
  /// Of all runs that are done: the share of the tiles of keys that was read by blocks which could leave some
  /// out; 1 if none could.
  double read_share() const {
    return tiles_seen_ > 0 ? static_cast<double>(tiles_read_) / static_cast<double>(tiles_seen_) : 1;
  }

  /// Peak bytes of a run over n tokens on n_past: residual stream, one layer's keys and values, a chunk's
  /// activations.
  static int64_t bytes_needed(const ModelSpec& spec, const Plan& plan, int64_t n, int64_t n_past,
                              int n_threads, const PromptOptions& options);
  /// What PrefillHooks::logits takes beside that.
  static int64_t row_bytes(const ModelSpec& spec);

 private:
  struct LayerBuffers;
  class ChunkMixer;
  class DeviceChunkMixer;
  class RecurrentMixer;
  const AttentionSpec& attention() const;
  bool is_recurrent() const;
  bool loads(int64_t layer) const;
  void pack_past(int64_t from, int64_t to);
  Status send_past(int64_t from, int64_t to);
  Status check_rows() const;
  void fetch_rows(const LayerPlan& layer, const DeviceRows& rows, device::Stream& stream);
  int64_t chunk_tokens() const;
  Status begin_on_device(std::span<const Token> tokens);
  Status run_chunk(int64_t first, int64_t n);
  Status run_chunk_on_device(Run run, int64_t first);
  bool wants_rows() const { return hooks_.hidden || hooks_.logits; }
  Status give_rows(int64_t first, int64_t n);
  Status open_layer();
  Status make_attention();
  void count_tiles();
  Status close_segment();
  Status close_layer();
  Status no_room() const;

  const ModelWeights& weights_;
  const Plan& plan_;
  std::span<const kernels::RopeTable> ropes_;
  Executor& executor_;
  PromptOptions options_;
  std::unique_ptr<LayerBuffers> buffers_;
  PrefillHooks hooks_;
  float* logits_ = nullptr;
  AlignedArray<float> row_logits_;  ///< of PrefillHooks::logits, [kRowsAtOnce, n_vocab]
  int64_t tiles_seen_ = 0;
  int64_t tiles_read_ = 0;
};

}  // namespace narrows
