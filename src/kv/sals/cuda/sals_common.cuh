// What the kernels of a SALS step share.
#pragma once

#include "exec/cuda/arguments.h"
#include "exec/cuda/flash_tile.cuh"

namespace narrows::cuda {

struct SalsParams {
  narrows_cuda_sals_args a;
  SalsPlan plan;
  char* work;

  template <class T>
  __device__ T* at(size_t offset) const {
    return reinterpret_cast<T*>(work + offset);
  }
};

/// Rows of the basis that one block of the query's projection takes.
inline constexpr int kProjectRows = 128;
/// Sequences that it projects together.
inline constexpr int kProjectSequences = 8;
/// Tokens that a block scores.
inline constexpr int kScoreTokens = kSalsScoreTokens;

__device__ inline const uint8_t* sals_page(const SalsParams& p, int seq, int page) {
  return static_cast<const uint8_t*>(p.a.pages.pool) +
         p.a.pages.table[static_cast<int64_t>(seq) * p.a.pages.ld + page] * p.a.pages.page_bytes;
}

}  // namespace narrows::cuda
