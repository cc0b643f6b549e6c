// Gated DeltaNet: the short convolution, one token of the delta rule, and many at once. Of many, with G the
// sum of log decays up to a token and S the state before them, what token t adds to the state is k_t (x) D_t,
//
//   D_t = beta_t (v_t - exp(G_t) S^T k_t - sum over s < t of exp(G_t - G_s) (k_t k_s) D_s)
//
// a triangular system whose every other part is a product of matrices (the WY form of arXiv:2406.06484 with
// the decays of 2412.06464); outputs and the new state are products with D. The system is solved by rows, not
// by an inverse: as many multiplications, and no rounding of the inverse.
#include "kernels/delta_net.h"

#include <cmath>

#include "kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/delta_net.cpp"
#include <hwy/foreach_target.h>

#include "kernels/gemm-inl.h"

#if NARROWS_SIMD
HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {

namespace {

/// Rows that are asked for before they are used.
inline constexpr uintptr_t kAhead = 10;

/// Columns [0, NV vectors), the last of them n_tail lanes, of a convolution that sees four rows, as all
/// released models have it: three of them stay in registers.
template <int NV, bool kTail>
HWY_INLINE void conv_columns(const float* x, int64_t ldx, const float* before, int64_t ldb, const float* w,
                             int64_t ldw, int64_t n, int64_t n_tail, float* y, int64_t ldy) {
  const DF d;
  const auto load = [&](const float* p, int j) {
    return kTail && j == NV - 1 ? load_n(d, p + j * kLanes, n_tail) : hn::LoadU(d, p + j * kLanes);
  };
  VF w0[NV], w1[NV], w2[NV], w3[NV], a[NV], b[NV], c[NV];
  NARROWS_UNROLL
  for (int j = 0; j < NV; ++j) {
    w0[j] = load(w, j);
    w1[j] = load(w + ldw, j);
    w2[j] = load(w + 2 * ldw, j);
    w3[j] = load(w + 3 * ldw, j);
    a[j] = load(before, j);
    b[j] = load(before + ldb, j);
    c[j] = load(before + 2 * ldb, j);
  }
  for (int64_t r = 0; r < n; ++r) {
    // Rows lie pages apart, which no prefetcher of a CPU follows. Beyond the last one it does no harm.
    const auto ahead =
        reinterpret_cast<uintptr_t>(x + r * ldx) + kAhead * static_cast<uintptr_t>(ldx) * sizeof(float);
    for (uintptr_t line = 0; line < NV * kLanes * sizeof(float); line += 64)
      __builtin_prefetch(reinterpret_cast<const void*>(ahead + line));
    NARROWS_UNROLL
    for (int j = 0; j < NV; ++j) {
      const VF own = load(x + r * ldx, j);
      VF sum = hn::Mul(w0[j], a[j]);
      sum = hn::MulAdd(w1[j], b[j], sum);
      sum = hn::MulAdd(w2[j], c[j], sum);
      sum = hn::MulAdd(w3[j], own, sum);
      a[j] = b[j];
      b[j] = c[j];
      c[j] = own;
      const VF result = hn::Mul(sum, sigmoid(sum));
      float* to = y + r * ldy + j * kLanes;
      if (kTail && j == NV - 1) {
        store_n(result, d, to, n_tail);
      } else {
        hn::StoreU(result, d, to);
      }
    }
  }
}

}  // namespace

void conv_silu(const float* x, int64_t ldx, const float* before, int64_t ldb, const float* w, int64_t ldw,
               int64_t n_conv, int64_t n, int64_t n_channel, float* y, int64_t ldy) {
  const DF d;
  int64_t c = 0;
  if (n_conv == 4) {
    for (; c + kBlockColumns <= n_channel; c += kBlockColumns)
      conv_columns<kBlockVectors, false>(x + c, ldx, before + c, ldb, w + c, ldw, n, 0, y + c, ldy);
    for (; c < n_channel; c += kLanes) {
      const int64_t left = n_channel - c < kLanes ? n_channel - c : kLanes;
      conv_columns<1, true>(x + c, ldx, before + c, ldb, w + c, ldw, n, left, y + c, ldy);
    }
    return;
  }
  for (; c < n_channel; c += kLanes) {
    const int64_t left = n_channel - c < kLanes ? n_channel - c : kLanes;
    for (int64_t r = 0; r < n; ++r) {
      VF sum = hn::Zero(d);
      for (int64_t j = 0; j < n_conv; ++j) {
        const int64_t row = r + 1 + j - n_conv;
        const float* from = row >= 0 ? x + row * ldx : before + (n_conv - 1 + row) * ldb;
        sum = hn::MulAdd(load_n(d, w + j * ldw + c, left), load_n(d, from + c, left), sum);
      }
      store_n(hn::Mul(sum, sigmoid(sum)), d, y + r * ldy + c, left);
    }
  }
}

namespace {

HWY_INLINE float dot(const float* a, const float* b, int64_t n) {
  const DF d;
  VF sum[2] = {hn::Zero(d), hn::Zero(d)};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    sum[0] = hn::MulAdd(hn::LoadU(d, a + i), hn::LoadU(d, b + i), sum[0]);
    sum[1] = hn::MulAdd(hn::LoadU(d, a + i + kLanes), hn::LoadU(d, b + i + kLanes), sum[1]);
  }
  for (; i < n; i += kLanes) {
    const int64_t left = n - i < kLanes ? n - i : kLanes;
    sum[0] = hn::MulAdd(load_n(d, a + i, left), load_n(d, b + i, left), sum[0]);
  }
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(sum[0], sum[1])));
}

/// y = factor x; y may be x.
HWY_INLINE void scale_row(const float* x, float factor, int64_t n, float* y) {
  const DF d;
  const VF f = hn::Set(d, factor);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i < kLanes ? n - i : kLanes;
    store_n(hn::Mul(load_n(d, x + i, left), f), d, y + i, left);
  }
}

/// y += factor x.
HWY_INLINE void add_row(const float* x, float factor, int64_t n, float* y) {
  const DF d;
  const VF f = hn::Set(d, factor);
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i < kLanes ? n - i : kLanes;
    store_n(hn::MulAdd(load_n(d, x + i, left), f, load_n(d, y + i, left)), d, y + i, left);
  }
}

/// Columns of a state that a token of delta_step() works on at once.
inline constexpr int kStepVectors = 4;

/// Columns [0, NV vectors) of s from s on, the last of them n_tail lanes.
template <int NV, bool kTail>
HWY_INLINE void step_columns(const float* q, const float* k, const float* v, float decay, float beta,
                             float kq, int64_t head_dim, int64_t n_tail, float* s, float* out) {
  const DF d;
  const auto load = [&](const float* p, int j) {
    return kTail && j == NV - 1 ? load_n(d, p + j * kLanes, n_tail) : hn::LoadU(d, p + j * kLanes);
  };
  const auto store = [&](VF x, float* p, int j) {
    if (kTail && j == NV - 1) {
      store_n(x, d, p + j * kLanes, n_tail);
    } else {
      hn::StoreU(x, d, p + j * kLanes);
    }
  };
  VF known[NV], asked[NV];
  NARROWS_UNROLL
  for (int j = 0; j < NV; ++j) known[j] = asked[j] = hn::Zero(d);
  for (int64_t i = 0; i < head_dim; ++i) {
    const VF ki = hn::Set(d, k[i]), qi = hn::Set(d, q[i]);
    NARROWS_UNROLL
    for (int j = 0; j < NV; ++j) {
      const VF x = load(s + i * head_dim, j);
      known[j] = hn::MulAdd(ki, x, known[j]);
      asked[j] = hn::MulAdd(qi, x, asked[j]);
    }
  }
  const VF g = hn::Set(d, decay);
  VF delta[NV];
  NARROWS_UNROLL
  for (int j = 0; j < NV; ++j) {
    delta[j] = hn::Mul(hn::Set(d, beta), hn::NegMulAdd(g, known[j], load(v, j)));
    store(hn::MulAdd(g, asked[j], hn::Mul(hn::Set(d, kq), delta[j])), out, j);
  }
  for (int64_t i = 0; i < head_dim; ++i) {
    const VF ki = hn::Set(d, k[i]);
    NARROWS_UNROLL
    for (int j = 0; j < NV; ++j) {
      float* at = s + i * head_dim;
      store(hn::MulAdd(ki, delta[j], hn::Mul(g, load(at, j))), at, j);
    }
  }
}

}  // namespace

void l2_norm(const float* x, int64_t n, float eps, float scale, float* y) {
  scale_row(x, scale / std::sqrt(dot(x, x, n) + eps), n, y);
}

void delta_step(const float* q, const float* k, const float* v, float decay, float beta, int64_t head_dim,
                float* s, float* out) {
  const float kq = dot(k, q, head_dim);
  int64_t c = 0;
  for (; c + kStepVectors * kLanes <= head_dim; c += kStepVectors * kLanes)
    step_columns<kStepVectors, false>(q, k, v + c, decay, beta, kq, head_dim, 0, s + c, out + c);
  for (; c < head_dim; c += kLanes) {
    const int64_t left = head_dim - c < kLanes ? head_dim - c : kLanes;
    step_columns<1, true>(q, k, v + c, decay, beta, kq, head_dim, left, s + c, out + c);
  }
}

namespace {

/// Rows of the triangular system that are solved one by one; what rows before them give is a product.
inline constexpr int64_t kSolveRows = kBlockRows;

/// x [n, ldx] *= exp(sum[t] - sum[s]) factor[t] for s < t + diagonal, 0 for the other s < n. factor null: 1.
HWY_INLINE void decay_below(const float* sum, const float* factor, int64_t n, int64_t diagonal, float* x) {
  const DF d;
  for (int64_t t = 0; t < n; ++t) {
    const int64_t end = t + diagonal;
    const VF at = hn::Set(d, sum[t]), f = hn::Set(d, factor != nullptr ? factor[t] : 1.0F);
    float* row = x + t * n;
    for (int64_t s = 0; s < n; s += kLanes) {
      const int64_t left = n - s < kLanes ? n - s : kLanes;
      if (s >= end) {
        store_n(hn::Zero(d), d, row + s, left);
        continue;
      }
      const int64_t inside = end - s < left ? end - s : left;
      const VF weight = hn::Mul(f, exp_nonpositive(d, hn::Sub(at, load_n(d, sum + s, inside))));
      store_n(hn::IfThenElseZero(hn::FirstN(d, static_cast<size_t>(inside)),
                                 hn::Mul(load_n(d, row + s, left), weight)),
              d, row + s, left);
    }
  }
}

HWY_INLINE void transpose(const float* x, int64_t n, int64_t m, float* y) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) y[j * n + i] = x[i * m + j];
  }
}

}  // namespace

void delta_rows(const float* kq, const float* v, const float* log_decay, const float* beta, int64_t n,
                int64_t head_dim, float* s, float* out, int64_t ldo, float* work) {
  if (n == 0) return;
  const int64_t dim = head_dim;
  float* const seen = work;                 // [2 n, dim] kq S
  float* const delta = seen + 2 * n * dim;  // [n, dim]
  float* const k_t = delta + n * dim;       // [dim, n]
  float* const among = k_t + n * dim;       // [2 n, n] kq k^T, then what of it counts
  float* const sum = among + 2 * n * n;     // [n] log decay since the tile began
  float* const keep = sum + n;              // [n] exp of that
  float* const minus_beta = keep + n;       // [n]
  float all = 0;
  for (int64_t t = 0; t < n; ++t) {
    sum[t] = all += log_decay[t];
    keep[t] = std::exp(all);
    minus_beta[t] = -beta[t];
  }
  transpose(kq, n, dim, k_t);
  product(2 * n, dim, dim, kq, dim, s, dim, seen, dim, false);
  product(2 * n, n, dim, kq, dim, k_t, n, among, n, false);
  decay_below(sum, minus_beta, n, 0, among);
  float* const weight = among + n * n;
  decay_below(sum, nullptr, n, 1, weight);
  for (int64_t t = 0; t < n; ++t) {
    scale_row(v + t * dim, beta[t], dim, delta + t * dim);
    add_row(seen + t * dim, minus_beta[t] * keep[t], dim, delta + t * dim);
  }
  for (int64_t first = 0; first < n; first += kSolveRows) {
    const int64_t end = first + kSolveRows < n ? first + kSolveRows : n;
    product(end - first, dim, first, among + first * n, n, delta, dim, delta + first * dim, dim, true);
    for (int64_t t = first; t < end; ++t) {
      for (int64_t r = first; r < t; ++r) add_row(delta + r * dim, among[t * n + r], dim, delta + t * dim);
      scale_row(seen + (n + t) * dim, keep[t], dim, out + t * ldo);
    }
    product(end - first, dim, end, weight + first * n, n, delta, dim, out + first * ldo, ldo, true);
  }
  for (int64_t t = 0; t < n; ++t) scale_row(delta + t * dim, std::exp(all - sum[t]), dim, delta + t * dim);
  scale_row(s, keep[n - 1], dim * dim, s);
  product(dim, dim, n, k_t, n, delta, dim, s, dim, true);
}

}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // NARROWS_SIMD
