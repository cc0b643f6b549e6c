// Layout of prefill_attend's scratch, the same for every target.
#pragma once

#include <cstdint>

#include "kernels/ops.h"

namespace narrows::kernels {

/// Query rows worked on together. At head_dim 128 a block is 128 x (128 q + 128 out + 64 scores) floats = 160
/// KB, and a tile of K and V 64 KB: both stay in an L2 of 256 KB or more while the tile is used. Larger
/// blocks would read K and V less often, but at 128 rows that is 1 byte in 64 operations already.
inline constexpr int64_t kQueryBlock = 128;

/// Most float lanes of any target: the running sum of a row is kept a lane.
inline constexpr int64_t kMaxLanes = 16;

/// Offsets in floats; each part begins at a multiple of 16 floats because head_dim is rounded up to one.
struct PrefillScratch {
  explicit PrefillScratch(int64_t head_dim) {
    const int64_t wide = (head_dim + 15) / 16 * 16;
    q = 0;
    out = q + kQueryBlock * wide;
    score = out + kQueryBlock * wide;
    value = score + kQueryBlock * kTile;
    sum = value + kTile * wide;
    max = sum + kQueryBlock * kMaxLanes;
    size = max + kQueryBlock;
  }
  int64_t q;      ///< [kQueryBlock, head_dim]: the block's queries, scaled
  int64_t out;    ///< [kQueryBlock, head_dim]: sums of weighted values
  int64_t score;  ///< [kQueryBlock, kTile]: scores, then weights
  int64_t value;  ///< [kTile, head_dim]: V of one tile, packed
  int64_t sum;    ///< [kQueryBlock, kMaxLanes]
  int64_t max;    ///< [kQueryBlock]
  int64_t size;
};

}  // namespace narrows::kernels
