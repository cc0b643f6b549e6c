// Stages 3 and 4 of a klt step: selected latents to keys, keys to their rotation, scores, and weighted sums
// of VALUE LATENTS: the inverse transform of the values is applied once, to the sum.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <span>

#include "kv/klt/klt_work.h"

namespace narrows {

using kernels::kTile;
using kernels::ops;

namespace {

/// Pages whose amplitudes are held at once.
constexpr int64_t kAmplitudePages = 16;
static_assert(kAmplitudePages <= kernels::kTile);  // rows of KltThread::amplitude

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
void rebuild(const KltLayer& layer, int64_t head_kv, std::span<const int32_t> tokens, KltThread& thread) {
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

/// Tokens of a KV head that are selected in a slice, as indices into the selected.
Part selected_in(int64_t head_kv, int slice, const KltThread& thread) {
  const int64_t* begin = thread.slice_begin.data() + head_kv * (kAttendSlices + 1) + slice;
  return {begin[0], begin[1]};
}

/// Those of them whose rebuilt keys are missing, as indices into the selected.
std::span<const int32_t> missing_in(int64_t head_kv, Part own, const KltWork& work) {
  const int32_t* begin = work.missing.data() + head_kv * work.ld;
  const int32_t* end = begin + work.n_missing[static_cast<size_t>(head_kv)];
  const int32_t* first = std::lower_bound(begin, end, static_cast<int32_t>(own.begin));
  return {first, std::lower_bound(first, end, static_cast<int32_t>(own.end))};
}

void ask(const void* p, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(p) + b);
  __builtin_prefetch(static_cast<const char*>(p) + bytes - 1);
}

/// Fills the rows of hot keys that are missing among selected tokens [own.begin, own.end).
void rebuild_missing(KltLayer& layer, int64_t head_kv, Part own, KltWork& work, KltThread& thread) {
  const int64_t at = head_kv * work.ld, d = layer.shape().head_dim;
  const std::span<const int32_t> missing = missing_in(head_kv, own, work);
  const int32_t* first = missing.data();
  const int32_t* last = first + missing.size();
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

}  // namespace

int64_t klt_free_tokens(const KltLayer& layer, Part tokens, int32_t* free) {
  int64_t n = 0;
  for (int64_t t = tokens.begin; t < tokens.end; ++t) {
    if ((layer.anchors(t / kPageTokens) >> t % kPageTokens & 1) == 0) free[n++] = static_cast<int32_t>(t);
  }
  return n;
}

void klt_cut_slices(const KltLayer& layer, const KltWork& work, KltThread& thread) {
  const int64_t n_page = layer.n_page(), n_head_kv = layer.shape().n_head_kv;
  std::fill_n(thread.per_page.begin(), n_page, 0);
  int64_t total = 0;
  for (int64_t h = 0; h < n_head_kv; ++h) {
    const int32_t* token = work.selected.data() + h * work.ld;
    const int64_t n = work.n_selected[static_cast<size_t>(h)];
    for (int64_t i = 0; i < n; ++i) ++thread.per_page[static_cast<size_t>(token[i] / kPageTokens)];
    total += n;
  }
  int64_t page = 0, seen = 0;
  for (int s = 0; s <= kAttendSlices; ++s) {
    const int64_t enough = s == kAttendSlices ? total + 1 : total * s / kAttendSlices;
    for (; page < n_page && seen < enough; ++page) seen += thread.per_page[static_cast<size_t>(page)];
    thread.slice_page[static_cast<size_t>(s)] = page;
  }
  for (int64_t h = 0; h < n_head_kv; ++h) {
    const int32_t* token = work.selected.data() + h * work.ld;
    const int64_t n = work.n_selected[static_cast<size_t>(h)];
    int64_t* begin = thread.slice_begin.data() + h * (kAttendSlices + 1);
    int64_t i = 0;
    for (int s = 0; s <= kAttendSlices; ++s) {
      const int64_t first = thread.slice_page[static_cast<size_t>(s)] * kPageTokens;
      while (i < n && token[i] < first) ++i;
      begin[s] = i;
    }
  }
}

void klt_prefetch_slice(KltLayer& layer, int slice, const KltWork& work, const KltThread& thread) {
  const int64_t key_bytes = layer.shape().head_dim * int64_t{sizeof(kernels::f16_t)};
  for (int64_t h = 0; h < layer.shape().n_head_kv; ++h) {
    const KltPart& part = layer.part_of_head(h);
    const KltLayout& layout = part.layout();
    KltHotKeys& hot = layer.hot_keys(h);
    const Part own = selected_in(h, slice, thread);
    const int32_t* token = work.selected.data() + h * work.ld;
    int64_t last_page = -1;
    for (const int32_t i : missing_in(h, own, work)) {
      const int64_t p = token[i] / kPageTokens;
      const std::byte* page = layer.page(p);
      if (p != last_page) ask(part.key_scales(page), layout.n_key);
      if (p != last_page && layout.index_bytes > 0) ask(part.index(page), layout.index_bytes);
      last_page = p;
      if (layout.rest.bytes > 0) ask(part.rest_row(page, token[i] % kPageTokens), layout.rest.bytes);
    }
    for (int64_t i = own.begin; i < own.end; ++i) {
      ask(hot.row(work.slot[static_cast<size_t>(h * work.ld + i)]), key_bytes);
      ask(part.value_row(layer.page(token[i] / kPageTokens), token[i] % kPageTokens), layout.value.bytes);
    }
  }
}

void klt_rebuild_slice(KltLayer& layer, int slice, KltWork& work, KltThread& thread) {
  for (int64_t h = 0; h < layer.shape().n_head_kv; ++h)
    rebuild_missing(layer, h, selected_in(h, slice, thread), work, thread);
}

namespace {

/// Weights of a KV head's tokens [own.begin, own.end) of the selected: weight [group, ld], relative to what
/// the slice's state then says.
void weigh_tokens(KltLayer& layer, int64_t head_kv, Part own, const float* q, const KltWork& work,
                  float* weight, int64_t ld, KltSlice& slice) {
  const AttentionShape& shape = layer.shape();
  const int64_t d = shape.head_dim, group = shape.group(), head = head_kv * group, n = own.end - own.begin;
  ops().score_rows_f16(layer.hot_keys(head_kv).rows(), work.slot.data() + head_kv * work.ld + own.begin, n,
                       q + head * d, group, d, weight, ld);
  for (int64_t r = 0; r < group; ++r)
    ops().softmax_part(weight + r * ld, n, &slice.max[head + r], &slice.sum[head + r]);
}

}  // namespace

void klt_attend_slice(KltLayer& layer, int i, const float* q, KltWork& work, KltThread& thread) {
  const AttentionShape& shape = layer.shape();
  const int64_t group = shape.group(), ld = work.ld_run;
  KltSlice& slice = *work.slices[static_cast<size_t>(i)];
  const Part pages = {thread.slice_page[static_cast<size_t>(i)],
                      thread.slice_page[static_cast<size_t>(i) + 1]};
  for (int64_t h = 0; h < shape.n_head_kv; ++h) {
    const Part own = selected_in(h, i, thread);
    if (own.begin < own.end)
      weigh_tokens(layer, h, own, q, work, thread.weights.data() + h * group * ld, ld, slice);
  }
  const int64_t heads = layer.heads_of_a_part();
  const uint8_t* rows[kTile];
  const float* amplitudes[kTile];
  for (int64_t first = 0; first < shape.n_head_kv; first += heads) {
    const KltPart& part = layer.part_of_head(first);
    for (int64_t h = 0; h < heads; ++h)
      thread.left[static_cast<size_t>(h)] = selected_in(first + h, i, thread);
    // Pages outside, heads inside: the amplitudes of a page serve all heads, and so does what is in the
    // caches.
    for (int64_t p = pages.begin; p < pages.end; p += kAmplitudePages) {
      const int64_t end = std::min(p + kAmplitudePages, pages.end);
      uint32_t known = 0;
      for (int64_t h = first; h < first + heads; ++h) {
        const int32_t* token = work.selected.data() + h * work.ld;
        Part& left = thread.left[static_cast<size_t>(h - first)];
        while (left.begin < left.end && token[left.begin] < end * kPageTokens) {
          int64_t n = 0;
          for (; n < kTile && left.begin + n < left.end; ++n) {
            const int64_t page = token[left.begin + n] / kPageTokens;
            if (page >= end) break;
            float* amplitude = thread.amplitude.data() + (page - p) * work.ld_latent;
            if ((known >> (page - p) & 1) == 0) part.value_amplitudes(layer.page(page), amplitude);
            known |= 1U << (page - p);
            rows[n] = part.value_row(layer.page(page), token[left.begin + n] % kPageTokens);
            amplitudes[n] = amplitude;
          }
          const Part all = selected_in(h, i, thread);
          ops().sum_planes(rows, amplitudes, n, part.layout().value,
                           thread.weights.data() + h * group * ld + (left.begin - all.begin), ld, group,
                           left.begin > all.begin, work.latents(h * group, i),
                           kAttendSlices * work.ld_latent);
          left.begin += n;
        }
      }
    }
  }
}

namespace {

/// One KV head over a tile whose latents are in thread.tile.
void attend_head(const KltLayer& layer, int64_t head_kv, std::span<const int32_t> tokens, const float* q,
                 KltWork& work, KltThread& thread, int i) {
  const AttentionShape& shape = layer.shape();
  const int64_t d = shape.head_dim, group = shape.group();
  const auto n = static_cast<int64_t>(tokens.size());
  KltSlice& slice = *work.slices[static_cast<size_t>(i)];
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
    float* latent = work.latents(h, i);
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

void klt_attend_all(const KltLayer& layer, Part tokens, const float* q, KltWork& work, KltThread& thread,
                    int slice) {
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

void klt_merge(const KltLayer& layer, StepScratch& scratch, KltWork& work, KltThread& thread, Part heads,
               const DecodeStep& step) {
  const AttentionShape& shape = layer.shape();
  const int64_t d = shape.head_dim;
  const bool has_pages = layer.n_in_pages() > 0;  // else nobody has looked at the latent slices
  const int n_latent = has_pages ? kAttendSlices : 0;
  for (int64_t h = heads.begin; h < heads.end; ++h) {
    float top = -std::numeric_limits<float>::infinity();
    for (int i = 0; i < kSlices; ++i) {
      StepScratch::Slice& exact = scratch.slice(kSlices + i);
      if (exact.sum[h] != 0) top = std::fmax(top, exact.max[h]);
    }
    for (int i = 0; i < n_latent; ++i) {
      const KltSlice& latent = *work.slices[static_cast<size_t>(i)];
      if (latent.sum[h] != 0) top = std::fmax(top, latent.max[h]);
    }
    top = with_sink(step, h, top);
    float* y = step.out + h * d;
    std::fill_n(y, d, 0.0F);
    float total = sum_of_sink(step, h, top);
    for (int i = 0; i < kSlices; ++i) {
      StepScratch::Slice& exact = scratch.slice(kSlices + i);
      if (exact.sum[h] == 0) continue;
      const float weight = std::exp(exact.max[h] - top);
      total += weight * exact.sum[h];
      const float* from = exact.out.data() + h * d;
      for (int64_t c = 0; c < d; ++c) y[c] += weight * from[c];
    }
    float in_pages = 0;
    float weights[kAttendSlices];
    for (int i = 0; i < n_latent; ++i) {
      const KltSlice& latent = *work.slices[static_cast<size_t>(i)];
      // The sums of an empty slice are those of another layer, whose padding may be anything: 0 times that
      // need not be 0.
      if (latent.sum[h] == 0) std::fill_n(work.latents(h, i), work.ld_latent, 0.0F);
      weights[i] = latent.sum[h] != 0 ? std::exp(latent.max[h] - top) : 0.0F;
      in_pages += weights[i] * latent.sum[h];
    }
    total += in_pages;
    if (in_pages > 0) {
      const int64_t head_kv = h / shape.group();
      const KltPart& part = layer.part_of_head(head_kv);
      ops().gemm(1, part.layout().n_value, kAttendSlices, weights, kAttendSlices, work.latents(h, 0),
                 work.ld_latent, thread.latent.data(), work.ld_latent, false);
      part.rebuild_value(thread.latent.data(), in_pages, layer.channel_of_head(head_kv), d, y);
    }
    const float inverse = total > 0 ? 1.0F / total : 0.0F;
    for (int64_t c = 0; c < d; ++c) y[c] *= inverse;
  }
}

}  // namespace narrows
