// What one thread of a decode step works in. All sizes follow from the attention's shape; SALS and KIVI tiles
// hold kTile tokens.
#pragma once

#include "base/aligned.h"
#include "decode/layer_decoder.h"
#include "kernels/ops.h"

namespace narrows {

struct StepScratch::Thread {
  explicit Thread(const AttentionShape& shape);

  // This thread's share of the attention: every query head, empty if it had no tokens.
  AlignedArray<float> max;  ///< [n_head]
  AlignedArray<float> sum;  ///< [n_head]
  AlignedArray<float> out;  ///< [n_head, head_dim]

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
    return max.ok() && sum.ok() && out.ok() && q.ok() && joint.ok() && latent_q.ok() && half.ok() &&
           latent.ok() && key_t.ok() && value.ok() && cos.ok() && sin.ok();
  }

  /// State of the query heads from `head` on.
  kernels::SoftmaxRows rows(int64_t head, int64_t head_dim) {
    return {max.data() + head, sum.data() + head, out.data() + head * head_dim};
  }
};

}  // namespace narrows
