// What a decode step works in: tiles of a thread, softmax states of a slice. All sizes follow from the
// attention's shape; SALS and KIVI tiles hold kTile tokens.
#pragma once

#include "base/aligned.h"
#include "decode/layer_decoder.h"
#include "decode/stage_clock.h"
#include "kernels/ops.h"

namespace narrows {

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
  StageClock clock;        ///< decoders tell it which stage they begin

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
