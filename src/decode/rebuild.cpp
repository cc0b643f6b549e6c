// Stage 3 of a sparse step: selected latents back to keys, rotated at their true positions, and attended to.
// A tile: z^T [rank, kTile] -> per KV head K^T [head_dim, kTile] = U_head z^T -> RoPE -> attend with V
// [kTile, D].
#include "decode/stages.h"

namespace narrows {

void attend_selected(const SalsLayer& layer, std::span<const int32_t> selected, StepScratch::Thread& thread) {
  constexpr int64_t kTile = kernels::kTile;
  const kernels::Ops& ops = kernels::ops();
  const AttentionShape& shape = layer.shape();
  const int64_t rank = layer.layout().rank;
  const int64_t n_rot = layer.rope().n_rot();
  const auto tile_at = [&](size_t begin) {
    begin = std::min(begin, selected.size());
    return selected.subspan(begin, std::min<size_t>(kTile, selected.size() - begin));
  };
  for (size_t done = 0; done < selected.size(); done += kTile) {
    const auto tile = tile_at(done);
    const auto n = static_cast<int64_t>(tile.size());
    // Selected tokens lie scattered over a cache that is larger than the CPU's: ask for the next tile now.
    const auto next = tile_at(done + kTile);
    layer.prefetch(next.data(), static_cast<int64_t>(next.size()));
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
      attend_tile(shape, h, thread.value.data(), n, thread);
    }
  }
}

}  // namespace narrows
