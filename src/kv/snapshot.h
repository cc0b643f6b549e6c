// Writing a cache as bytes and reading it back. The reader treats its bytes as hostile: it gives what is
// there or fails, and once it has failed it stays so. Numbers as the machine has them (the file says which
// order).
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "base/checksum.h"

namespace narrows {

class SnapshotWriter {
 public:
  /// Errors of the file are for whoever closes it to find.
  explicit SnapshotWriter(std::FILE* file) : file_(file) {}

  void bytes(const void* data, size_t n) {
    if (n == 0) return;
    sum_.add(data, n);
    size_ += n;
    (void)std::fwrite(data, 1, n, file_);
  }
  template <class T>
  void number(T x) {
    static_assert(std::is_arithmetic_v<T>);
    bytes(&x, sizeof(x));
  }
  template <class T>
  void array(const std::vector<T>& x) {
    static_assert(std::is_arithmetic_v<T>);
    number(static_cast<uint64_t>(x.size()));
    bytes(x.data(), x.size() * sizeof(T));
  }
  void text(std::string_view x) {
    number(static_cast<uint64_t>(x.size()));
    bytes(x.data(), x.size());
  }
  uint64_t checksum() const { return sum_.value(); }
  uint64_t size() const { return size_; }

 private:
  std::FILE* file_;
  Checksum sum_;
  uint64_t size_ = 0;
};

class SnapshotReader {
 public:
  explicit SnapshotReader(std::string_view bytes) : rest_(bytes) {}

  bool ok() const { return ok_; }
  size_t left() const { return rest_.size(); }
  void fail() {
    ok_ = false;
    rest_ = {};
  }

  /// The next n bytes; null after a failure or if there are fewer.
  const char* take(uint64_t n) {
    if (n > rest_.size()) {
      fail();
      return nullptr;
    }
    const char* at = rest_.data();
    rest_.remove_prefix(static_cast<size_t>(n));
    return ok_ ? at : nullptr;
  }
  template <class T>
  T number() {
    T x{};
    if (const char* at = take(sizeof(T))) std::memcpy(&x, at, sizeof(T));
    return x;
  }
  /// A number from low to high, else a failure and low.
  int64_t count(int64_t low, int64_t high) {
    const auto x = number<int64_t>();
    if (ok_ && x >= low && x <= high) return x;
    fail();
    return low;
  }
  /// Exactly n items; a failure and nothing if the file says otherwise.
  template <class T>
  std::vector<T> array(uint64_t n) {
    const auto held = number<uint64_t>();
    if (held != n || n > rest_.size() / sizeof(T)) fail();
    std::vector<T> x;
    const char* at = ok_ ? take(n * sizeof(T)) : nullptr;
    if (at == nullptr) return x;
    x.resize(static_cast<size_t>(n));
    if (n > 0) std::memcpy(x.data(), at, x.size() * sizeof(T));
    return x;
  }
  std::string text(size_t most) {
    const auto n = number<uint64_t>();
    if (n > most) fail();
    const char* at = ok_ ? take(n) : nullptr;
    return at != nullptr ? std::string(at, static_cast<size_t>(n)) : std::string();
  }

 private:
  std::string_view rest_;
  bool ok_ = true;
};

}  // namespace narrows
