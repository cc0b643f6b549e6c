// Writes and reads one part of a klt page. Encoding: centre, weigh, transform, quantise, pack; reading:
// planes to latents, latents through the inverse transform.
#include "kv/klt/klt_page.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/bf16.h"

namespace narrows {

using kernels::kOctet;
using kernels::ops;
using kernels::pad_latent;

namespace {

/// Bits k, 8 + k, .. 56 + k of eight bytes as one byte: bit i is that of byte i.
uint8_t gather_bit(uint64_t bytes, int k) {
  return static_cast<uint8_t>(((bytes >> k & 0x0101010101010101ULL) * 0x0102040810204080ULL) >> 56);
}

uint64_t eight_bytes(const uint8_t* p) {
  uint64_t x = 0;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

}  // namespace

int64_t heads_of_part(int64_t n_head_kv, int64_t head_dim) {
  int64_t heads = n_head_kv;
  while (heads > 1 && (n_head_kv % heads != 0 || heads * head_dim > kMaxTransform)) --heads;
  return heads;
}

KltScratch::KltScratch(int64_t width)
    : codes(pad_latent(width) * kPageTokens),
      key_amplitude(pad_latent(width) + kernels::kLatentPad),
      value_amplitude(key_amplitude.size()),
      key(kPageTokens * key_amplitude.size()),
      value(key.size()),
      ld(key_amplitude.size()) {
  // Padding is multiplied by nothing, but must not be NaN.
  for (int64_t i = 0; i < key.size(); ++i) key[i] = value[i] = 0;
  for (int64_t i = 0; i < key_amplitude.size(); ++i) key_amplitude[i] = value_amplitude[i] = 0;
}

KltPart::KltPart(int64_t first_channel, KltTransform key, KltTransform value, int64_t n_index,
                 int64_t page_offset)
    : first_channel_(first_channel), key_(std::move(key)), value_(std::move(value)) {
  layout_.offset = page_offset;
  layout_.n_key = key_.n_coord;
  layout_.n_value = value_.n_coord;
  layout_.n_index = std::min(n_index / kOctet * kOctet, layout_.n_key);
  const int64_t index_octets = layout_.n_index / kOctet;
  for (int64_t o = 0; o < index_octets; ++o)
    layout_.index_bytes += key_.octet_bits[static_cast<size_t>(o)] * kOctet * kPageTokens / 8;
  layout_.rest = kernels::make_plane_row(key_.octet_bits.data() + index_octets,
                                         (layout_.n_key - layout_.n_index) / kOctet);
  layout_.value = kernels::make_plane_row(value_.octet_bits.data(), layout_.n_value / kOctet);
  std::vector<float> decode(key_.decode.size());
  ops().f16_to_f32(key_.decode.data(), decode.data(), static_cast<int64_t>(decode.size()));
  key_pairs_.resize(static_cast<size_t>(key_.n_coord / 2 * width()));
  ops().pack_bf16(decode.data(), width(), key_.n_coord, width(), key_pairs_.data(), width());
  std::vector<kernels::f16_t>().swap(key_.decode);
  decode = decode_of_pairs();
  score_basis_.resize(static_cast<size_t>(width() * ld_score()));
  for (int64_t i = 0; i < width(); ++i) {
    float* row = score_basis_.data() + i * ld_score();
    for (int64_t c = 0; c < layout_.n_index; ++c) row[c] = decode[static_cast<size_t>(c * width() + i)];
    row[layout_.n_index] = key_.mean[static_cast<size_t>(i)];
  }
  for (int64_t c = 0; c < layout_.n_index; ++c) {
    const int bits = key_.octet_bits[static_cast<size_t>(c / kOctet)];
    const int scored = std::min(bits, kernels::kScoreBits);
    score_step_.push_back(std::ldexp(1.0F, 2 - scored));
    score_centre_.push_back(std::ldexp(1.0F, scored - 1) - 0.5F);
    full_step_.push_back(std::ldexp(1.0F, 2 - bits));
    full_centre_.push_back(std::ldexp(1.0F, bits - 1) - 0.5F);
  }
}

std::vector<float> KltPart::decode_of_pairs() const {
  std::vector<float> decode(static_cast<size_t>(key_.n_coord * width()));
  for (int64_t c = 0; c < key_.n_coord; ++c) {
    const uint32_t* words = key_pairs_.data() + c / 2 * width();
    float* row = decode.data() + c * width();
    const int shift = c % 2 == 0 ? 0 : 16;
    for (int64_t i = 0; i < width(); ++i)
      row[i] = kernels::bf16_to_float(static_cast<uint16_t>(words[i] >> shift));
  }
  return decode;
}

KltTransform KltPart::key_transform() const {
  // Rounding to bfloat16 may have left the range of halves, by less than it takes to come back.
  constexpr float kLargestHalf = 65504.0F;
  std::vector<float> decode = decode_of_pairs();
  for (float& x : decode) x = std::clamp(x, -kLargestHalf, kLargestHalf);
  KltTransform whole = key_;
  whole.decode.resize(decode.size());
  ops().f32_to_f16(decode.data(), whole.decode.data(), static_cast<int64_t>(decode.size()));
  return whole;
}

int64_t KltPart::bytes() const {
  const size_t floats = score_step_.capacity() + score_centre_.capacity() + full_step_.capacity() +
                        full_centre_.capacity() + score_basis_.capacity();
  return key_.bytes() + value_.bytes() +
         static_cast<int64_t>(floats * sizeof(float) + key_pairs_.capacity() * sizeof(uint32_t));
}

// --- writing

std::vector<float> make_project(const KltTransform& t, int64_t ldz) {
  // decode^T, then times the weight, block by block.
  std::vector<float> project(static_cast<size_t>(t.width * ldz), 0.0F);
  std::vector<float> turned(project.size(), 0.0F);
  std::vector<float> row(static_cast<size_t>(t.width));
  for (int64_t c = 0; c < t.n_coord; ++c) {
    ops().f16_to_f32(t.decode.data() + c * t.width, row.data(), t.width);
    for (int64_t i = 0; i < t.width; ++i)
      turned[static_cast<size_t>(i * ldz + c)] = row[static_cast<size_t>(i)] * t.weight_unit;
  }
  std::vector<float> weight(t.weight.size());
  ops().f16_to_f32(t.weight.data(), weight.data(), static_cast<int64_t>(weight.size()));
  for (int64_t b = 0; b < t.width; b += t.block) {
    ops().gemm(t.block, ldz, t.block, weight.data() + b * t.block, t.block, turned.data() + b * ldz, ldz,
               project.data() + b * ldz, ldz, false);
  }
  return project;
}

KltEncoder::Forward::Forward(KltTransform of, int64_t ldz)
    : transform(std::move(of)), project(make_project(transform, ldz)) {}

KltEncoder::KltEncoder(const KltPart& part)
    : part_(part),
      ldz_(std::max(pad_latent(part.key_.n_coord), pad_latent(part.value_.n_coord))),
      key_(part.key_transform(), ldz_),
      value_(part.value_, ldz_),
      centred_(static_cast<size_t>(kPageTokens * part.width())),
      z_(static_cast<size_t>(kPageTokens * ldz_)),
      codes_(z_.size()),
      scales_(static_cast<size_t>(ldz_)) {}

bool KltEncoder::quantise(const Forward& forward, const float* x, int64_t ld, AnchorBits anchors,
                          uint8_t* scales) {
  const KltTransform& t = forward.transform;
  for (int64_t i = 0; i < kPageTokens; ++i) {
    const bool anchor = (anchors >> i & 1) != 0;
    for (int64_t c = 0; c < t.width; ++c)
      centred_[static_cast<size_t>(i * t.width + c)] =
          anchor ? 0.0F : x[i * ld + c] - t.mean[static_cast<size_t>(c)];
  }
  ops().gemm(kPageTokens, ldz_, t.width, centred_.data(), t.width, forward.project.data(), ldz_, z_.data(),
             ldz_, false);
  if (!ops().quant_latents(z_.data(), ldz_, t.n_coord, t.octet_bits.data(), scales_.data(), codes_.data(),
                           ldz_))
    return false;
  std::memcpy(scales, scales_.data(), static_cast<size_t>(t.n_coord));
  return true;
}

bool KltEncoder::encode(const float* k, const float* v, int64_t ld, AnchorBits anchors, std::byte* page) {
  auto* const bytes = reinterpret_cast<uint8_t*>(page);
  const KltLayout& layout = part_.layout_;
  const int64_t channel = part_.first_channel_;
  if (!quantise(key_, k + channel, ld, anchors, bytes + layout.scale_offset())) return false;
  write_index(bytes + layout.index_offset());
  write_rows(part_.key_.octet_bits.data(), layout.rest, layout.n_index / kOctet,
             bytes + layout.rest_offset());
  if (!quantise(value_, v + channel, ld, anchors, bytes + layout.scale_offset() + layout.n_key)) return false;
  write_rows(part_.value_.octet_bits.data(), layout.value, 0, bytes + layout.value_offset());
  return true;
}

void KltEncoder::write_rows(const uint8_t* octet_bits, const kernels::PlaneRow& shape, int64_t first_octet,
                            uint8_t* rows) const {
  for (int64_t t = 0; t < kPageTokens; ++t) {
    uint8_t* row = rows + t * shape.bytes;
    for (int64_t o = 0; o < shape.n_octet; ++o) {
      const uint64_t eight = eight_bytes(codes_.data() + t * ldz_ + (first_octet + o) * kOctet);
      const int bits = octet_bits[first_octet + o];
      for (int j = 0; j < bits; ++j)
        row[shape.offset[static_cast<size_t>(j)] + o] = gather_bit(eight, bits - 1 - j);
    }
  }
}

void KltEncoder::write_index(uint8_t* planes) const {
  for (int64_t c = 0; c < part_.layout_.n_index; ++c) {
    uint8_t column[kPageTokens];
    for (int64_t t = 0; t < kPageTokens; ++t)
      column[kernels::index_slot(t)] = codes_[static_cast<size_t>(t * ldz_ + c)];
    const int bits = part_.key_.octet_bits[static_cast<size_t>(c / kOctet)];
    for (int j = 0; j < bits; ++j) {
      for (int64_t i = 0; i < kPageTokens / 8; ++i)
        *planes++ = gather_bit(eight_bytes(column + 8 * i), bits - 1 - j);
    }
  }
}

// --- reading

void KltPart::value_amplitudes(const std::byte* page, float* amplitude) const {
  ops().amplitudes(value_scales(page), layout_.n_value, amplitude);
}

void KltPart::read_keys(const std::byte* page, const int32_t* slots, int64_t n, int64_t row,
                        KltScratch& scratch) const {
  const kernels::Ops& op = ops();
  op.amplitudes(key_scales(page), layout_.n_key, scratch.key_amplitude.data());
  if (layout_.n_index > 0) {
    op.expand_index(index(page), key_.octet_bits.data(), layout_.n_index / kOctet, kernels::kMaxBits,
                    scratch.codes.data());
  }
  for (int64_t i = 0; i < n; ++i) {
    float* z = scratch.key.data() + (row + i) * scratch.ld;
    op.read_index(scratch.codes.data(), slots[i], layout_.n_index, full_step_.data(), full_centre_.data(),
                  scratch.key_amplitude.data(), z);
    op.unpack_planes(rest_row(page, slots[i]), layout_.rest, scratch.key_amplitude.data() + layout_.n_index,
                     z + layout_.n_index);
  }
}

void KltPart::read_rows(const std::byte* page, const int32_t* slots, int64_t n, int64_t row,
                        KltScratch& scratch) const {
  read_keys(page, slots, n, row, scratch);
  value_amplitudes(page, scratch.value_amplitude.data());
  for (int64_t i = 0; i < n; ++i) {
    ops().unpack_planes(value_row(page, slots[i]), layout_.value, scratch.value_amplitude.data(),
                        scratch.value.data() + (row + i) * scratch.ld);
  }
}

void KltPart::rebuild_keys(const float* latent, int64_t ld, int64_t n, int64_t channel, int64_t count,
                           float* k, int64_t ldk) const {
  for (int64_t i = 0; i < n; ++i) std::copy_n(key_.mean.data() + channel, count, k + i * ldk);
  ops().gemm_bf16(n, count, key_.n_coord, latent, ld, key_pairs_.data() + channel, width(), k, ldk, true);
}

void KltPart::rebuild_values(const float* latent, int64_t ld, int64_t n, float* v, int64_t ldv) const {
  for (int64_t i = 0; i < n; ++i) std::copy(value_.mean.begin(), value_.mean.end(), v + i * ldv);
  ops().gemm_f16(n, width(), value_.n_coord, latent, ld, value_.decode.data(), width(), v, ldv, true);
}

void KltPart::rebuild_value(const float* latent, float weight, int64_t channel, int64_t count,
                            float* v) const {
  for (int64_t c = 0; c < count; ++c) v[c] += weight * value_.mean[static_cast<size_t>(channel + c)];
  ops().gemm_f16(1, count, value_.n_coord, latent, value_.n_coord, value_.decode.data() + channel,
                 value_.width, v, count, true);
}

}  // namespace narrows
