// attend_f32, attend_f16: one tile of n <= kTile keys for all query rows of one KV head, into a softmax
// state. Scores q k_t and the sum of weighted values are register blocks whose rows are the query rows, so
// that each vector of K or V is loaded (and converted) once for up to 8 of them: decode is bound by reading
// the cache.
#include "kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/attend.cpp"
#include <hwy/foreach_target.h>

#include "kernels/gemm-inl.h"
#include "kernels/softmax-inl.h"

#if NARROWS_SIMD
HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {
namespace {

/// Query rows in registers at once. Groups of real models: 1, 3, 4, 6, 7, 8, 12, 16.
constexpr int kMaxRows = 8;

/// Vectors of columns beside MR rows: as many as the registers hold (see gemm-inl.h).
template <int MR>
constexpr int vectors_for_rows() {
  if (kBlockVectors == 4) return MR <= 6 ? 4 : 2;
  return MR <= 2 ? 4 : MR <= 6 ? 2 : 1;
}

template <int MR, int NV, bool kTail, class T>
HWY_INLINE void score_block(const float* q, int64_t head_dim, const T* k_t, int64_t ldk, int64_t n_tail,
                            float* score) {
  const DF d;
  VF acc[MR][NV];
  NARROWS_UNROLL
  for (int i = 0; i < MR; ++i) {
    NARROWS_UNROLL
    for (int j = 0; j < NV; ++j) acc[i][j] = hn::Zero(d);
  }
  block_product<MR, NV, kTail>(head_dim, q, head_dim, k_t, ldk, n_tail, acc);
  NARROWS_UNROLL
  for (int i = 0; i < MR; ++i) {
    NARROWS_UNROLL
    for (int j = 0; j < NV; ++j) {
      if (kTail && j == NV - 1) {  // columns that are not there are masked
        const auto there = hn::FirstN(d, static_cast<size_t>(n_tail));
        acc[i][j] = hn::IfThenElse(there, acc[i][j], hn::Set(d, kMinusInfinity));
      }
      hn::Store(acc[i][j], d, score + i * kTile + j * kLanes);
    }
  }
}

template <int MR, int NV, bool kTail, class T>
HWY_INLINE void value_block(const float* weight, int64_t n, const T* v, int64_t ldv, int64_t n_tail,
                            const float* keep, float* out, int64_t head_dim) {
  const DF d;
  VF acc[MR][NV];
  NARROWS_UNROLL
  for (int i = 0; i < MR; ++i) {
    const VF factor = hn::Set(d, keep[i]);
    NARROWS_UNROLL
    for (int j = 0; j < NV; ++j) {
      const float* from = out + i * head_dim + j * kLanes;
      const VF before = kTail && j == NV - 1 ? load_n(d, from, n_tail) : hn::LoadU(d, from);
      acc[i][j] = hn::Mul(before, factor);
    }
  }
  block_product<MR, NV, kTail>(n, weight, kTile, v, ldv, n_tail, acc);
  NARROWS_UNROLL
  for (int i = 0; i < MR; ++i) {
    NARROWS_UNROLL
    for (int j = 0; j < NV; ++j) {
      float* to = out + i * head_dim + j * kLanes;
      if (kTail && j == NV - 1) {
        store_n(acc[i][j], d, to, n_tail);
      } else {
        hn::StoreU(acc[i][j], d, to);
      }
    }
  }
}

template <int MR, class T>
HWY_NOINLINE void attend_rows(const float* q, int64_t head_dim, const T* k_t, int64_t ldk, const T* v,
                              int64_t ldv, int64_t n, const SoftmaxRows& state) {
  constexpr int NV = vectors_for_rows<MR>();
  constexpr int64_t kColumns = NV * kLanes;
  const DF d;
  HWY_ALIGN float score[MR * kTile];
  int64_t j = 0;
  for (; j + kColumns <= n; j += kColumns) {
    score_block<MR, NV, false>(q, head_dim, k_t + j, ldk, 0, score + j);
  }
  for (; j + kLanes <= n; j += kLanes) score_block<MR, 1, false>(q, head_dim, k_t + j, ldk, 0, score + j);
  if (j < n) {
    score_block<MR, 1, true>(q, head_dim, k_t + j, ldk, n - j, score + j);
    j += kLanes;
  }
  for (; j < kTile; j += kLanes) {
    for (int i = 0; i < MR; ++i) hn::Store(hn::Set(d, kMinusInfinity), d, score + i * kTile + j);
  }

  float keep[MR];
  for (int i = 0; i < MR; ++i) {
    VF sum = hn::Zero(d);
    keep[i] = softmax_step(score + i * kTile, state.max[i], sum);
    state.sum[i] = state.sum[i] * keep[i] + hn::GetLane(hn::SumOfLanes(d, sum));
  }

  int64_t c = 0;
  for (; c + kColumns <= head_dim; c += kColumns) {
    value_block<MR, NV, false>(score, n, v + c, ldv, 0, keep, state.out + c, head_dim);
  }
  for (; c + kLanes <= head_dim; c += kLanes) {
    value_block<MR, 1, false>(score, n, v + c, ldv, 0, keep, state.out + c, head_dim);
  }
  if (c < head_dim) {
    value_block<MR, 1, true>(score, n, v + c, ldv, head_dim - c, keep, state.out + c, head_dim);
  }
}

template <class T>
void attend(const float* q, int64_t n_row, int64_t head_dim, const T* k_t, int64_t ldk, const T* v,
            int64_t ldv, int64_t n, const SoftmaxRows& state) {
  if (n <= 0) return;
  static constexpr decltype(&attend_rows<1, T>) kByRows[kMaxRows] = {
      attend_rows<1, T>, attend_rows<2, T>, attend_rows<3, T>, attend_rows<4, T>,
      attend_rows<5, T>, attend_rows<6, T>, attend_rows<7, T>, attend_rows<8, T>};
  // Blocks of nearly equal size: 9 rows are 4 + 5, not 8 + 1, where one row would read the tile alone.
  const int64_t n_block = (n_row + kMaxRows - 1) / kMaxRows;
  int64_t row = 0;
  for (int64_t b = 0; b < n_block; ++b) {
    const int64_t rows = (n_row - row) / (n_block - b);
    const SoftmaxRows block = {state.max + row, state.sum + row, state.out + row * head_dim};
    kByRows[rows - 1](q + row * head_dim, head_dim, k_t, ldk, v, ldv, n, block);
    row += rows;
  }
}

}  // namespace

void attend_f32(const float* q, int64_t n_row, int64_t head_dim, const float* k_t, int64_t ldk,
                const float* v, int64_t ldv, int64_t n, const SoftmaxRows& state) {
  attend(q, n_row, head_dim, k_t, ldk, v, ldv, n, state);
}

void attend_f16(const float* q, int64_t n_row, int64_t head_dim, const f16_t* k_t, int64_t ldk,
                const f16_t* v, int64_t ldv, int64_t n, const SoftmaxRows& state) {
  attend(q, n_row, head_dim, k_t, ldk, v, ldv, n, state);
}

}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // NARROWS_SIMD
