#include "base/memory_ledger.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "base/memory.h"

namespace narrows {

MemoryLedger& MemoryLedger::process() {
  // Never destroyed: what lives until the end of the process gives its bytes back to it.
  static auto* ledger = new MemoryLedger([] {
    return MachineMemory{available_memory_bytes(), anonymous_resident_bytes()};
  });
  return *ledger;
}

void MemoryLedger::set_limit(int64_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  limit_ = bytes;
}

int64_t MemoryLedger::limit() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return limit_;
}

int64_t MemoryLedger::bytes(MemoryUse use) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return bytes_[static_cast<size_t>(use)];
}

int64_t MemoryLedger::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::accumulate(bytes_.begin(), bytes_.end(), int64_t{0});
}

int64_t MemoryLedger::free_now() const {
  const int64_t promised = std::accumulate(bytes_.begin(), bytes_.end(), int64_t{0});
  int64_t free = INT64_MAX;
  if (const MachineMemory machine = machine_(); machine.available > 0) {
    const int64_t unwritten = machine.resident < 0 ? 0 : promised - machine.resident;
    free = machine.available - std::max<int64_t>(0, unwritten);
  }
  if (limit_ > 0) free = std::min(free, limit_ - promised);
  return std::max<int64_t>(0, free);
}

int64_t MemoryLedger::free_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return free_now();
}

bool MemoryLedger::claim(MemoryUse use, int64_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (bytes > 0 && bytes > free_now()) return false;
  bytes_[static_cast<size_t>(use)] += bytes;
  return true;
}

void MemoryLedger::count(MemoryUse use, int64_t bytes) noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  bytes_[static_cast<size_t>(use)] += bytes;
}

MemoryClaim& MemoryClaim::operator=(MemoryClaim&& other) noexcept {
  std::swap(ledger_, other.ledger_);
  std::swap(use_, other.use_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

bool MemoryClaim::resize(int64_t bytes) {
  if (!ledger_->claim(use_, bytes - bytes_)) return false;
  bytes_ = bytes;
  return true;
}

}  // namespace narrows
