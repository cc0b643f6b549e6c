// Stage 1 of a sparse step: project the query, score the tokens in pages by the index part of their latents.
// q [n_head, head_dim] before RoPE in; scores [tokens] out. SALS section 3 (PAPERS 1.2): no rotation on
// either side.
#include <algorithm>
#include <cmath>

#include "kv/sals/sals_stages.h"

namespace narrows {

void score_pages(const SalsLayer& layer, const float* q, Part pages, StepScratch::Thread& thread,
                 float* scores) {
  if (pages.begin >= pages.end) return;
  const AttentionShape& shape = layer.shape();
  const SalsLayout& layout = layer.layout();
  const int64_t rank_score = layout.rank_score;

  // The paper does not say how a latent is scored by several query heads; the sum over the heads of a KV head
  // is the score that those heads give together.
  float* joint = thread.joint.data();
  for (int64_t g = 0; g < shape.n_head_kv; ++g) {
    const float* head = q + g * shape.group() * shape.head_dim;
    for (int64_t d = 0; d < shape.head_dim; ++d) {
      float sum = 0;
      for (int64_t i = 0; i < shape.group(); ++i) sum += head[i * shape.head_dim + d];
      joint[g * shape.head_dim + d] = sum;
    }
  }
  float* latent_q = thread.latent_q.data();
  kernels::ops().gemm(1, rank_score, shape.width(), joint, shape.width(), layer.basis(), layer.ld_basis(),
                      latent_q, rank_score, false);

  // select_top needs finite scores. A latent is at most 65504, so a query latent below 1e30 cannot overflow;
  // beyond, the step's output is lost anyway, and any selection will do.
  const bool usable =
      std::all_of(latent_q, latent_q + rank_score, [](float x) { return std::fabs(x) < 1e30F; });
  if (!usable) std::fill(latent_q, latent_q + rank_score, 0.0F);

  for (int64_t p = pages.begin; p < pages.end; ++p) {
    // Pages lie apart, so the CPU's own prefetcher starts anew at each: ask for the one after the next.
    if (p + 2 < pages.end) layer.prefetch_index(p + 2);
    kernels::ops().gemm_f16(1, layer.page_tokens(p), rank_score, latent_q, rank_score,
                            layout.index(layer.page(p)), kPageTokens, scores + p * kPageTokens, kPageTokens,
                            false);
  }
}

}  // namespace narrows
