// Stages 3 and 4 of a klt step: selected latents to keys, keys to their rotation, scores, and weighted sums
// of VALUE LATENTS: the inverse transform of the values is applied once, to the sum.
#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

#include "decode/klt_work.h"

namespace narrows {

using kernels::kTile;
using kernels::ops;

namespace {

int64_t padded(int64_t n) { return kernels::pad_latent(n); }

/// Latents of n <= kTile tokens of one part into thread.tile.
void read_tile(const KltLayer& layer, const KltPart& part, std::span<const int32_t> tokens,
               KltWork::Thread& thread) {
  int32_t slots[kTile];
  for (size_t i = 0; i < tokens.size();) {
    const int64_t page = tokens[i] / kPageTokens;
    size_t n = 0;
    while (i + n < tokens.size() && tokens[i + n] / kPageTokens == page) {
      slots[n] = static_cast<int32_t>(tokens[i + n] % kPageTokens);
      ++n;
    }
    part.read_rows(layer.page(page), slots, static_cast<int64_t>(n), static_cast<int64_t>(i), thread.tile);
    i += n;
  }
}

/// One KV head over a tile whose latents are in thread.tile.
void attend_head(const KltLayer& layer, int64_t head_kv, int64_t n, const float* q, const KltWork& work,
                 KltWork::Thread& thread, KltWork::Slice& slice) {
  const AttentionShape& shape = layer.shape();
  const int64_t d = shape.head_dim, group = shape.group(), n_rot = layer.rope().n_rot(),
                columns = work.columns;
  const KltPart& part = layer.part_of_head(head_kv);
  part.rebuild_keys(thread.tile.key.data(), thread.tile.ld, n, layer.channel_of_head(head_kv), d,
                    thread.key.data(), d);
  ops().rope_rows(thread.key.data(), n, d, n_rot, thread.cos.data(), thread.sin.data(), n_rot / 2, false,
                  thread.key.data());
  for (int64_t r = 0; r < group; ++r) {
    for (int64_t c = 0; c < d; ++c) thread.query_t[c * columns + r] = q[(head_kv * group + r) * d + c];
  }
  ops().gemm(n, columns, d, thread.key.data(), d, thread.query_t.data(), columns, thread.score.data(),
             columns, false);

  const int64_t n_value = part.layout().n_value;
  for (int64_t r = 0; r < group; ++r) {
    const int64_t h = head_kv * group + r;
    float* weight = thread.weight.data();
    for (int64_t t = 0; t < n; ++t) weight[t] = thread.score[t * columns + r];
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

void klt_attend(const KltLayer& layer, std::span<const int32_t> tokens, Part heads, const float* q,
                KltWork& work, KltWork::Thread& thread, KltWork::Slice& slice) {
  const int64_t half = layer.rope().n_rot() / 2;
  for (size_t done = 0; done < tokens.size(); done += kTile) {
    const auto tile = tokens.subspan(done, std::min<size_t>(kTile, tokens.size() - done));
    const auto n = static_cast<int64_t>(tile.size());
    for (int64_t t = 0; t < n; ++t) {
      layer.rope().at(layer.n_sink() + tile[static_cast<size_t>(t)], thread.cos.data() + t * half,
                      thread.sin.data() + t * half);
    }
    const KltPart* held = nullptr;
    for (int64_t h = heads.begin; h < heads.end; ++h) {
      const KltPart& part = layer.part_of_head(h);
      if (&part != held) read_tile(layer, part, tile, thread);
      held = &part;
      attend_head(layer, h, n, q, work, thread, slice);
    }
  }
}

void klt_merge(const KltLayer& layer, StepScratch& scratch, KltWork& work, KltWork::Thread& thread,
               Part heads, float* out) {
  const AttentionShape& shape = layer.shape();
  const int64_t d = shape.head_dim;
  const bool has_pages = !layer.parts().empty();
  for (int64_t h = heads.begin; h < heads.end; ++h) {
    float top = -std::numeric_limits<float>::infinity();
    for (int i = 0; i < kSlices; ++i) {
      StepScratch::Slice& exact = scratch.slice(kSlices + i);
      const KltWork::Slice& latent = *work.slices[static_cast<size_t>(i)];
      if (exact.sum[h] != 0) top = std::fmax(top, exact.max[h]);
      if (latent.sum[h] != 0) top = std::fmax(top, latent.max[h]);
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
      if (latent.sum[h] != 0) {
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

// --- buffers ---

KltWork::Thread::Thread(const KltLayer& layer, int64_t blocks_a_page)
    : tile(layer.heads_of_a_part() * layer.shape().head_dim),
      query(layer.shape().n_head * layer.shape().head_dim),
      turned(std::max(kScoreChunk, blocks_a_page) * layer.shape().group() * layer.shape().head_dim),
      projected(layer.shape().n_head * std::max(kScoreChunk, blocks_a_page) *
                (padded(layer.options().n_index + 1) + kernels::kLatentPad)),
      step(padded(layer.options().n_index) + kernels::kLatentPad),
      codes((padded(layer.options().n_index) + kernels::kLatentPad) * kPageTokens),
      key(kTile * layer.shape().head_dim),
      query_t(layer.shape().head_dim * padded(layer.shape().group())),
      score(kTile * padded(layer.shape().group())),
      weight(kTile),
      cos(kTile * layer.shape().head_dim / 2),
      sin(kTile * layer.shape().head_dim / 2),
      latent(padded(layer.heads_of_a_part() * layer.shape().head_dim) + kernels::kLatentPad) {
  for (int64_t i = 0; i < query_t.size(); ++i) query_t[i] = 0;
}

bool KltWork::Thread::ok() const {
  return tile.ok() && query.ok() && turned.ok() && projected.ok() && step.ok() && codes.ok() && key.ok() &&
         query_t.ok() && score.ok() && weight.ok() && cos.ok() && sin.ok() && latent.ok();
}

KltWork::KltWork(const KltLayer& layer, const KvProfile& profile, int n_threads)
    : ld_latent(padded(layer.heads_of_a_part() * layer.shape().head_dim) + kernels::kLatentPad),
      columns(padded(layer.shape().group())),
      ldu(padded(layer.options().n_index + 1) + kernels::kLatentPad) {
  const AttentionShape& shape = layer.shape();
  for (const double frequency : layer.rope().frequency()) {
    half_cos.push_back(static_cast<float>(std::cos(frequency / 2)));
    half_sin.push_back(static_cast<float>(std::sin(frequency / 2)));
    double mean = 0;
    for (int64_t t = 0; t < profile.block; ++t) {
      const double off = static_cast<double>(t) - static_cast<double>(profile.block - 1) / 2;
      mean += std::cos(off * frequency) / static_cast<double>(profile.block);
    }
    // Turning the query back divides by the magnitude that turning the key would multiply by.
    const double magnitude = static_cast<double>(layer.rope().magnitude());
    damp.push_back(static_cast<float>(mean * magnitude * magnitude));
  }
  for (int i = 0; i < n_threads; ++i)
    threads.push_back(std::make_unique<Thread>(layer, kPageTokens / profile.block));
  for (int i = 0; i < kSlices; ++i) slices.push_back(std::make_unique<Slice>(shape.n_head, ld_latent));
  part_max.assign(static_cast<size_t>(kSlices * shape.n_head), 0);
  part_sum.assign(part_max.size(), 0);
  pool_weight.assign(part_max.size(), 0);
}

bool KltWork::ok() const {
  return std::all_of(threads.begin(), threads.end(), [](const auto& t) { return t->ok(); }) &&
         std::all_of(slices.begin(), slices.end(), [](const auto& s) { return s->ok(); });
}

void KltWork::grow(const AttentionShape& shape, int64_t n) {
  if (n <= ld) return;
  n += n / 4;  // seldom, as the context grows
  const auto heads = static_cast<size_t>(shape.n_head), heads_kv = static_cast<size_t>(shape.n_head_kv);
  const auto room = static_cast<size_t>(n);
  ld = 0;
  scores.resize(heads * room);
  pooled.resize(heads_kv * room);
  selected.resize(heads_kv * room);
  ld_select = ceil_div(kernels::select_scratch_bytes(n), int64_t{sizeof(uint64_t)});
  select_work.resize(heads_kv * static_cast<size_t>(ld_select));
  ld = n;
}

}  // namespace narrows
