#include "server/prefix_store.h"

#include <algorithm>
#include <iterator>

namespace narrows::server {

void PrefixStore::put(Held held) {
  if (held.session == nullptr) return;
  const int64_t n = held.session->kept_prefix(static_cast<int64_t>(held.tokens.size()));
  if (n == 0) return;
  held.session->keep_prefix(n);  // the rest would be computed again anyhow
  held.tokens.resize(static_cast<size_t>(n));
  // Layers that see a window or are recurrent go back to some places alone.
  const auto covers = [](const Held& a, const Held& b) {
    const auto n_b = static_cast<int64_t>(b.tokens.size());
    return a.session->profile().name == b.session->profile().name &&
           common_prefix(a.tokens, b.tokens) == n_b && a.session->kept_prefix(n_b) == n_b;
  };
  for (auto it = entries_.begin(); it != entries_.end(); ++it) {
    if (!covers(*it, held)) continue;
    entries_.splice(entries_.begin(), entries_, it);
    return;
  }
  entries_.remove_if([&](const Held& other) { return covers(held, other); });
  entries_.push_front(std::move(held));
  evict(bytes() - max_bytes_);
}

const Held* PrefixStore::best(std::span<const Token> prompt, const KvProfile& profile, int64_t& n) {
  n = 0;
  auto found = entries_.end();
  for (auto it = entries_.begin(); it != entries_.end(); ++it) {
    const int64_t usable = it->usable(prompt, profile);
    if (usable <= n) continue;
    n = usable;
    found = it;
  }
  if (found == entries_.end()) return nullptr;
  entries_.splice(entries_.begin(), entries_, found);
  return &entries_.front();
}

int64_t PrefixStore::evict(int64_t bytes) {
  int64_t freed = 0;
  while (freed < bytes && !entries_.empty()) {
    freed += entries_.back().session->cache_stats().bytes;
    entries_.pop_back();
  }
  return freed;
}

int64_t PrefixStore::bytes() const {
  int64_t n = 0;
  for (const Held& held : entries_) n += held.session->cache_stats().bytes;
  return n;
}

}  // namespace narrows::server
