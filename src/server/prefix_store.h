// Sessions that no slot works on, kept for prompts that begin as they do: bounded in bytes, the one that was
// used longest ago leaves first. Only the engine thread touches it.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <span>

#include "server/slot.h"

namespace narrows::server {

class PrefixStore {
 public:
  explicit PrefixStore(int64_t max_bytes) : max_bytes_(max_bytes) {}

  /// Keeps what of it can be used again: nothing if that is nothing, or if another one holds all of it.
  void put(Held held);

  /// The one that can give most to the prompt, and how much; null if none can. It stays.
  const Held* best(std::span<const Token> prompt, const KvProfile& profile, int64_t& n);

  /// Lets the oldest go until `bytes` fewer are held, or none is left; bytes that were freed.
  int64_t evict(int64_t bytes);
  void clear() { entries_.clear(); }

  int64_t bytes() const;
  int64_t size() const { return static_cast<int64_t>(entries_.size()); }

 private:
  int64_t max_bytes_;
  std::list<Held> entries_;  ///< last used first
};

}  // namespace narrows::server
