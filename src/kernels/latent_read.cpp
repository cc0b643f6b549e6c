// fold_query, pool_candidates, count_above, keep_above, amplitudes, read_index: what a sparse step over
// latent pages does beside scoring and attending. A lane is a coordinate, but where candidates are told
// apart: there it is a token.
#include <algorithm>

#include "kernels/latent_page.h"
#include "kernels/ref/ref.h"
#include "kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/latent_read.cpp"
#include <hwy/foreach_target.h>

#include "kernels/simd-inl.h"

#if NARROWS_SIMD
HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {
namespace {

using VI = hn::Vec<DI>;

}  // namespace

void fold_query(const float* q, int64_t half, const float* basis, int64_t ldb, int64_t n, float* out,
                int64_t ldo) {
  const DF d;
  for (int64_t i = 0; i < half; ++i) {
    const float* a = basis + i * ldb;
    const float* b = basis + (half + i) * ldb;
    float* turned_cos = out + 2 * i * ldo;
    float* turned_sin = turned_cos + ldo;
    const VF x = hn::Set(d, q[i]), y = hn::Set(d, q[half + i]);
    int64_t c = 0;
    for (; c + kLanes <= n; c += kLanes) {
      const VF va = hn::LoadU(d, a + c), vb = hn::LoadU(d, b + c);
      hn::StoreU(hn::MulAdd(va, x, hn::Mul(vb, y)), d, turned_cos + c);
      hn::StoreU(hn::MulSub(va, y, hn::Mul(vb, x)), d, turned_sin + c);
    }
    if (c < n) {
      const VF va = load_n(d, a + c, n - c), vb = load_n(d, b + c, n - c);
      store_n(hn::MulAdd(va, x, hn::Mul(vb, y)), d, turned_cos + c, n - c);
      store_n(hn::MulSub(va, y, hn::Mul(vb, x)), d, turned_sin + c, n - c);
    }
  }
}

int64_t pool_candidates(const float* p, int64_t ldp, int64_t n_row, const float* weight, int64_t n,
                        float floor, int32_t first, int32_t* index, float* value) {
  const DF d;
  const DI di;
  const VF least = hn::Set(d, floor);
  const VI lane = hn::Iota(di, 0);
  int64_t count = 0;
  for (int64_t t = 0; t < n; t += kLanes) {
    const int64_t left = n - t < kLanes ? n - t : kLanes;
    VF pooled = hn::Zero(d);
    for (int64_t r = 0; r < n_row; ++r)
      pooled = hn::MulAdd(hn::Set(d, weight[r]), load_n(d, p + r * ldp + t, left), pooled);
    auto wanted = hn::Ge(pooled, least);
    if (left < kLanes) wanted = hn::And(wanted, hn::FirstN(d, static_cast<size_t>(left)));
    if (hn::AllFalse(d, wanted)) continue;
    // Compressed in a register, then stored whole: compressing into memory is microcode on Zen 4. There is
    // room for a whole vector unless this is a last, short one.
    const VF values = hn::Compress(pooled, wanted);
    const VI indices =
        hn::Compress(hn::Add(lane, hn::Set(di, first + static_cast<int32_t>(t))), hn::RebindMask(di, wanted));
    const auto m = static_cast<int64_t>(hn::CountTrue(d, wanted));
    if (left == kLanes) {
      hn::StoreU(values, d, value + count);
      hn::StoreU(indices, di, index + count);
    } else {
      HWY_ALIGN float few_values[kLanes];
      HWY_ALIGN int32_t few_indices[kLanes];
      hn::Store(values, d, few_values);
      hn::Store(indices, di, few_indices);
      std::copy_n(few_values, m, value + count);
      std::copy_n(few_indices, m, index + count);
    }
    count += m;
  }
  return count;
}

void count_above(const float* value, int64_t n, float floor, int64_t* count, double* sum) {
  const DF d;
  const DI di;
  const VF least = hn::Set(d, floor);
  VF total = hn::Zero(d);
  VI number = hn::Zero(di);
  int64_t i = 0;
  const auto add = [&](VF x, hn::Mask<DF> wanted) {
    total = hn::Add(total, hn::IfThenElseZero(wanted, x));
    number = hn::Sub(number, hn::VecFromMask(di, hn::RebindMask(di, wanted)));
  };
  for (; i + kLanes <= n; i += kLanes) {
    const VF x = hn::LoadU(d, value + i);
    add(x, hn::Ge(x, least));
  }
  if (i < n) {
    const VF x = load_n(d, value + i, n - i);
    add(x, hn::And(hn::Ge(x, least), hn::FirstN(d, static_cast<size_t>(n - i))));
  }
  *count = hn::GetLane(hn::SumOfLanes(di, number));
  *sum = static_cast<double>(hn::GetLane(hn::SumOfLanes(d, total)));
}

int64_t keep_above(const int32_t* index, const float* value, int64_t n, float floor, int64_t n_equal,
                   int32_t* selected) {
  const DF d;
  const DI di;
  const VF least = hn::Set(d, floor);
  int64_t count = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const VF x = hn::LoadU(d, value + i);
    auto wanted = hn::Gt(x, least);
    const auto equal = hn::Eq(x, least);
    if (n_equal > 0 && !hn::AllFalse(d, equal)) {
      // Seldom: lane by lane.
      HWY_ALIGN float lane[kLanes];
      hn::Store(x, d, lane);
      for (int64_t j = 0; j < kLanes; ++j) {
        if (lane[j] > floor || (lane[j] == floor && n_equal-- > 0)) selected[count++] = index[i + j];
      }
      continue;
    }
    if (hn::AllFalse(d, wanted)) continue;
    // Whole vectors: what is written beyond the count is not yet read, even if selected is index.
    hn::StoreU(hn::Compress(hn::LoadU(di, index + i), hn::RebindMask(di, wanted)), di, selected + count);
    count += static_cast<int64_t>(hn::CountTrue(d, wanted));
  }
  for (; i < n; ++i) {
    if (value[i] > floor || (value[i] == floor && n_equal-- > 0)) selected[count++] = index[i];
  }
  return count;
}

void amplitudes(const uint8_t* scales, int64_t n, float* amplitude) {
  const DF d;
  const DI di;
  const hn::Rebind<uint8_t, DF> db;
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
  const VF roots = hn::LoadU(d, kAmplitude.data() + kScaleBias);  // of which the first 8 are looked at
#endif
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    const VI s = hn::PromoteTo(di, hn::LoadU(db, scales + c));
    // 2^(s / 8 - 16): the whole part by the exponent's field, the eighths by a table of the first octave.
    const VI eighth = hn::And(s, hn::Set(di, 7));
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX3_DL
    // Lanes of a register: a gather takes as long as 16 loads.
    const VF root = hn::TableLookupLanes(roots, hn::IndicesFromVec(d, eighth));
#else
    const VF root = hn::GatherIndex(d, kAmplitude.data() + kScaleBias, eighth);
#endif
    const VI octave = hn::Sub(hn::ShiftRight<3>(s), hn::Set(di, kScaleBias / 8));
    hn::StoreU(hn::BitCast(d, hn::Add(hn::BitCast(di, root), hn::ShiftLeft<23>(octave))), d, amplitude + c);
  }
  for (; c < n; ++c) amplitude[c] = kAmplitude[scales[c]];
}

void read_index(const uint8_t* codes, int64_t token, int64_t n_coord, const float* step, const float* centre,
                const float* amplitude, float* z) {
  const DF d;
  const DI di;
  const hn::Rebind<uint8_t, DF> db;
  const uint8_t* four = codes + token * 4;
  int64_t c = 0;
  for (; c + kLanes <= n_coord; c += kLanes) {
    HWY_ALIGN uint8_t code[kLanes];
    for (int64_t i = 0; i < kLanes; i += 4) std::memcpy(code + i, four + (c + i) * kTile, 4);
    const VF x = hn::ConvertTo(d, hn::PromoteTo(di, hn::Load(db, code)));
    const VF unit = hn::Mul(hn::LoadU(d, step + c), hn::LoadU(d, amplitude + c));
    hn::StoreU(hn::Mul(hn::Sub(x, hn::LoadU(d, centre + c)), unit), d, z + c);
  }
  for (; c < n_coord; ++c) {
    const auto code = static_cast<float>(four[c / 4 * 4 * kTile + c % 4]);
    z[c] = (code - centre[c]) * (step[c] * amplitude[c]);
  }
}

}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // NARROWS_SIMD
