// Sizes of the buffers of a klt step, and the tables of block rotations.
#include "kv/klt/klt_work.h"

#include <algorithm>
#include <cmath>
#include <new>

namespace narrows {

namespace {

int64_t padded(int64_t n) { return kernels::pad_latent(n); }

/// With room to grow, so that it is seldom made again: of n tokens, or tokens of a run.
int64_t roomy(int64_t n) { return n + n / 4; }

/// Most of n_read selected tokens in a slice. A slice ends at the first page with which it has its share of
/// all heads' tokens; they may be one head's.
int64_t most_in_a_slice(int64_t n_head_kv, int64_t n_read) {
  return std::min(n_read, n_head_kv * (ceil_div(n_read, kAttendSlices) + 1 + kPageTokens));
}

}  // namespace

KltSizes KltSizes::of(const KltLayer& layer) {
  return of(layer.shape(), layer.rope().n_rot(), layer.options().n_index);
}

KltSizes KltSizes::of(const AttentionShape& shape, int64_t n_rot, int64_t n_index) {
  const int64_t heads = heads_of_part(shape.n_head_kv, shape.head_dim);
  KltSizes s;
  s.n_head = shape.n_head;
  s.n_head_kv = shape.n_head_kv;
  s.group = shape.group();
  s.head_dim = shape.head_dim;
  s.part = heads * shape.head_dim;
  s.queries = heads * shape.group();
  s.n_coef = n_rot + (n_rot < shape.head_dim ? 1 : 0);
  s.ldu = padded(n_index + kernels::kOctet) + kernels::kLatentPad + 1;
  s.latent = padded(s.part) + kernels::kLatentPad;
  return s;
}

KltSizes KltSizes::most(const KltSizes& a, const KltSizes& b) {
  return {std::max(a.n_head, b.n_head), std::max(a.n_head_kv, b.n_head_kv),
          std::max(a.group, b.group),   std::max(a.head_dim, b.head_dim),
          std::max(a.part, b.part),     std::max(a.queries, b.queries),
          std::max(a.n_coef, b.n_coef), std::max(a.ldu, b.ldu),
          std::max(a.latent, b.latent)};
}

KltTurns::KltTurns(const KltLayer& layer, int64_t block_tokens)
    : rope(&layer.rope()), n_coef(KltSizes::of(layer).n_coef), n_sink(layer.n_sink()), block(block_tokens) {
  for (const double frequency : rope->frequency()) {
    double mean = 0;
    for (int64_t t = 0; t < block; ++t) {
      const double off = static_cast<double>(t) - static_cast<double>(block - 1) / 2;
      mean += std::cos(off * frequency) / static_cast<double>(block);
    }
    damp.push_back(mean * static_cast<double>(rope->magnitude()));
  }
}

bool KltTurns::serves(const KltLayer& layer) const {
  return rope == &layer.rope() && n_coef == KltSizes::of(layer).n_coef;
}

void KltTurns::grow(int64_t n_block) {
  const int64_t had = static_cast<int64_t>(rows.size()) / std::max<int64_t>(1, n_coef);
  if (n_block <= had) return;
  rows.resize(static_cast<size_t>(n_block * n_coef), 1.0F);  // 1: of coordinates that are not rotated
  for (int64_t b = had; b < n_block; ++b) {
    float* row = rows.data() + b * n_coef;
    const double centre = static_cast<double>(n_sink + b * block) + static_cast<double>(block - 1) / 2;
    for (size_t i = 0; i < damp.size(); ++i) {
      const double angle = centre * rope->frequency()[i];
      row[2 * i] = static_cast<float>(damp[i] * std::cos(angle));
      row[2 * i + 1] = static_cast<float>(damp[i] * std::sin(angle));
    }
  }
}

KltThread::KltThread(const KltSizes& most)
    : tile(most.part),
      folded(most.n_coef * most.queries * most.ldu),
      folded_pairs(ceil_div(most.n_coef, 2) * most.queries * most.ldu),
      folded_mean(most.n_coef * most.queries),
      projected(kScoreChunk * most.queries * most.ldu),
      projected_mean(kScoreChunk * most.queries),
      step(most.ldu),
      codes(most.ldu * kPageTokens),
      key(kernels::kTile * most.head_dim),
      half(kernels::kTile * most.head_dim),
      score(most.group * kernels::kTile),
      weight(most.group),
      cos(kernels::kTile * most.head_dim / 2),
      sin(kernels::kTile * most.head_dim / 2),
      latent(most.latent),
      amplitude(kernels::kTile * most.latent),
      slice_weight(most.n_head * 2 * kSlices),
      slice_page(kAttendSlices + 1),
      slice_begin(static_cast<size_t>(most.n_head_kv * (kAttendSlices + 1))),
      left(static_cast<size_t>(most.n_head_kv)) {}

bool KltThread::ok() const {
  return tile.ok() && folded.ok() && folded_pairs.ok() && folded_mean.ok() && projected.ok() &&
         projected_mean.ok() && step.ok() && codes.ok() && key.ok() && half.ok() && score.ok() &&
         weight.ok() && cos.ok() && sin.ok() && latent.ok() && amplitude.ok() && slice_weight.ok();
}

/// Makes all that does not grow with the context anew. A failure leaves nothing, and the next step tries
/// again.
void KltWork::make_for(const KltSizes& most) {
  sizes = {};
  ld = ld_run = 0;
  threads.clear();
  slices.clear();
  for (int i = 0; i < n_threads; ++i) threads.push_back(std::make_unique<KltThread>(most));
  for (int i = 0; i < kAttendSlices; ++i) slices.push_back(std::make_unique<KltSlice>(most.n_head));
  slice_latents = AlignedArray<float>(most.n_head * kAttendSlices * most.latent);
  const bool good = slice_latents.ok() &&
                    std::all_of(threads.begin(), threads.end(), [](const auto& t) { return t->ok(); }) &&
                    std::all_of(slices.begin(), slices.end(), [](const auto& s) { return s->ok(); });
  if (!good) throw std::bad_alloc();
  for (const auto& slice : slices) std::fill_n(slice->sum.data(), most.n_head, 0.0F);
  std::fill_n(slice_latents.data(), slice_latents.size(), 0.0F);
  const auto heads_kv = static_cast<size_t>(most.n_head_kv);
  part_max.assign(static_cast<size_t>(2 * kSlices * most.n_head), 0);
  part_sum.assign(part_max.size(), 0);
  n_candidate.assign(heads_kv * kSlices, 0);
  n_selected.assign(heads_kv, 0);
  n_missing.assign(heads_kv, 0);
  chosen = std::vector<std::atomic<bool>>(heads_kv);
  ld_latent = most.latent;
  sizes = most;
}

const KltTurns& KltWork::turns_of(const KltLayer& layer) const {
  return *std::find_if(turns.begin(), turns.end(), [&](const KltTurns& t) { return t.serves(layer); });
}

void KltWork::fit(const KltLayer& layer, const KvProfile& profile, int64_t n, int64_t n_read) {
  const KltSizes own = KltSizes::of(layer);
  // Layers that have begun the step already count on the room that they were given.
  const int64_t had = ld, had_run = ld_run;
  if (const KltSizes most = KltSizes::most(sizes, own); !(most == sizes)) make_for(most);
  n = std::max(n, had);
  const auto serves = [&](const KltTurns& t) { return t.serves(layer); };
  auto its_turns = std::find_if(turns.begin(), turns.end(), serves);
  if (its_turns == turns.end()) its_turns = turns.emplace(its_turns, layer, profile.block);
  const int64_t n_page = ceil_div(n, kPageTokens);
  for (const auto& t : threads) t->per_page.resize(std::max(t->per_page.size(), static_cast<size_t>(n_page)));
  const int64_t run = std::max(most_in_a_slice(own.n_head_kv, n_read), had_run);
  if (run > ld_run) {
    const int64_t room = roomy(run);
    for (const auto& t : threads) t->weights.resize(static_cast<size_t>(sizes.n_head * room));
    ld_run = room;
  }
  if (n > ld) {
    const int64_t room = ceil_div(roomy(n), kPageTokens) * kPageTokens;
    const auto a_head = static_cast<size_t>(sizes.n_head * room);
    const auto a_head_kv = static_cast<size_t>(sizes.n_head_kv * room);
    ld = 0;
    scores.resize(a_head);
    pooled.resize(a_head_kv);
    candidate.resize(a_head_kv);
    selected.resize(a_head_kv);
    slot.resize(a_head_kv);
    missing.resize(a_head_kv);
    ld = room;
  }
  its_turns->grow(ld / profile.block);
}

int64_t klt_work_bytes(const KltSizes& sizes, int64_t block, int64_t n, int64_t n_read, int n_threads) {
  const KltSizes& s = sizes;
  const int64_t room = ceil_div(roomy(n), kPageTokens) * kPageTokens;
  const int64_t tile = kernels::kTile, page = kPageTokens;
  const int64_t tile_floats = (2 * page + 2) * s.latent + s.latent * page / 4;  // KltScratch
  const int64_t thread_floats =
      tile_floats + s.n_coef * s.queries * (s.ldu + s.ldu / 2 + 1) + kScoreChunk * s.queries * (s.ldu + 1) +
      s.ldu * page / 4 + tile * (s.head_dim * 5 / 2 + s.group + s.latent) +
      s.n_head * (2 * kSlices + roomy(most_in_a_slice(s.n_head_kv, n_read))) + ceil_div(n, page);
  const int64_t shared_floats = s.n_head * kAttendSlices * (s.latent + 2) + s.n_head * (room + 4 * kSlices) +
                                s.n_head_kv * 5 * room + room / block * s.n_coef;
  return (n_threads * thread_floats + shared_floats) * int64_t{sizeof(float)};
}

}  // namespace narrows
