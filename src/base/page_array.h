// Bytes in pages of 2 MB where the system has such: weights are read from one end to the other for every
// token, and with pages of 4 KB the CPU spends a good part of that on translating addresses.
#pragma once

#include <cstdint>
#include <memory>

namespace narrows {

class PageArray {
 public:
  PageArray() = default;
  /// ok() is false if the system gives no memory. Not initialised, 64-byte aligned.
  explicit PageArray(int64_t bytes);

  bool ok() const { return data_ != nullptr; }
  uint8_t* data() { return data_.get(); }
  const uint8_t* data() const { return data_.get(); }
  int64_t size() const { return size_; }

 private:
  struct Free {
    void operator()(uint8_t* p) const;
  };
  std::unique_ptr<uint8_t, Free> data_;
  int64_t size_ = 0;
};

}  // namespace narrows
