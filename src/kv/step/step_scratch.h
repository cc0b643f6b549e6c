// What a decode step works in: tiles of a thread, softmax states of a slice. All sizes follow from the
// attention's shape; SALS and KIVI tiles hold kTile tokens.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "base/aligned.h"
#include "kernels/ops.h"
#include "kv/kv_layer.h"
#include "kv/step/stage_clock.h"

namespace narrows {

/// What a family adds to the scratch: see StepScratch::work().
struct FamilyWork {
  virtual ~FamilyWork() = default;
};

/// Buffers of a step, shared by all layers of a session (layers run one after another). Sized once for the
/// largest of them: a step allocates nothing but room that grows with the context, in KvLayer::begin_step().
class StepScratch {
 public:
  StepScratch(std::span<const AttentionShape> layers, int n_threads);
  StepScratch(const AttentionShape& shape, int n_threads) : StepScratch({&shape, 1}, n_threads) {}
  struct Thread;
  Thread& thread(int ith) { return *threads_[static_cast<size_t>(ith)]; }
  struct Slice;
  Slice& slice(int i) { return *slices_[static_cast<size_t>(i)]; }
  int n_threads() const { return static_cast<int>(threads_.size()); }
  /// What one for these layers takes, what families add apart.
  static int64_t bytes_needed(std::span<const AttentionShape> layers, int n_threads);
  /// False if there was no memory for it; KvLayer::begin_step() then fails.
  bool ok() const;
  ~StepScratch();

  /// A layer may make its transforms in this step: set before each step, taken back by the first that does.
  /// On an 8B model they take as long as a few steps a layer, so they are made one at a time.
  bool may_convert = true;

  /// Of the family whose layers work in it: made by the first of them.
  std::unique_ptr<FamilyWork> work;

 private:
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<std::unique_ptr<Slice>> slices_;
};

/// Tokens of a step are cut into this many slices, each attended to by one thread into a state of its own,
/// and the states are merged in order. The cut depends on the tokens alone: the sums, and so the text, are
/// the same with any number of threads. 16 keep 16 threads busy and cost a merge of 16 states a layer.
inline constexpr int kSlices = 16;

/// Softmax state of all query heads over one slice; empty if it had no tokens.
struct StepScratch::Slice {
  explicit Slice(const AttentionShape& shape)
      : max(shape.n_head), sum(shape.n_head), out(shape.n_head * shape.head_dim) {}

  AlignedArray<float> max;  ///< [n_head]
  AlignedArray<float> sum;  ///< [n_head]
  AlignedArray<float> out;  ///< [n_head, head_dim]; not cleared while the slice is empty

  bool ok() const { return max.ok() && sum.ok() && out.ok(); }
  /// State of the query heads from `head` on.
  kernels::SoftmaxRows rows(int64_t head, int64_t head_dim) {
    return {max.data() + head, sum.data() + head, out.data() + head * head_dim};
  }
};

struct StepScratch::Thread {
  explicit Thread(const AttentionShape& shape);

  Slice* slice = nullptr;  ///< where attention adds up now
  StageClock clock;        ///< layers tell it which stage they begin

  AlignedArray<float> q;         ///< [n_head, head_dim] rotated, scaled by shape.scale
  AlignedArray<float> joint;     ///< [D] query heads of a KV head summed, before RoPE
  AlignedArray<float> latent_q;  ///< [D at most] its projection

  // One tile.
  AlignedArray<kernels::f16_t> half;  ///< [D at most, kTile] latents as stored
  AlignedArray<float> latent;         ///< [D at most, kTile]
  AlignedArray<float> key_t;          ///< [head_dim, kTile]
  AlignedArray<float> value;          ///< [kTile, D]
  AlignedArray<float> cos;            ///< [head_dim / 2 at most, kTile]
  AlignedArray<float> sin;

  bool ok() const {
    return q.ok() && joint.ok() && latent_q.ok() && half.ok() && latent.ok() && key_t.ok() && value.ok() &&
           cos.ok() && sin.ok();
  }
};

}  // namespace narrows
