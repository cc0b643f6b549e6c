// quant_latents, unpack_planes: latent numbers to codes and scales, planes back to numbers; a lane a
// coordinate.
#include "kernels/latent_page.h"
#include "kernels/ref/ref.h"
#include "kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/latent.cpp"
#include <hwy/foreach_target.h>

#include "kernels/simd-inl.h"

#if NARROWS_SIMD
HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {
namespace {

using VI = hn::Vec<DI>;

/// Largest scale with amplitude <= x for each lane, as if the table had no ends; see ref/latent_page.cpp.
HWY_INLINE VI floor_scale(VF x) {
  const DF d;
  const DI di;
  const VI bits = hn::BitCast(di, x);
  const VI exponent = hn::Sub(hn::ShiftRight<23>(bits), hn::Set(di, 127));
  // Mantissas of 2^(1/8) .. 2^(7/8), as floats in [1, 2).
  const VF mantissa = hn::BitCast(d, hn::Or(hn::And(bits, hn::Set(di, 0x007FFFFF)), hn::Set(di, 0x3F800000)));
  VI eighth = hn::Zero(di);
  NARROWS_UNROLL
  for (size_t i = 1; i < 8; ++i) {
    const auto reached = hn::Ge(mantissa, hn::Set(d, kAmplitude[kScaleBias + i]));
    eighth = hn::Sub(eighth, hn::VecFromMask(di, hn::RebindMask(di, reached)));
  }
  return hn::Add(hn::Add(hn::ShiftLeft<3>(exponent), eighth), hn::Set(di, kScaleBias));
}

/// What quantising a vector of coordinates with one choice of scales needs.
struct Quantiser {
  VF step;
  VF half_levels;
  VF top_code;

  /// Codes, not yet integers.
  HWY_INLINE VF codes(VF z) const {
    const DF d;
    const VF code = hn::Add(hn::Floor(hn::Div(z, step)), half_levels);
    return hn::Min(hn::Max(code, hn::Zero(d)), top_code);
  }
  HWY_INLINE VF value(VF code) const {
    const DF d;
    return hn::Mul(hn::Add(hn::Sub(code, half_levels), hn::Set(d, 0.5F)), step);
  }
};

HWY_INLINE VF amplitude_of(VI scale) {
  const DF d;
  return hn::GatherIndex(d, kAmplitude.data(), scale);
}

/// Coordinates [c, c + n) of a vector; the others are padding. False if a number cannot be stored.
HWY_INLINE bool quant_vector(const float* z, int64_t ldz, int64_t n, VI bits, uint8_t* scales, uint8_t* codes,
                             int64_t ldc) {
  const DF d;
  const DI di;
  const hn::Rebind<uint8_t, DF> db;
  VF top = hn::Zero(d);
  auto finite = hn::Eq(top, top);
  const VF limit = hn::Set(d, std::numeric_limits<float>::max());
  for (int64_t t = 0; t < kTile; ++t) {
    const VF size = hn::Abs(hn::LoadU(d, z + t * ldz));
    finite = hn::And(finite, hn::Le(size, limit));
    top = hn::Max(top, size);
  }
  const auto held = hn::FirstN(d, static_cast<size_t>(n));
  finite = hn::Or(finite, hn::Not(held));
  top = hn::IfThenElseZero(held, top);
  const auto tiny = hn::Lt(top, hn::Set(d, kAmplitude[0]));
  const VI first =
      hn::IfThenElse(hn::RebindMask(di, tiny), hn::Zero(di), hn::Sub(floor_scale(top), hn::Set(di, 8)));
  const auto in_table = hn::Lt(first, hn::Set(di, 256 - kScaleSteps[0]));
  if (!hn::AllTrue(d, finite) || !hn::AllTrue(di, in_table)) return false;

  // 2^exponent, by the exponent field.
  const auto power = [&](VI exponent) {
    return hn::BitCast(d, hn::ShiftLeft<23>(hn::Add(exponent, hn::Set(di, 127))));
  };
  const VF levels = power(bits);
  const VF per_amplitude = power(hn::Sub(hn::Set(di, 2), bits));
  Quantiser q;
  q.half_levels = hn::Mul(levels, hn::Set(d, 0.5F));
  q.top_code = hn::Sub(levels, hn::Set(d, 1.0F));
  VF least = hn::Set(d, std::numeric_limits<float>::infinity());
  VI best = hn::Zero(di);
  for (const int offset : kScaleSteps) {
    const VI scale = hn::Max(hn::Add(first, hn::Set(di, offset)), hn::Zero(di));
    q.step = hn::Mul(amplitude_of(scale), per_amplitude);
    VF error = hn::Zero(d);
    for (int64_t t = 0; t < kTile; ++t) {
      const VF x = hn::LoadU(d, z + t * ldz);
      const VF off = hn::Sub(x, q.value(q.codes(x)));
      error = hn::MulAdd(off, off, error);
    }
    const auto better = hn::Lt(error, least);
    least = hn::IfThenElse(better, error, least);
    best = hn::IfThenElse(hn::RebindMask(di, better), scale, best);
  }
  hn::StoreU(hn::DemoteTo(db, best), db, scales);
  q.step = hn::Mul(amplitude_of(best), per_amplitude);
  for (int64_t t = 0; t < kTile; ++t) {
    const VF code = q.codes(hn::LoadU(d, z + t * ldz));
    hn::StoreU(hn::DemoteTo(db, hn::ConvertTo(di, code)), db, codes + t * ldc);
  }
  return true;
}

}  // namespace

bool quant_latents(const float* z, int64_t ldz, int64_t n_coord, const uint8_t* octet_bits, uint8_t* scales,
                   uint8_t* codes, int64_t ldc) {
  const DI di;
  HWY_ALIGN int32_t bits[kLatentPad];
  HWY_ALIGN uint8_t scale[kLatentPad];
  for (int64_t c = 0; c < n_coord; c += kLatentPad) {
    for (int64_t i = 0; i < kLatentPad; ++i) bits[i] = octet_bits[(c + i) / kOctet];
    for (int64_t i = 0; i < kLatentPad; i += kLanes) {
      if (c + i >= n_coord) break;
      if (!quant_vector(z + c + i, ldz, n_coord - c - i, hn::Load(di, bits + i), scale + i, codes + c + i,
                        ldc))
        return false;
    }
    std::memcpy(scales + c, scale, static_cast<size_t>(n_coord - c < kLatentPad ? n_coord - c : kLatentPad));
  }
  return true;
}

void unpack_planes(const uint8_t* row, const PlaneRow& shape, const float* amplitude, float* z) {
  if constexpr (kLanes < kOctet) {
    ref::unpack_planes(row, shape, amplitude, z);
  } else {
    constexpr int64_t kOctets = kLanes / kOctet;  // a vector holds 1 or 2 octets
    const DF d;
    const auto first_octet = hn::FirstN(d, kOctet);
    for (int64_t o = 0; o < shape.n_octet; o += kOctets) {
      VF part = hn::LoadU(d, amplitude + o * kOctet);
      VF value = hn::Zero(d);
      for (size_t j = 0; j < static_cast<size_t>(shape.n_plane) && shape.octets[j] > o; ++j) {
        const bool whole = shape.octets[j] - o >= kOctets;
        uint16_t bits = row[shape.offset[j] + o];
        if (kOctets == 2 && whole) std::memcpy(&bits, row + shape.offset[j] + o, sizeof(bits));
        const VF signed_part = hn::IfThenElse(mask_from_bits(d, bits), part, hn::Neg(part));
        value = hn::Add(value, whole ? signed_part : hn::IfThenElseZero(first_octet, signed_part));
        part = hn::Mul(part, hn::Set(d, 0.5F));
      }
      hn::StoreU(value, d, z + o * kOctet);
    }
  }
}

}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // NARROWS_SIMD
