// What lives for one run of a prompt, for prefill.cpp and prefill_device.cpp.
#pragma once

#include <algorithm>
#include <optional>

#include "base/aligned.h"
#include "exec/cuda/block_mixer.h"
#include "prompt/attention.h"
#include "prompt/prefill.h"

namespace narrows {

/// Rows of one chunk: enough that a weight read from memory is used 512 times, few enough that a chunk's
/// activations stay below some tens of MB. Whole tiles: a tile is packed when all of its keys are there.
inline constexpr int64_t kChunk = 512;
static_assert(kChunk % kernels::kPrefillTile == 0);
/// The same on a GPU, whose activations are in its own memory.
inline constexpr int64_t kDeviceChunk = 2048;

/// Everything that lives for one run. D = n_head_kv * head_dim, of the largest layer where it is a size.
/// `tail`: tokens of the cache that share a tile with the first new one.
struct Prefill::LayerBuffers {
  /// Of a prompt that is read on a device: nothing is the host's, but what hooks of a cache elsewhere get.
  LayerBuffers(int64_t n_new, int64_t past, int64_t width, int64_t width_q)
      : n(n_new),
        n_past(past),
        tail(0),
        k_raw(n * width),
        v(n * width),
        q_raw(std::min(n, kDeviceChunk) * width_q) {}
  LayerBuffers(const ModelSpec& spec, int64_t n_new, int64_t past, bool wants_queries)
      : n(n_new),
        n_past(past),
        tail(past % kernels::kPrefillTile),
        hidden(n * spec.n_embd),
        k_raw(n * spec.most_width_kv()),
        k_rotated((kernels::kPrefillTile + kChunk) * spec.most_width_kv()),
        v((tail + n) * spec.most_width_kv()),
        past_v(kernels::kPrefillTile * spec.most_width_kv()),
        q(std::min(n, kChunk) * spec.most_width_q()),
        q_raw(wants_queries ? q.size() : 0) {}
  bool rows_ok() const { return k_raw.ok() && v.ok() && q_raw.ok(); }
  bool ok() const {
    return hidden.ok() && k_raw.ok() && k_rotated.ok() && v.ok() && past_v.ok() && q.ok() && q_raw.ok();
  }
  int64_t position(int64_t first) const { return n_past + first; }

  int64_t n;  ///< new tokens
  int64_t n_past;
  int64_t tail;
  AlignedArray<float> hidden;     ///< [n, n_embd] residual stream
  AlignedArray<float> k_raw;      ///< [n, D] before RoPE
  AlignedArray<float> k_rotated;  ///< [.., D] from the first token of the tile in which the chunk begins
  AlignedArray<float> v;          ///< [tail + n, D]
  AlignedArray<float> past_v;     ///< [kernels::kPrefillTile, D]
  AlignedArray<float> q;          ///< [kChunk, n_head * head_dim] rotated
  AlignedArray<float> q_raw;      ///< the same before RoPE, if somebody wants them
  AlignedArray<float> recurrent;  ///< [n_threads] what recurrent layers work in
  std::optional<PromptAttention> attention;  ///< of the layer's sizes
  AttentionSizes sizes;                      ///< those
  device::Buffer hidden_on_device;           ///< [n, n_embd] residual stream of a prompt that is read there
  BlockMixer mixer;                          ///< its attention

  int64_t layer = 0;
  int64_t next = 0;           ///< first token of the layer that is not computed yet
  size_t segment = 0;         ///< index into hooks.segment_ends
  int64_t segment_begin = 0;  ///< first token of the running segment

  int64_t segment_end(const PrefillHooks& hooks) const {
    return segment < hooks.segment_ends.size() ? hooks.segment_ends[segment] : n;
  }
};

}  // namespace narrows
