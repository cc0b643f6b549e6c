#include "base/checksum.h"

#include <algorithm>
#include <cstring>

namespace narrows {

namespace {

/// Odd, with bits spread evenly: multiplication by it loses nothing and carries every bit upwards.
constexpr uint64_t kMultiplier = 0xD6E8FEB86659FD93;

/// Every bit of x changes half of the result's.
uint64_t mixed(uint64_t x) {
  for (int round = 0; round < 2; ++round) {
    x ^= x >> 32;
    x *= kMultiplier;
  }
  return x ^ x >> 32;
}

}  // namespace

void Checksum::take(const unsigned char* block) {
  for (size_t i = 0; i < lanes_.size(); ++i) {
    uint64_t word = 0;
    std::memcpy(&word, block + 8 * i, sizeof(word));
    // The shift brings upper bits down again: without it two flips a block apart can cancel.
    const uint64_t x = (lanes_[i] ^ word) * kMultiplier;
    lanes_[i] = x ^ x >> 29;
  }
}

void Checksum::add(const void* bytes, size_t n) {
  if (n == 0) return;  // of an empty vector, whose data() may be null
  const auto* from = static_cast<const unsigned char*>(bytes);
  size_t filled = size_ % kBlock;
  size_ += n;
  if (filled > 0) {
    const size_t m = std::min(n, kBlock - filled);
    std::memcpy(held_.data() + filled, from, m);
    from += m;
    n -= m;
    filled += m;
    if (filled < kBlock) return;
    take(held_.data());
  }
  for (; n >= kBlock; from += kBlock, n -= kBlock) take(from);
  if (n > 0) std::memcpy(held_.data(), from, n);
}

uint64_t Checksum::value() const {
  uint64_t x = mixed(size_);
  for (const uint64_t lane : lanes_) x = mixed(x ^ lane);
  for (size_t i = 0; i < size_ % kBlock; ++i) x = mixed(x ^ held_[i]);
  return x;
}

}  // namespace narrows
