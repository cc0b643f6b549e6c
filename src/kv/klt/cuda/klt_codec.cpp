#include "kv/klt/cuda/klt_codec.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

namespace narrows {

using kernels::kOctet;

namespace {

/// Sections, and rows of planes.
constexpr int64_t kSection = 16, kRow = 8;
/// Coordinates of keys: the kernels multiply by so many at a time.
constexpr int64_t kKeyUnit = 16;

narrows_cuda_planes planes_of(const kernels::PlaneRow& row, int64_t& at) {
  narrows_cuda_planes p{};
  p.at = static_cast<int32_t>(at);
  p.stride = static_cast<int32_t>(round_up(row.bytes, kRow));
  p.n_plane = row.n_plane;
  p.n_octet = row.n_octet;
  std::copy(row.octets.begin(), row.octets.end(), p.octets);
  std::copy(row.offset.begin(), row.offset.end(), p.offset);
  at = round_up(at + kPageTokens * p.stride, kSection);
  return p;
}

/// Bit i of byte k: bit k of byte i.
uint64_t turn_bits(uint64_t x) {
  uint64_t t = (x ^ (x >> 7)) & 0x00AA00AA00AA00AAULL;
  x ^= t ^ (t << 7);
  t = (x ^ (x >> 14)) & 0x0000CCCC0000CCCCULL;
  x ^= t ^ (t << 14);
  t = (x ^ (x >> 28)) & 0x00000000F0F0F0F0ULL;
  return x ^ t ^ (t << 28);
}

/// The token whose bit is at each place of a plane of the CPU's index.
std::array<int, kPageTokens> make_token_of_slot() {
  std::array<int, kPageTokens> token{};
  for (int t = 0; t < kPageTokens; ++t) token[static_cast<size_t>(kernels::index_slot(t))] = t;
  return token;
}

/// An octet's planes of 64 tokens, a coordinate after the other, into the tokens' rows.
void turn_index(const KltPart& part, const uint8_t* from, const narrows_cuda_planes& planes, uint8_t* rows) {
  static const std::array<int, kPageTokens> kTokenOfSlot = make_token_of_slot();
  for (int64_t o = 0; o < part.layout().n_index / kOctet; ++o) {
    const int bits = part.key().octet_bits[static_cast<size_t>(o)];
    for (int j = 0; j < bits; ++j) {
      for (int64_t eight = 0; eight < kPageTokens / 8; ++eight) {
        uint64_t x = 0;
        for (int64_t c = 0; c < kOctet; ++c)
          x |= static_cast<uint64_t>(from[(c * bits + j) * (kPageTokens / 8) + eight]) << 8 * c;
        x = turn_bits(x);
        for (int64_t k = 0; k < 8; ++k, x >>= 8)
          rows[kTokenOfSlot[static_cast<size_t>(8 * eight + k)] * planes.stride + planes.offset[j] + o] =
              static_cast<uint8_t>(x);
      }
    }
    from += static_cast<int64_t>(bits) * kOctet * (kPageTokens / 8);
  }
}

/// The other way round.
void turn_index_back(const KltPart& part, const uint8_t* rows, const narrows_cuda_planes& planes,
                     uint8_t* to) {
  static const std::array<int, kPageTokens> kTokenOfSlot = make_token_of_slot();
  for (int64_t o = 0; o < part.layout().n_index / kOctet; ++o) {
    const int bits = part.key().octet_bits[static_cast<size_t>(o)];
    for (int j = 0; j < bits; ++j) {
      for (int64_t eight = 0; eight < kPageTokens / 8; ++eight) {
        uint64_t x = 0;
        for (int64_t k = 0; k < 8; ++k)
          x |= static_cast<uint64_t>(rows[kTokenOfSlot[static_cast<size_t>(8 * eight + k)] * planes.stride +
                                          planes.offset[j] + o])
               << 8 * k;
        x = turn_bits(x);
        for (int64_t c = 0; c < kOctet; ++c, x >>= 8)
          to[(c * bits + j) * (kPageTokens / 8) + eight] = static_cast<uint8_t>(x);
      }
    }
    to += static_cast<int64_t>(bits) * kOctet * (kPageTokens / 8);
  }
}

void copy_rows(const uint8_t* from, int64_t from_stride, int64_t bytes, uint8_t* to, int64_t to_stride) {
  for (int64_t t = 0; t < kPageTokens; ++t) std::copy_n(from + t * from_stride, bytes, to + t * to_stride);
}

}  // namespace

int64_t klt_device_page_bytes(const KvProfile& profile, const AttentionShape& shape) {
  const int64_t heads = heads_of_part(shape.n_head_kv, shape.head_dim), width = heads * shape.head_dim;
  const auto row = [width](double rate) {
    return round_up(static_cast<int64_t>(rate * static_cast<double>(width) / 8 + 1e-9), kRow);
  };
  // Rows of keys are in two sections; a coordinate without bits takes an octet of one bit all the same.
  const int64_t rows =
      std::max(row(profile.key_rate) + kRow, 2 * kRow) + std::max(row(profile.value_rate), kRow);
  return kSection + shape.n_head_kv / heads * (round_up(2 * width + kKeyUnit, kSection) + kPageTokens * rows);
}

bool KltCodec::lay_out() {
  int64_t at = kSection;
  for (const KltPart& from : *of_) {
    // Without coordinates that have bits: one octet whose transform is zero.
    const uint8_t one = 1;
    const uint8_t* key_bits = from.layout().n_key > 0 ? from.key().octet_bits.data() : &one;
    const uint8_t* value_bits = from.layout().n_value > 0 ? from.value().octet_bits.data() : &one;
    const int64_t n_key = std::max(from.layout().n_key, kOctet),
                  n_value = std::max(from.layout().n_value, kOctet);
    const int64_t n_index = std::max(from.layout().n_index, kOctet);
    narrows_cuda_klt_part part{};
    part.n_key = static_cast<int32_t>(round_up(n_key, kKeyUnit));
    part.n_value = static_cast<int32_t>(n_value);
    part.n_index = static_cast<int32_t>(n_index);
    part.key_scale_at = static_cast<int32_t>(at);
    part.value_scale_at = part.key_scale_at + part.n_key;
    at = round_up(part.value_scale_at + n_value, kSection);
    part.index = planes_of(kernels::make_plane_row(key_bits, n_index / kOctet), at);
    part.rest =
        planes_of(kernels::make_plane_row(key_bits + n_index / kOctet, (n_key - n_index) / kOctet), at);
    part.value = planes_of(kernels::make_plane_row(value_bits, n_value / kOctet), at);
    parts_.push_back(part);
  }
  return at <= page_bytes_;
}

Result<std::shared_ptr<const KltCodec>> KltCodec::make(Parts parts, int64_t page_bytes,
                                                       const std::shared_ptr<device::Device>& device,
                                                       device::Stream& stream) {
  std::shared_ptr<KltCodec> made(new KltCodec(std::move(parts), page_bytes));
  if (!made->lay_out()) return Status(StatusCode::internal, "a page of klt is larger than was reckoned");
  // One buffer: the descriptions, then all transforms, whose addresses they name.
  std::vector<std::byte> all(made->parts_.size() * sizeof(narrows_cuda_klt_part));
  const auto add = [&all](const void* data, size_t bytes, size_t padded) {
    const size_t begin = (all.size() + 255) / 256 * 256;
    all.resize(begin + std::max<size_t>(padded, 16));
    if (bytes > 0) std::memcpy(all.data() + begin, data, bytes);
    return begin;
  };
  std::vector<std::array<size_t, 4>> at;
  for (size_t i = 0; i < made->parts_.size(); ++i) {
    const KltPart& from = (*made->of_)[i];
    const narrows_cuda_klt_part& part = made->parts_[i];
    const auto width = static_cast<size_t>(from.width());
    const size_t floats = width * sizeof(float);
    at.push_back({add(from.key_pairs().data(), from.key_pairs().size() * sizeof(uint32_t),
                      static_cast<size_t>(part.n_key / 2) * width * sizeof(uint32_t)),
                  add(from.key().mean.data(), floats, floats),
                  add(from.value().decode.data(), from.value().decode.size() * sizeof(kernels::f16_t),
                      static_cast<size_t>(part.n_value) * width * sizeof(kernels::f16_t)),
                  add(from.value().mean.data(), floats, floats)});
  }
  const auto bytes = static_cast<int64_t>(all.size());
  Result<device::Buffer> there = device->allocate(bytes, "the transforms of a layer's cache");
  if (!there.ok()) return there.status();
  made->there_ = std::move(*there);
  char* base = made->there_.data<char>();
  for (size_t i = 0; i < made->parts_.size(); ++i) {
    narrows_cuda_klt_part& part = made->parts_[i];
    part.key_decode = reinterpret_cast<const uint32_t*>(base + at[i][0]);
    part.key_mean = reinterpret_cast<const float*>(base + at[i][1]);
    part.value_decode = base + at[i][2];
    part.value_mean = reinterpret_cast<const float*>(base + at[i][3]);
  }
  std::memcpy(all.data(), made->parts_.data(), made->parts_.size() * sizeof(narrows_cuda_klt_part));
  stream.upload(base, all.data(), bytes);
  stream.wait();
  if (Status s = stream.take_error(); !s.ok()) return s;
  return std::shared_ptr<const KltCodec>(std::move(made));
}

void KltCodec::convert(const std::byte* page, std::byte* to) const {
  std::memset(to, 0, static_cast<size_t>(page_bytes_));
  std::memcpy(to, page, sizeof(AnchorBits));
  auto* bytes = reinterpret_cast<uint8_t*>(to);
  for (size_t i = 0; i < parts_.size(); ++i) {
    const KltPart& from = (*of_)[i];
    const narrows_cuda_klt_part& part = parts_[i];
    const KltLayout& layout = from.layout();
    std::copy_n(from.key_scales(page), layout.n_key, bytes + part.key_scale_at);
    std::copy_n(from.value_scales(page), layout.n_value, bytes + part.value_scale_at);
    turn_index(from, from.index(page), part.index, bytes + part.index.at);
    copy_rows(from.rest_row(page, 0), layout.rest.bytes, layout.rest.bytes, bytes + part.rest.at,
              part.rest.stride);
    copy_rows(from.value_row(page, 0), layout.value.bytes, layout.value.bytes, bytes + part.value.at,
              part.value.stride);
  }
}

void KltCodec::restore(const std::byte* page, std::byte* to) const {
  std::memcpy(to, page, sizeof(AnchorBits));
  const auto* bytes = reinterpret_cast<const uint8_t*>(page);
  auto* out = reinterpret_cast<uint8_t*>(to);
  for (size_t i = 0; i < parts_.size(); ++i) {
    const KltPart& part = (*of_)[i];
    const narrows_cuda_klt_part& from = parts_[i];
    const KltLayout& layout = part.layout();
    std::copy_n(bytes + from.key_scale_at, layout.n_key, out + layout.scale_offset());
    std::copy_n(bytes + from.value_scale_at, layout.n_value, out + layout.scale_offset() + layout.n_key);
    turn_index_back(part, bytes + from.index.at, from.index, out + layout.index_offset());
    copy_rows(bytes + from.rest.at, from.rest.stride, layout.rest.bytes, out + layout.rest_offset(),
              layout.rest.bytes);
    copy_rows(bytes + from.value.at, from.value.stride, layout.value.bytes, out + layout.value_offset(),
              layout.value.bytes);
  }
}

Status KltForward::set(const KltCodec& codec, const std::shared_ptr<device::Device>& device,
                       device::Stream& stream) {
  constexpr int64_t kOctets = 32;  // of the widest part
  const auto n = std::ssize(*codec.of());
  const int64_t width = codec.of()->front().width();
  bits_at_ = 2 * n * width * width * int64_t{sizeof(float)};
  const int64_t all = bits_at_ + 2 * n * kOctets;
  if (Status s = device->grow(there_, all, "what encodes a prompt"); !s.ok()) return s;
  std::vector<uint8_t> bits(static_cast<size_t>(2 * n * kOctets), 0);
  char* to = there_.data<char>();
  for (int64_t i = 0; i < 2 * n; ++i, to += width * width * int64_t{sizeof(float)}) {
    const KltPart& part = (*codec.of())[static_cast<size_t>(i / 2)];
    const KltTransform of = i % 2 == 0 ? part.key_transform() : part.value();
    std::copy_n(of.octet_bits.begin(), of.n_coord / kOctet, bits.begin() + i * kOctets);
    const std::vector<float> project = make_project(of, width);
    stream.upload(to, project.data(), std::ssize(project) * int64_t{sizeof(float)});
  }
  stream.upload(to, bits.data(), std::ssize(bits));
  stream.wait();
  return stream.take_error();
}

}  // namespace narrows
