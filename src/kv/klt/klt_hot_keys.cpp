// Both lists, what is wanted and what is held, are in order of tokens, so a step is a merge of them; nothing
// is allocated but in reserve().
#include "kv/klt/klt_hot_keys.h"

#include <algorithm>
#include <array>

namespace narrows {

void KltHotKeys::reserve(int64_t n) {
  if (n <= capacity_) return;
  const auto size = static_cast<size_t>(n);
  held_.reserve(size);
  buffer_.reserve(size);
  free_.reserve(size);
  key_.reserve(size * static_cast<size_t>(head_dim_));  // not the double of what was there
  key_.resize(size * static_cast<size_t>(head_dim_));
  for (int64_t slot = n - 1; slot >= capacity_; --slot) free_.push_back(static_cast<int32_t>(slot));
  capacity_ = n;
}

int64_t KltHotKeys::hold(std::span<const int32_t> tokens, int32_t* slot, int32_t* missing) {
  ++clock_;
  const auto n = static_cast<int64_t>(tokens.size());
  int64_t n_missing = 0;
  int64_t i = 0;
  for (Held& held : held_) {
    while (i < n && tokens[static_cast<size_t>(i)] < held.token)
      missing[n_missing++] = static_cast<int32_t>(i++);
    if (i == n) break;
    if (tokens[static_cast<size_t>(i)] != held.token) continue;
    slot[i++] = held.slot;
    held.used = clock_;
  }
  for (; i < n; ++i) missing[n_missing++] = static_cast<int32_t>(i);
  if (n_missing == 0) return 0;

  make_room(n_missing);
  buffer_.clear();
  auto old = held_.begin();
  for (int64_t m = 0; m < n_missing; ++m) {
    const int32_t token = tokens[static_cast<size_t>(missing[m])];
    slot[missing[m]] = free_.back();
    free_.pop_back();
    while (old != held_.end() && old->token < token) buffer_.push_back(*old++);
    buffer_.push_back({token, slot[missing[m]], clock_});
  }
  buffer_.insert(buffer_.end(), old, held_.end());
  held_.swap(buffer_);
  return n_missing;
}

void KltHotKeys::make_room(int64_t n_missing) {
  int64_t n_leaving = n_missing - static_cast<int64_t>(free_.size());
  if (n_leaving <= 0) return;
  const auto age = [this](const Held& held) { return std::min(clock_ - held.used, kOldest); };
  std::array<int64_t, kOldest + 1> count = {};
  for (const Held& held : held_) ++count[age(held)];
  uint32_t last = kOldest;  // all older ones leave, and of this age as many as are still due
  while (count[last] < n_leaving) n_leaving -= count[last--];
  auto kept = held_.begin();
  for (const Held& held : held_) {
    if (age(held) > last || (age(held) == last && n_leaving-- > 0)) {
      free_.push_back(held.slot);
    } else {
      *kept++ = held;
    }
  }
  held_.erase(kept, held_.end());
}

void KltHotKeys::clear() { *this = KltHotKeys(head_dim_); }

int64_t KltHotKeys::bytes() const {
  return static_cast<int64_t>(key_.capacity() * sizeof(kernels::f16_t) +
                              (held_.capacity() + buffer_.capacity()) * sizeof(Held) +
                              free_.capacity() * sizeof(int32_t));
}

}  // namespace narrows
