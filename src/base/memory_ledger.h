// What the process's memory has been promised to: weights, caches, what steps and prompts work in, session
// files. Memory that was asked for is not taken until it is written to, so that what the system calls free
// says nothing about the promises of a minute ago; here each is counted once, and work that would not fit
// beside them is refused before it begins.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <mutex>

namespace narrows {

enum class MemoryUse { weights, cache, scratch, prompt, file };
inline constexpr size_t kMemoryUses = 5;

/// What the system says, bytes.
struct MachineMemory {
  int64_t available = 0;  ///< that it can still give; 0: unknown, then nothing is refused for it
  int64_t resident = -1;  ///< that the process holds, without what is only mapped from files; -1: unknown
};

/// Thread-safe. A claim that fits beside all others is taken, any other is not.
class MemoryLedger {
 public:
  /// That of this process, which all its models and sessions share.
  static MemoryLedger& process();
  /// For tests: another machine.
  explicit MemoryLedger(std::function<MachineMemory()> machine) : machine_(std::move(machine)) {}

  /// Most bytes of all claims together; 0: as many as the machine has.
  void set_limit(int64_t bytes);
  int64_t limit() const;

  int64_t bytes(MemoryUse use) const;
  int64_t bytes() const;
  /// Bytes that may still be claimed, at least 0: what is left of the limit and of what the system has,
  /// less what was promised and has not been written to yet. INT64_MAX if nobody knows.
  int64_t free_bytes() const;

  /// Adds `bytes` if they fit, or are less than none.
  bool claim(MemoryUse use, int64_t bytes);
  /// Adds what exists whether or not it fits. Throws nothing.
  void count(MemoryUse use, int64_t bytes) noexcept;

 private:
  int64_t free_now() const;

  std::function<MachineMemory()> machine_;
  mutable std::mutex mutex_;
  int64_t limit_ = 0;
  std::array<int64_t, kMemoryUses> bytes_{};
};

/// A promise of the process's ledger, given back when it goes.
class MemoryClaim {
 public:
  explicit MemoryClaim(MemoryUse use, MemoryLedger& ledger = MemoryLedger::process())
      : ledger_(&ledger), use_(use) {}
  MemoryClaim(MemoryClaim&& other) noexcept : ledger_(other.ledger_), use_(other.use_), bytes_(other.bytes_) {
    other.bytes_ = 0;
  }
  MemoryClaim& operator=(MemoryClaim&& other) noexcept;
  ~MemoryClaim() { ledger_->count(use_, -bytes_); }

  /// False, and as it was, if there is no room for what it lacks.
  bool resize(int64_t bytes);
  int64_t bytes() const { return bytes_; }

 private:
  MemoryLedger* ledger_;
  MemoryUse use_;
  int64_t bytes_ = 0;
};

}  // namespace narrows
