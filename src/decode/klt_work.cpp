// Sizes of the buffers of a klt step, and the table of block rotations.
#include "decode/klt_work.h"

#include <algorithm>
#include <cmath>

namespace narrows {

namespace {

int64_t padded(int64_t n) { return kernels::pad_latent(n); }

int64_t latent_room(const KltLayer& layer) {
  return padded(layer.heads_of_a_part() * layer.shape().head_dim) + kernels::kLatentPad;
}

int64_t index_room(const KltLayer& layer) {
  return padded(layer.options().n_index + kernels::kOctet) + kernels::kLatentPad;
}

}  // namespace

KltWork::Thread::Thread(const KltLayer& layer, int64_t n_coef, int64_t ldu)
    : tile(layer.heads_of_a_part() * layer.shape().head_dim),
      folded(n_coef * layer.heads_of_a_part() * layer.shape().group() * ldu),
      folded_pairs(ceil_div(n_coef, 2) * layer.heads_of_a_part() * layer.shape().group() * ldu),
      folded_mean(n_coef * layer.heads_of_a_part() * layer.shape().group()),
      projected(kScoreChunk * layer.heads_of_a_part() * layer.shape().group() * ldu),
      projected_mean(kScoreChunk * layer.heads_of_a_part() * layer.shape().group()),
      step(index_room(layer)),
      codes(index_room(layer) * kPageTokens),
      key(kernels::kTile * layer.shape().head_dim),
      half(kernels::kTile * layer.shape().head_dim),
      score(layer.shape().group() * kernels::kTile),
      weight(layer.shape().group()),
      cos(kernels::kTile * layer.shape().head_dim / 2),
      sin(kernels::kTile * layer.shape().head_dim / 2),
      latent(latent_room(layer)),
      amplitude(kernels::kTile * latent_room(layer)),
      slice_weight(layer.shape().n_head * 2 * kSlices),
      slice_page(kAttendSlices + 1),
      slice_begin(static_cast<size_t>(layer.shape().n_head_kv * (kAttendSlices + 1))),
      left(static_cast<size_t>(layer.shape().n_head_kv)) {}

bool KltWork::Thread::ok() const {
  return tile.ok() && folded.ok() && folded_pairs.ok() && folded_mean.ok() && projected.ok() &&
         projected_mean.ok() && step.ok() && codes.ok() && key.ok() && half.ok() && score.ok() &&
         weight.ok() && cos.ok() && sin.ok() && latent.ok() && amplitude.ok() && slice_weight.ok();
}

KltWork::KltWork(const KltLayer& layer, const KvProfile& profile, int n_threads)
    : ld_latent(latent_room(layer)),
      ldu(index_room(layer) + 1),
      n_coef(layer.rope().n_rot() + (layer.rope().n_rot() < layer.shape().head_dim ? 1 : 0)),
      chosen(static_cast<size_t>(layer.shape().n_head_kv)) {
  const AttentionShape& shape = layer.shape();
  for (const double frequency : layer.rope().frequency()) {
    double mean = 0;
    for (int64_t t = 0; t < profile.block; ++t) {
      const double off = static_cast<double>(t) - static_cast<double>(profile.block - 1) / 2;
      mean += std::cos(off * frequency) / static_cast<double>(profile.block);
    }
    damp.push_back(mean * static_cast<double>(layer.rope().magnitude()));
  }
  for (int i = 0; i < n_threads; ++i) threads.push_back(std::make_unique<Thread>(layer, n_coef, ldu));
  for (int i = 0; i < kAttendSlices; ++i) slices.push_back(std::make_unique<Slice>(shape.n_head));
  for (const auto& slice : slices) {
    if (slice->ok()) std::fill_n(slice->sum.data(), shape.n_head, 0.0F);
  }
  slice_latents = AlignedArray<float>(shape.n_head * kAttendSlices * ld_latent);
  if (slice_latents.ok()) std::fill_n(slice_latents.data(), slice_latents.size(), 0.0F);
  part_max.assign(static_cast<size_t>(2 * kSlices * shape.n_head), 0);
  part_sum.assign(part_max.size(), 0);
  n_candidate.assign(static_cast<size_t>(shape.n_head_kv * kSlices), 0);
  n_selected.assign(static_cast<size_t>(shape.n_head_kv), 0);
  n_missing.assign(n_selected.size(), 0);
}

bool KltWork::ok() const {
  return slice_latents.ok() &&
         std::all_of(threads.begin(), threads.end(), [](const auto& t) { return t->ok(); }) &&
         std::all_of(slices.begin(), slices.end(), [](const auto& s) { return s->ok(); });
}

void KltWork::grow(const KltLayer& layer, const KvProfile& profile, int64_t n, int64_t n_read) {
  const AttentionShape& shape = layer.shape();
  const int64_t n_page = ceil_div(n, kPageTokens);
  for (const auto& t : threads) t->per_page.resize(std::max(t->per_page.size(), static_cast<size_t>(n_page)));
  // A slice ends at the first page with which it has its share of all heads' tokens; they may be one head's.
  const int64_t run = std::min(n_read, shape.n_head_kv * (ceil_div(n_read, kAttendSlices) + 1 + kPageTokens));
  if (run > ld_run) {
    const int64_t room = run + run / 4;
    for (const auto& t : threads) t->weights.resize(static_cast<size_t>(shape.n_head * room));
    ld_run = room;
  }
  if (n <= ld) return;
  n = ceil_div(n + n / 4, kPageTokens) * kPageTokens;  // seldom, as the context grows
  const auto heads = static_cast<size_t>(shape.n_head), heads_kv = static_cast<size_t>(shape.n_head_kv);
  const auto room = static_cast<size_t>(n);
  const int64_t n_block = n / profile.block;
  const int64_t had_block = static_cast<int64_t>(turns.size()) / std::max<int64_t>(1, n_coef);
  ld = 0;
  scores.resize(heads * room);
  pooled.resize(heads_kv * room);
  candidate.resize(heads_kv * room);
  selected.resize(heads_kv * room);
  slot.resize(heads_kv * room);
  missing.resize(heads_kv * room);
  turns.resize(static_cast<size_t>(n_block * n_coef), 1.0F);  // 1: of coordinates that are not rotated
  for (int64_t b = had_block; b < n_block; ++b) {
    float* row = turns.data() + b * n_coef;
    const double centre =
        static_cast<double>(layer.n_sink() + b * profile.block) + static_cast<double>(profile.block - 1) / 2;
    for (size_t i = 0; i < damp.size(); ++i) {
      const double angle = centre * layer.rope().frequency()[i];
      row[2 * i] = static_cast<float>(damp[i] * std::cos(angle));
      row[2 * i + 1] = static_cast<float>(damp[i] * std::sin(angle));
    }
  }
  ld = n;
}

}  // namespace narrows
