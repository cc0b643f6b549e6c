// Stage 1 of a sparse klt step: the query, turned once per block of tokens into the latent space, against the
// index. k at position j is R_j (mean + B z_j); inside a block R_j is replaced by the rotation at the block's
// centre, each pair damped by its average over the block, so that s_j = (B R_c^T q) . z_j + mean . R_c^T q,
// no key rebuilt.
#include <algorithm>
#include <cmath>
#include <limits>

#include "decode/klt_work.h"

namespace narrows {

using kernels::ops;

namespace {

/// What all blocks have in common: half a position, and the damping of each pair.
void turn_half(const KltLayer& layer, const float* q, const KltWork& work, float* turned) {
  const AttentionShape& shape = layer.shape();
  const int64_t half = layer.rope().n_rot() / 2;
  ops().rope_rows(q, shape.n_head, shape.head_dim, 2 * half, work.half_cos.data(), work.half_sin.data(), 0,
                  true, turned);
  for (int64_t h = 0; h < shape.n_head; ++h) {
    float* row = turned + h * shape.head_dim;
    for (int64_t c = 0; c < half; ++c) {
      row[c] *= work.damp[static_cast<size_t>(c)];
      row[c + half] *= work.damp[static_cast<size_t>(c)];
    }
  }
}

/// Queries of a KV head turned to the centres of blocks [first, first + n), then projected on the index
/// coordinates and the mean.
void project_queries(const KltLayer& layer, const KvProfile& profile, int64_t head_kv, const float* q,
                     int64_t first, int64_t n, const KltWork& work, KltWork::Thread& thread) {
  const AttentionShape& shape = layer.shape();
  const int64_t d = shape.head_dim, group = shape.group(), n_rot = layer.rope().n_rot();
  const KltPart& part = layer.part_of_head(head_kv);
  float cos[kMaxHeadDim / 2];
  float sin[kMaxHeadDim / 2];
  float* turned = thread.turned.data();
  for (int64_t i = 0; i < n; ++i) {
    // The centre lies half a position beyond this one.
    const int64_t centre = layer.n_sink() + (first + i) * profile.block + profile.block / 2 - 1;
    layer.rope().at(centre, cos, sin);
    ops().rope_rows(q + head_kv * group * d, group, d, n_rot, cos, sin, 0, true, turned + i * group * d);
  }
  const int64_t column = layer.channel_of_head(head_kv) * part.ld_score();
  ops().gemm(n * group, part.layout().n_index + 1, d, turned, d, part.score_basis().data() + column,
             part.ld_score(), thread.projected.data() + head_kv * kScoreChunk * group * work.ldu, work.ldu,
             false);
}

}  // namespace

void klt_score_part(const KltLayer& layer, const KvProfile& profile, const float* q, int part, Part pages,
                    KltWork& work, KltWork::Thread& thread) {
  const AttentionShape& shape = layer.shape();
  const int64_t group = shape.group(), n_head_kv = shape.n_head_kv;
  const int64_t blocks = kPageTokens / profile.block;
  if (pages.begin < pages.end) turn_half(layer, q, work, thread.query.data());
  const int64_t pages_a_chunk = std::max<int64_t>(1, kScoreChunk / blocks);
  for (int64_t begin = pages.begin; begin < pages.end; begin += pages_a_chunk) {
    const int64_t n = std::min(pages_a_chunk, pages.end - begin);
    for (int64_t h = 0; h < n_head_kv; ++h)
      project_queries(layer, profile, h, thread.query.data(), begin * blocks, n * blocks, work, thread);
    for (int64_t p = begin; p < begin + n; ++p) {
      for (int64_t h = 0; h < n_head_kv; ++h) {
        const KltPart& codec = layer.part_of_head(h);
        const int64_t n_index = codec.layout().n_index;
        if (h % layer.heads_of_a_part() == 0) {
          ops().expand_index(codec.index(layer.page(p)), codec.key().octet_bits.data(),
                             n_index / kernels::kOctet, kernels::kScoreBits, thread.codes.data());
          const uint8_t* scales = codec.key_scales(layer.page(p));
          for (int64_t c = 0; c < n_index; ++c)
            thread.step[c] = kernels::kAmplitude[scales[c]] * codec.score_step()[static_cast<size_t>(c)];
        }
        float* score = work.scores.data() + h * group * work.ld + p * kPageTokens;
        for (int64_t b = 0; b < blocks; ++b) {
          const float* u =
              thread.projected.data() + (h * kScoreChunk + (p - begin) * blocks + b) * group * work.ldu;
          ops().score_index(thread.codes.data(), n_index, u, work.ldu, group, thread.step.data(),
                            codec.score_centre().data(), b * profile.block, profile.block, score, work.ld);
        }
      }
    }
  }
  for (int64_t h = 0; h < shape.n_head; ++h) {
    const size_t at = static_cast<size_t>(part * shape.n_head + h);
    work.part_sum[at] = 0;
    if (pages.begin == pages.end) continue;
    ops().softmax_part(work.scores.data() + h * work.ld + pages.begin * kPageTokens,
                       (pages.end - pages.begin) * kPageTokens, &work.part_max[at], &work.part_sum[at]);
  }
}

void klt_pool(const KltLayer& layer, int64_t head_kv, int64_t n_page, StepScratch& scratch, KltWork& work) {
  const AttentionShape& shape = layer.shape();
  const int64_t group = shape.group(), first = head_kv * group;
  std::vector<float>& weight = work.pool_weight;  // [n_head, kSlices], each KV head its own rows
  for (int64_t h = first; h < first + group; ++h) {
    float top = -std::numeric_limits<float>::infinity();
    for (int i = 0; i < kSlices; ++i) {
      const auto at = static_cast<size_t>(i * shape.n_head + h);
      if (work.part_sum[at] > 0) top = std::fmax(top, work.part_max[at]);
      StepScratch::Slice& exact = scratch.slice(kSlices + i);
      if (exact.sum[h] > 0) top = std::fmax(top, exact.max[h]);
    }
    float total = 0;
    for (int i = 0; i < kSlices; ++i) {
      const auto at = static_cast<size_t>(i * shape.n_head + h);
      if (work.part_sum[at] > 0) total += work.part_sum[at] * std::exp(work.part_max[at] - top);
      StepScratch::Slice& exact = scratch.slice(kSlices + i);
      if (exact.sum[h] > 0) total += exact.sum[h] * std::exp(exact.max[h] - top);
    }
    for (int i = 0; i < kSlices; ++i) {
      const auto at = static_cast<size_t>(i * shape.n_head + h);
      weight[static_cast<size_t>(i * shape.n_head + h)] =
          work.part_sum[at] > 0 ? std::exp(work.part_max[at] - top) / total : 0.0F;
    }
  }
  for (int i = 0; i < kSlices; ++i) {
    const Part pages = part_of(n_page, i, kSlices);
    if (pages.begin == pages.end) continue;
    const int64_t at = pages.begin * kPageTokens;
    ops().gemm(1, (pages.end - pages.begin) * kPageTokens, group, weight.data() + i * shape.n_head + first,
               group, work.scores.data() + first * work.ld + at, work.ld,
               work.pooled.data() + head_kv * work.ld + at, work.ld, false);
  }
  // Only scores that are not finite make such sums; the step is lost anyway, but select_top must not be.
  float* pooled = work.pooled.data() + head_kv * work.ld;
  for (int64_t t = 0; t < n_page * kPageTokens; ++t) {
    if (!(pooled[t] >= 0)) pooled[t] = 0;
  }
}

}  // namespace narrows
