// Stage 3 of a sparse step: selected latents back to keys, rotated at their true positions, and attended to.
// A tile: z^T [rank, kTile] -> per KV head K^T [head_dim, kTile] = U_head z^T -> RoPE -> attend with V
// [kTile, D].
#include <algorithm>

#include "kv/sals/sals_stages.h"

namespace narrows {

namespace {

constexpr size_t kTileTokens = kernels::kTile;

std::span<const int32_t> tile_at(std::span<const int32_t> selected, size_t begin) {
  begin = std::min(begin, selected.size());
  return selected.subspan(begin, std::min(kTileTokens, selected.size() - begin));
}

}  // namespace

void prefetch_selected(const SalsLayer& layer, std::span<const int32_t> selected) {
  const auto tile = tile_at(selected, 0);
  layer.prefetch(tile.data(), static_cast<int64_t>(tile.size()));
}

void attend_selected(const SalsLayer& layer, std::span<const int32_t> selected, StepScratch::Thread& thread) {
  constexpr int64_t kTile = kernels::kTile;
  const kernels::Ops& ops = kernels::ops();
  const AttentionShape& shape = layer.shape();
  const int64_t rank = layer.layout().rank;
  const int64_t n_rot = layer.rope().n_rot();
  for (size_t done = 0; done < selected.size(); done += kTileTokens) {
    const auto tile = tile_at(selected, done);
    const auto n = static_cast<int64_t>(tile.size());
    thread.clock.enter(AttentionStage::rebuild);
    prefetch_selected(layer, selected.subspan(done + tile.size()));
    layer.gather_latents(tile.data(), n, thread.half.data(), kTile);
    for (int64_t t = 0; t < n; ++t) {
      const int64_t token = tile[static_cast<size_t>(t)];
      layer.read_value(token, thread.value.data() + t * shape.width());
      layer.rope().at(layer.n_sink() + token, thread.cos.data() + t, thread.sin.data() + t, kTile);
    }
    ops.f16_to_f32(thread.half.data(), thread.latent.data(), rank * kTile);
    for (int64_t h = 0; h < shape.n_head_kv; ++h) {
      layer.rebuild_keys(thread.latent.data(), kTile, n, h, thread.key_t.data());
      ops.rope_tile(thread.key_t.data(), kTile, n, shape.head_dim, n_rot, thread.cos.data(),
                    thread.sin.data(), kTile);
      thread.clock.enter(AttentionStage::attend);
      attend_tile(shape, h, thread.value.data(), n, thread);
      thread.clock.enter(AttentionStage::rebuild);
    }
  }
  thread.clock.enter(AttentionStage::attend);
}

}  // namespace narrows
