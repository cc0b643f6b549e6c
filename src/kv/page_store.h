// Pages of one size, each its own 64-byte aligned allocation: exact blocks and encoded pages. A page is
// filled with 0xFF when it is made (as f16 or f32: NaN), so whoever reads room that was never written sees it
// at once. Stores may share pages: own() before writing. Serial but for reading. Pages count themselves in
// the memory ledger, each once however many stores share it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "base/aligned.h"
#include "base/memory_ledger.h"
#include "kv/snapshot.h"

namespace narrows {

class PageStore {
 public:
  explicit PageStore(int64_t page_bytes) : page_bytes_(page_bytes) {}

  /// Only while there are no pages.
  void set_page_bytes(int64_t bytes) { page_bytes_ = bytes; }
  int64_t page_bytes() const { return page_bytes_; }
  int64_t n_page() const { return static_cast<int64_t>(pages_.size()); }
  int64_t bytes() const { return n_page() * page_bytes_; }
  /// For writing: the page belongs to this store alone.
  std::byte* page(int64_t i) { return pages_[static_cast<size_t>(i)].data; }
  const std::byte* page(int64_t i) const { return pages_[static_cast<size_t>(i)].data; }

  /// At least n pages; false if there is no memory, then nothing has changed.
  bool grow_to(int64_t n) {
    const int64_t before = n_page();
    try {
      while (n_page() < n) {
        pages_.push_back(make_page());
        std::memset(pages_.back().data, 0xFF, static_cast<size_t>(page_bytes_));
      }
    } catch (const std::bad_alloc&) {
      shrink_to(before);
      return false;
    }
    return true;
  }

  /// Makes page i this store's own, by a copy if others share it; false if there is no memory.
  bool own(int64_t i) {
    Page& page = pages_[static_cast<size_t>(i)];
    if (page.hold.use_count() == 1) return true;
    try {
      Page copy = make_page();
      std::memcpy(copy.data, page.data, static_cast<size_t>(page_bytes_));
      page = std::move(copy);
    } catch (const std::bad_alloc&) {
      return false;
    }
    return true;
  }

  /// The first n pages of another store of this page size, in place of those held; throws std::bad_alloc.
  void share(const PageStore& from, int64_t n) {
    std::vector<Page> pages(from.pages_.begin(), from.pages_.begin() + n);
    pages_.swap(pages);
    page_bytes_ = from.page_bytes_;
  }

  void save(SnapshotWriter& out) const {
    for (const Page& page : pages_) out.bytes(page.data, static_cast<size_t>(page_bytes_));
  }
  /// n pages in place of those held; false if there is no memory, or with the reader failed if the bytes end.
  bool load(SnapshotReader& in, int64_t n) {
    clear();
    if (n == 0) return true;
    // Pages that the bytes do not hold are not allocated either.
    if (page_bytes_ <= 0 || n > static_cast<int64_t>(in.left()) / page_bytes_) in.fail();
    if (!in.ok() || !grow_to(n)) return false;
    for (const Page& page : pages_)
      std::memcpy(page.data, in.take(static_cast<uint64_t>(page_bytes_)), static_cast<size_t>(page_bytes_));
    return true;
  }

  void shrink_to(int64_t n) {
    if (n < n_page()) pages_.resize(static_cast<size_t>(n));
  }
  void pop_front(int64_t n) { pages_.erase(pages_.begin(), pages_.begin() + n); }
  void clear() { std::vector<Page>().swap(pages_); }

 private:
  struct Memory {
    explicit Memory(int64_t n) : bytes(n) { MemoryLedger::process().count(MemoryUse::cache, bytes.size()); }
    ~Memory() { MemoryLedger::process().count(MemoryUse::cache, -bytes.size()); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    AlignedArray<std::byte> bytes;
  };
  struct Page {
    std::shared_ptr<Memory> hold;
    std::byte* data = nullptr;
  };

  Page make_page() const {
    Page page{std::make_shared<Memory>(page_bytes_), nullptr};
    if (!page.hold->bytes.ok()) throw std::bad_alloc();
    page.data = page.hold->bytes.data();
    return page;
  }

  int64_t page_bytes_;
  std::vector<Page> pages_;
};

}  // namespace narrows
