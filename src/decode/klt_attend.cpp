// Stages 3 and 4 of a klt step: selected latents to keys, keys to their rotation, scores, and weighted sums
// of VALUE LATENTS: the inverse transform of the values is applied once, to the sum.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <span>

#include "decode/klt_work.h"

namespace narrows {

using kernels::kTile;
using kernels::ops;

namespace {

/// Tokens of a run, at least: enough for a good product of those that are to be rebuilt.
constexpr int64_t kRunTokens = 64;

/// Calls read(page, slots, n, row) for the runs of tokens [n] that share a page; row: index of their first.
template <class Read>
void by_page(std::span<const int32_t> tokens, Read&& read) {
  int32_t slots[kTile];
  for (size_t i = 0; i < tokens.size();) {
    const int64_t page = tokens[i] / kPageTokens;
    size_t n = 0;
    while (i + n < tokens.size() && tokens[i + n] / kPageTokens == page) {
      slots[n] = static_cast<int32_t>(tokens[i + n] % kPageTokens);
      ++n;
    }
    read(page, slots, static_cast<int64_t>(n), static_cast<int64_t>(i));
    i += n;
  }
}

/// Keys of the latent rows in thread.tile, at most kTile, rotated to the tokens' positions: halves, in
/// thread.half.
void rebuild(const KltLayer& layer, int64_t head_kv, std::span<const int32_t> tokens,
             KltWork::Thread& thread) {
  const int64_t d = layer.shape().head_dim, half = layer.rope().n_rot() / 2;
  const auto n = static_cast<int64_t>(tokens.size());
  for (int64_t t = 0; t < n; ++t) {
    layer.rope().at(layer.n_sink() + tokens[static_cast<size_t>(t)], thread.cos.data() + t * half,
                    thread.sin.data() + t * half);
  }
  layer.part_of_head(head_kv).rebuild_keys(thread.tile.key.data(), thread.tile.ld, n,
                                           layer.channel_of_head(head_kv), d, thread.key.data(), d);
  ops().rope_rows(thread.key.data(), n, d, 2 * half, thread.cos.data(), thread.sin.data(), half, false,
                  thread.key.data());
  ops().f32_to_f16(thread.key.data(), thread.half.data(), n * d);
}

/// Fills the rows of hot keys that are missing among selected tokens [run.begin, run.end).
void rebuild_missing(KltLayer& layer, int64_t head_kv, Part run, KltWork& work, KltWork::Thread& thread) {
  const int64_t at = head_kv * work.ld, d = layer.shape().head_dim;
  const int32_t* first = work.missing.data() + at;
  const int32_t* last = first + work.n_missing[static_cast<size_t>(head_kv)];
  first = std::lower_bound(first, last, static_cast<int32_t>(run.begin));
  last = std::lower_bound(first, last, static_cast<int32_t>(run.end));
  const KltPart& part = layer.part_of_head(head_kv);
  KltHotKeys& hot = layer.hot_keys(head_kv);
  int32_t tokens[kTile];
  for (; first < last; first += std::min<int64_t>(kTile, last - first)) {
    const int64_t n = std::min<int64_t>(kTile, last - first);
    for (int64_t i = 0; i < n; ++i) tokens[i] = work.selected[static_cast<size_t>(at + first[i])];
    const std::span<const int32_t> tile(tokens, static_cast<size_t>(n));
    by_page(tile, [&](int64_t page, const int32_t* slots, int64_t count, int64_t row) {
      part.read_keys(layer.page(page), slots, count, row, thread.tile);
    });
    rebuild(layer, head_kv, tile, thread);
    for (int64_t i = 0; i < n; ++i) {
      std::copy_n(thread.half.data() + i * d, d, hot.row(work.slot[static_cast<size_t>(at + first[i])]));
    }
  }
}

/// Asks for the rows that a run is going to read: selected tokens lie scattered over more than the CPU's
/// caches.
void prefetch(KltLayer& layer, int64_t head_kv, Part run, const KltWork& work) {
  const KltPart& part = layer.part_of_head(head_kv);
  KltHotKeys& hot = layer.hot_keys(head_kv);
  const int64_t key_bytes = layer.shape().head_dim * int64_t{sizeof(kernels::f16_t)};
  const int64_t value_bytes = part.layout().value.bytes;
  const auto ask = [](const void* p, int64_t bytes) {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(p) + b);
  };
  for (int64_t i = head_kv * work.ld + run.begin; i < head_kv * work.ld + run.end; ++i) {
    const int32_t token = work.selected[static_cast<size_t>(i)];
    ask(hot.row(work.slot[static_cast<size_t>(i)]), key_bytes);
    ask(part.value_row(layer.page(token / kPageTokens), token % kPageTokens), value_bytes + 63);
  }
}

}  // namespace

int64_t klt_free_tokens(const KltLayer& layer, Part tokens, int32_t* free) {
  int64_t n = 0;
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    if ((layer.anchors(t / kPageTokens) >> t % kPageTokens & 1) == 0) free[n++] = static_cast<int32_t>(t);
  }
  return n;
}

int64_t klt_n_run(int64_t n_selected) { return std::min<int64_t>(ceil_div(n_selected, kRunTokens), kSlices); }

namespace {

/// As indices into the selected.
Part tokens_of_run(const KltWork& work, int64_t head_kv, int64_t run) {
  const int64_t n_selected = work.n_selected[static_cast<size_t>(head_kv)];
  return part_of(n_selected, static_cast<int>(run), static_cast<int>(klt_n_run(n_selected)));
}

}  // namespace

void klt_rebuild_run(KltLayer& layer, int64_t head_kv, int64_t run, KltWork& work, KltWork::Thread& thread) {
  const Part own = tokens_of_run(work, head_kv, run);
  prefetch(layer, head_kv, own, work);
  rebuild_missing(layer, head_kv, own, work, thread);
}

void klt_attend_run(KltLayer& layer, int64_t head_kv, int64_t run, const float* q, KltWork& work,
                    KltWork::Thread& thread) {
  const AttentionShape& shape = layer.shape();
  const int64_t d = shape.head_dim, group = shape.group(), head = head_kv * group, at = head_kv * work.ld;
  const Part own = tokens_of_run(work, head_kv, run);
  const int64_t n = own.end - own.begin;
  KltWork::Slice& slice = *work.slices[static_cast<size_t>(run)];
  float* score = thread.run_score.data();
  ops().score_rows_f16(layer.hot_keys(head_kv).rows(), work.slot.data() + at + own.begin, n, q + head * d,
                       group, d, score, n);
  for (int64_t r = 0; r < group; ++r)
    ops().softmax_part(score + r * n, n, &slice.max[head + r], &slice.sum[head + r]);

  const KltPart& part = layer.part_of_head(head_kv);
  const uint8_t* rows[kTile];
  const float* amplitudes[kTile];
  for (int64_t done = 0; done < n; done += kTile) {
    const int64_t m = std::min(kTile, n - done);
    float* amplitude = thread.amplitude.data();
    const int32_t* selected = work.selected.data() + at + own.begin + done;
    by_page({selected, static_cast<size_t>(m)},
            [&](int64_t page, const int32_t* slots, int64_t count, int64_t row) {
              part.value_amplitudes(layer.page(page), amplitude);
              for (int64_t i = 0; i < count; ++i) {
                rows[row + i] = part.value_row(layer.page(page), slots[i]);
                amplitudes[row + i] = amplitude;
              }
              amplitude += work.ld_latent;
            });
    ops().sum_planes(rows, amplitudes, m, part.layout().value, score + done, n, group, done > 0,
                     slice.latent.data() + head * work.ld_latent, work.ld_latent);
  }
}

namespace {

/// One KV head over a tile whose latents are in thread.tile.
void attend_head(const KltLayer& layer, int64_t head_kv, std::span<const int32_t> tokens, const float* q,
                 const KltWork& work, KltWork::Thread& thread, KltWork::Slice& slice) {
  const AttentionShape& shape = layer.shape();
  const int64_t d = shape.head_dim, group = shape.group();
  const auto n = static_cast<int64_t>(tokens.size());
  rebuild(layer, head_kv, tokens, thread);
  int32_t rows[kTile];
  std::iota(rows, rows + n, 0);
  ops().score_rows_f16(thread.half.data(), rows, n, q + head_kv * group * d, group, d, thread.score.data(),
                       kTile);

  const int64_t n_value = layer.part_of_head(head_kv).layout().n_value;
  for (int64_t r = 0; r < group; ++r) {
    const int64_t h = head_kv * group + r;
    float* weight = thread.score.data() + r * kTile;
    float max = 0;
    float sum = 0;
    ops().softmax_part(weight, n, &max, &sum);
    float* latent = slice.latent.data() + h * work.ld_latent;
    const bool empty = slice.sum[h] == 0;
    if (empty) {
      slice.max[h] = max;
      slice.sum[h] = sum;
    } else {
      const float top = std::fmax(max, slice.max[h]);
      const float keep = std::exp(slice.max[h] - top);
      const float add = std::exp(max - top);
      for (int64_t c = 0; c < n_value; ++c) latent[c] *= keep;
      for (int64_t t = 0; t < n; ++t) weight[t] *= add;
      slice.max[h] = top;
      slice.sum[h] = slice.sum[h] * keep + sum * add;
    }
    ops().gemm(1, n_value, n, weight, n, thread.tile.value.data(), thread.tile.ld, latent, work.ld_latent,
               !empty);
  }
}

}  // namespace

void klt_attend_all(const KltLayer& layer, Part tokens, const float* q, KltWork& work,
                    KltWork::Thread& thread, KltWork::Slice& slice) {
  int32_t tile[kTile];
  for (int64_t first = tokens.begin; first < tokens.end; first += kTile) {
    const int64_t n = klt_free_tokens(layer, {first, std::min(first + kTile, tokens.end)}, tile);
    if (n == 0) continue;
    const std::span<const int32_t> span(tile, static_cast<size_t>(n));
    const KltPart* held = nullptr;
    for (int64_t h = 0; h < layer.shape().n_head_kv; ++h) {
      const KltPart& part = layer.part_of_head(h);
      if (&part != held) {
        by_page(span, [&](int64_t page, const int32_t* slots, int64_t count, int64_t row) {
          part.read_rows(layer.page(page), slots, count, row, thread.tile);
        });
      }
      held = &part;
      attend_head(layer, h, span, q, work, thread, slice);
    }
  }
}

void klt_merge(const KltLayer& layer, StepScratch& scratch, KltWork& work, KltWork::Thread& thread,
               Part heads, float* out) {
  const AttentionShape& shape = layer.shape();
  const int64_t d = shape.head_dim;
  const bool has_pages = layer.n_in_pages() > 0;  // else nobody has looked at the latent slices
  for (int64_t h = heads.begin; h < heads.end; ++h) {
    float top = -std::numeric_limits<float>::infinity();
    for (int i = 0; i < kSlices; ++i) {
      StepScratch::Slice& exact = scratch.slice(kSlices + i);
      const KltWork::Slice& latent = *work.slices[static_cast<size_t>(i)];
      if (exact.sum[h] != 0) top = std::fmax(top, exact.max[h]);
      if (has_pages && latent.sum[h] != 0) top = std::fmax(top, latent.max[h]);
    }
    float* y = out + h * d;
    std::fill_n(y, d, 0.0F);
    const int64_t n_value = has_pages ? layer.part_of_head(h / shape.group()).layout().n_value : 0;
    float* sum_of_latents = thread.latent.data();
    std::fill_n(sum_of_latents, n_value, 0.0F);
    float total = 0;
    float in_pages = 0;
    for (int i = 0; i < kSlices; ++i) {
      StepScratch::Slice& exact = scratch.slice(kSlices + i);
      if (exact.sum[h] != 0) {
        const float weight = std::exp(exact.max[h] - top);
        total += weight * exact.sum[h];
        const float* from = exact.out.data() + h * d;
        for (int64_t c = 0; c < d; ++c) y[c] += weight * from[c];
      }
      const KltWork::Slice& latent = *work.slices[static_cast<size_t>(i)];
      if (has_pages && latent.sum[h] != 0) {
        const float weight = std::exp(latent.max[h] - top);
        in_pages += weight * latent.sum[h];
        const float* from = latent.latent.data() + h * work.ld_latent;
        for (int64_t c = 0; c < n_value; ++c) sum_of_latents[c] += weight * from[c];
      }
    }
    total += in_pages;
    if (in_pages > 0) {
      const int64_t head_kv = h / shape.group();
      layer.part_of_head(head_kv).rebuild_value(sum_of_latents, in_pages, layer.channel_of_head(head_kv), d,
                                                y);
    }
    const float inverse = total > 0 ? 1.0F / total : 0.0F;
    for (int64_t c = 0; c < d; ++c) y[c] *= inverse;
  }
}

}  // namespace narrows
