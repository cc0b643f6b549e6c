// One decode step of one layer's attention over its cache: score -> select -> rebuild -> attend (decode/*.cpp
// in that order). Pipeline step 6. A step runs in phases: all threads finish phase p before any begins phase
// p + 1 (the ggml graph's barrier between two nodes), because ggml's custom ops have no barrier inside.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "cache/layer_cache.h"
#include "narrows/config.h"

namespace narrows {

/// The new token of one layer. Pointers are valid during the step.
struct DecodeStep {
  const float* q = nullptr;  ///< [n_head, head_dim] before RoPE
  const float* k = nullptr;  ///< [n_head_kv, head_dim] before RoPE
  const float* v = nullptr;  ///< [n_head_kv, head_dim]
  float* out = nullptr;      ///< [n_head, head_dim], written in the last phase
};

/// Buffers of a step, shared by all layers of a session (layers run one after another). Sized once: a step
/// allocates nothing but score room, which prepare() grows.
struct KltWork;  // decode/klt_work.h

class StepScratch {
 public:
  StepScratch(const AttentionShape& shape, int n_threads);
  struct Thread;  ///< decode/scratch.h: tiles of one thread
  Thread& thread(int ith) { return *threads_[static_cast<size_t>(ith)]; }
  struct Slice;  ///< decode/scratch.h: softmax states of one part of the tokens
  Slice& slice(int i) { return *slices_[static_cast<size_t>(i)]; }
  int n_threads() const { return static_cast<int>(threads_.size()); }
  /// False if there was no memory for it; LayerDecoder::prepare() then fails.
  bool ok() const;
  ~StepScratch();

  std::vector<float> scores;      ///< [tokens in pages], written by `score`
  std::vector<int32_t> selected;  ///< chosen tokens, ascending; indices into the pages, 0 = position n_sink
  std::vector<uint64_t> select_work;
  std::unique_ptr<KltWork> klt;  ///< made by the first klt layer

 private:
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<std::unique_ptr<Slice>> slices_;
};

class LayerDecoder {
 public:
  virtual ~LayerDecoder() = default;

  /// Serial, before each step: makes room in the cache, grows scratch. Everything that can fail.
  virtual Status prepare(StepScratch& scratch) = 0;
  /// Of the step that was prepared.
  virtual int n_phase() const = 0;
  virtual void run_phase(int phase, const DecodeStep& step, StepScratch& scratch, int ith, int n_threads) = 0;
  /// Serial, after the last phase: the token counts.
  virtual void finish() = 0;

  /// Positions that a KV head read from pages in the last step (ascending); nullopt if every token was read.
  virtual std::optional<std::span<const int32_t>> last_selection(int64_t /*head_kv*/) const {
    return std::nullopt;
  }
};

/// The decoder that fits the cache's kind; `cache` must outlive it.
std::unique_ptr<LayerDecoder> make_layer_decoder(LayerCache& cache, const KvProfile& profile);

}  // namespace narrows
