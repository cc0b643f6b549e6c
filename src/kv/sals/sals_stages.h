// The stages of a SALS step that are its own: score.cpp's and rebuild.cpp's. PAPERS: arXiv:2510.24273.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/part.h"
#include "kv/sals/sals_layer.h"
#include "kv/step/stages.h"

namespace narrows {

/// What a step over SALS layers works in, beside StepScratch: shared by all layers of a session.
struct SalsWork final : FamilyWork {
  std::vector<float> scores;      ///< [tokens in pages]
  std::vector<int32_t> selected;  ///< chosen tokens, ascending; indices into the pages, 0 = position n_sink
  std::vector<uint64_t> select_work;
};

// --- sals_score.cpp ---

/// One score a token for all heads, without rotation (SALS 1.2, step 5 and 6): s_j = (sum of the query heads
/// of each KV head) U_r* . z_j. Writes scores [tokens of pages [pages.begin, pages.end)] at their index.
/// Always finite.
void score_pages(const SalsLayer& layer, const float* q, Part pages, StepScratch::Thread& thread,
                 float* scores);

// --- sals_rebuild.cpp ---

/// Attends to selected tokens of the pages: latents -> keys -> RoPE, codes -> values, a tile at a time.
void attend_selected(const SalsLayer& layer, std::span<const int32_t> selected, StepScratch::Thread& thread);

/// Asks for what the first tile of attend_selected() will read: selected tokens lie scattered over a cache
/// that is larger than the CPU's.
void prefetch_selected(const SalsLayer& layer, std::span<const int32_t> selected);

}  // namespace narrows
