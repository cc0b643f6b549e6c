// A 64-bit checksum of a stream of bytes, for files that are read back: it finds every kind of damage that
// disks and copies do, it keeps nobody from forging one. Four lanes of multiply and shift, 8 bytes each, so
// that it runs at the speed of memory.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace narrows {

class Checksum {
 public:
  void add(const void* bytes, size_t n);
  /// Of all bytes so far.
  uint64_t value() const;

 private:
  static constexpr size_t kBlock = 32;

  void take(const unsigned char* block);

  std::array<uint64_t, 4> lanes_ = {0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
                                    0x27D4EB2F165667C5};
  std::array<unsigned char, kBlock> held_{};  ///< bytes that do not make a block yet
  uint64_t size_ = 0;
};

}  // namespace narrows
