// Stage 1 of a sparse klt step: the queries, projected once per block of tokens into the latent space,
// against the index. k at position j is R_j (mean + B z_j); inside a block R_j is replaced by the rotation at
// the block's centre c, each pair damped by its average over the block, so that s_j = (B R_c^T q) . z_j +
// mean . R_c^T q, no key rebuilt. R_c^T q is a sum over pairs of cos(f c) and sin(f c) times what does not
// depend on c: so a step folds its queries with B once (fold_query), and all blocks of all heads are one
// product with a table of cosines and sines that is the same for all layers and steps.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "kv/klt/klt_work.h"

namespace narrows {

using kernels::ops;

namespace {

/// Far below any score: its exponential is 0.
constexpr float kNever = -1e30F;

/// Writes `value` where the scores of a slice's anchors are: they are read among the exact tokens.
void set_anchors(const KltLayer& layer, Part pages, float value, KltWork& work) {
  for (int64_t p = pages.begin; p < pages.end; ++p) {
    for (AnchorBits bits = layer.anchors(p); bits != 0; bits &= bits - 1) {
      float* score = work.scores.data() + p * kPageTokens + std::countr_zero(bits);
      for (int64_t h = 0; h < layer.shape().n_head; ++h) score[h * work.ld] = value;
    }
  }
}

/// Folds the queries of a part's heads into thread.folded, a group of ld columns a query head; and again, in
/// bfloat16, as the product wants them: what that costs an index of a few bits a coordinate is nothing. Not
/// so the columns of the mean: a mean key may be large, and moves whole blocks against each other.
void fold_queries(const KltLayer& layer, int64_t first_kv, const KltPart& part, const float* q,
                  int64_t n_coef, KltThread& thread) {
  const AttentionShape& shape = layer.shape();
  const int64_t d = shape.head_dim, n_rot = layer.rope().n_rot(), ld = part.ld_score();
  const int64_t n_query = layer.heads_of_a_part() * shape.group();
  const int64_t lda = n_query * ld;
  for (int64_t i = 0; i < n_query; ++i) {
    const float* row = q + (first_kv * shape.group() + i) * d;
    const float* basis = part.score_basis().data() + layer.channel_of_head(first_kv + i / shape.group()) * ld;
    float* to = thread.folded.data() + i * ld;
    ops().fold_query(row, n_rot / 2, basis, ld, ld, to, lda);
    if (n_rot < d) {
      ops().gemm(1, ld, d - n_rot, row + n_rot, d, basis + n_rot * ld, ld, to + (n_coef - 1) * lda, lda,
                 false);
    }
    for (int64_t c = 0; c < n_coef; ++c)
      thread.folded_mean[c * n_query + i] = to[c * lda + part.layout().n_index];
  }
  ops().pack_bf16(thread.folded.data(), lda, n_coef, lda, thread.folded_pairs.data(), lda);
}

/// The folded queries at the centres of n blocks: thread.projected [n, n_query * ld].
void project_queries(const KltPart& part, const KltTurns& turns, int64_t first_block, int64_t n,
                     int64_t n_query, KltThread& thread) {
  const int64_t ld = part.ld_score(), columns = n_query * ld;
  const int64_t n_coef = turns.n_coef;
  const float* rows = turns.rows.data() + first_block * n_coef;
  ops().gemm_bf16(n, columns, n_coef, rows, n_coef, thread.folded_pairs.data(), columns,
                  thread.projected.data(), columns, false);
  ops().gemm(n, n_query, n_coef, rows, n_coef, thread.folded_mean.data(), n_query,
             thread.projected_mean.data(), n_query, false);
  for (int64_t i = 0; i < n * n_query; ++i)
    thread.projected[i * ld + part.layout().n_index] = thread.projected_mean[i];
}

/// Asks for what score_page() will read of a page: the index is a seventh of it, so one page after another is
/// no stream that the CPU would recognise.
void prefetch_index(const KltPart& part, const std::byte* page) {
  const uint8_t* index = part.index(page);
  __builtin_prefetch(part.key_scales(page));
  for (int64_t b = 0; b < part.layout().index_bytes + 63; b += 64) __builtin_prefetch(index + b);
}

/// Scores of one page, whose blocks' projected queries are u [blocks, n_query * ld].
void score_page(const KltPart& part, const std::byte* page, int64_t block, const float* u, int64_t n_query,
                KltThread& thread, float* score, int64_t lds) {
  const int64_t n_index = part.layout().n_index, ld = part.ld_score();
  ops().expand_index(part.index(page), part.key().octet_bits.data(), n_index / kernels::kOctet,
                     kernels::kScoreBits, thread.codes.data());
  ops().amplitudes(part.key_scales(page), n_index, thread.step.data());
  for (int64_t c = 0; c < n_index; ++c) thread.step[c] *= part.score_step()[static_cast<size_t>(c)];
  for (int64_t first = 0; first < kPageTokens; first += block, u += n_query * ld) {
    ops().score_index(thread.codes.data(), n_index, u, ld, n_query, thread.step.data(),
                      part.score_centre().data(), first, block, score, lds);
  }
}

}  // namespace

void klt_score(const KltLayer& layer, const KvProfile& profile, const float* q, Part slices, KltWork& work,
               KltThread& thread) {
  const AttentionShape& shape = layer.shape();
  const int64_t n_page = layer.n_page(), blocks = kPageTokens / profile.block;
  const Part pages = {part_of(n_page, static_cast<int>(slices.begin), kSlices).begin,
                      part_of(n_page, static_cast<int>(slices.end - 1), kSlices).end};
  const int64_t pages_a_chunk = kScoreChunk / blocks;
  const KltTurns& turns = work.turns_of(layer);
  for (int64_t h = 0; h < shape.n_head_kv; h += layer.heads_of_a_part()) {
    const KltPart& part = layer.part_of_head(h);
    const int64_t n_query = layer.heads_of_a_part() * shape.group();
    const int64_t columns = n_query * part.ld_score();
    if (pages.begin < pages.end) fold_queries(layer, h, part, q, turns.n_coef, thread);
    for (int64_t begin = pages.begin; begin < pages.end; begin += pages_a_chunk) {
      const int64_t n = std::min(pages_a_chunk, pages.end - begin);
      project_queries(part, turns, begin * blocks, n * blocks, n_query, thread);
      for (int64_t p = begin; p < begin + n; ++p) {
        if (p + 1 < pages.end) prefetch_index(part, layer.page(p + 1));
        score_page(part, layer.page(p), profile.block,
                   thread.projected.data() + (p - begin) * blocks * columns, n_query, thread,
                   work.scores.data() + h * shape.group() * work.ld + p * kPageTokens, work.ld);
      }
    }
  }
  for (int64_t i = slices.begin; i < slices.end; ++i) {
    const Part own = part_of(n_page, static_cast<int>(i), kSlices);
    set_anchors(layer, own, kNever, work);
    for (int64_t h = 0; h < shape.n_head; ++h) {
      const auto at = static_cast<size_t>(h * 2 * kSlices + i);
      work.part_sum[at] = 0;
      work.part_max[at] = std::numeric_limits<float>::lowest();
      if (own.begin == own.end) continue;
      ops().softmax_scores(work.scores.data() + h * work.ld + own.begin * kPageTokens,
                           (own.end - own.begin) * kPageTokens, &work.part_max[at], &work.part_sum[at]);
    }
    // Never a candidate, even where every probability counts.
    set_anchors(layer, own, std::numeric_limits<float>::quiet_NaN(), work);
  }
}

void klt_note_exact(const AttentionShape& shape, Part slices, StepScratch& scratch, KltWork& work) {
  for (int64_t i = slices.begin; i < slices.end; ++i) {
    StepScratch::Slice& exact = scratch.slice(kSlices + static_cast<int>(i));
    for (int64_t h = 0; h < shape.n_head; ++h) {
      const auto at = static_cast<size_t>((h * 2 + 1) * kSlices + i);
      work.part_sum[at] = exact.sum[h];
      // An empty slice was not cleared.
      work.part_max[at] = exact.sum[h] > 0 ? exact.max[h] : std::numeric_limits<float>::lowest();
    }
  }
}

}  // namespace narrows
