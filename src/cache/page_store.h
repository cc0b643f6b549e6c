// Pages of one size, each its own 64-byte aligned allocation: exact blocks and encoded pages. A page is
// filled with 0xFF when it is made (as f16 or f32: NaN), so whoever reads room that was never written sees it
// at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "base/aligned.h"

namespace narrows {

class PageStore {
 public:
  explicit PageStore(int64_t page_bytes) : page_bytes_(page_bytes) {}

  /// Only while there are no pages.
  void set_page_bytes(int64_t bytes) { page_bytes_ = bytes; }
  int64_t n_page() const { return static_cast<int64_t>(pages_.size()); }
  int64_t bytes() const { return n_page() * page_bytes_; }
  std::byte* page(int64_t i) { return pages_[static_cast<size_t>(i)].data(); }
  const std::byte* page(int64_t i) const { return pages_[static_cast<size_t>(i)].data(); }

  /// At least n pages; false if there is no memory, then nothing has changed.
  bool grow_to(int64_t n) {
    const int64_t before = n_page();
    try {
      while (n_page() < n) {
        AlignedArray<std::byte> page(page_bytes_);
        if (!page.ok()) throw std::bad_alloc();
        std::memset(page.data(), 0xFF, static_cast<size_t>(page_bytes_));
        pages_.push_back(std::move(page));
      }
    } catch (const std::bad_alloc&) {
      shrink_to(before);
      return false;
    }
    return true;
  }

  void shrink_to(int64_t n) {
    if (n < n_page()) pages_.resize(static_cast<size_t>(n));
  }
  void pop_front(int64_t n) { pages_.erase(pages_.begin(), pages_.begin() + n); }
  void clear() { std::vector<AlignedArray<std::byte>>().swap(pages_); }

 private:
  int64_t page_bytes_;
  std::vector<AlignedArray<std::byte>> pages_;
};

}  // namespace narrows
