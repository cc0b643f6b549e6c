// Both lists, what is wanted and what is held, are in order of tokens, so a step is a merge of them; nothing
// is allocated but in reserve().
#include "cache/klt_hot_keys.h"

#include <algorithm>

namespace narrows {

void KltHotKeys::reserve(int64_t n) {
  const int64_t before = capacity();
  if (n <= before) return;
  const auto size = static_cast<size_t>(n);
  order_.reserve(size);
  free_.reserve(size);
  buffer_.reserve(size);
  used_.reserve(size);
  token_.reserve(size);
  key_.reserve(size * static_cast<size_t>(head_dim_));  // not the double of what was there
  key_.resize(size * static_cast<size_t>(head_dim_));
  token_.resize(size);
  used_.resize(size);
  for (int64_t slot = n - 1; slot >= before; --slot) free_.push_back(static_cast<int32_t>(slot));
}

int64_t KltHotKeys::hold(std::span<const int32_t> tokens, int32_t* slot, int32_t* missing) {
  ++clock_;
  const auto n = static_cast<int64_t>(tokens.size());
  int64_t n_missing = 0;
  int64_t i = 0;
  for (const int32_t s : order_) {
    const int32_t held = token_[static_cast<size_t>(s)];
    while (i < n && tokens[static_cast<size_t>(i)] < held) missing[n_missing++] = static_cast<int32_t>(i++);
    if (i == n) break;
    if (tokens[static_cast<size_t>(i)] != held) continue;
    slot[i++] = s;
    used_[static_cast<size_t>(s)] = clock_;
  }
  for (; i < n; ++i) missing[n_missing++] = static_cast<int32_t>(i);
  if (n_missing == 0) return 0;

  make_room(n_missing);
  buffer_.clear();
  auto old = order_.begin();
  for (int64_t m = 0; m < n_missing; ++m) {
    const int32_t token = tokens[static_cast<size_t>(missing[m])];
    const int32_t s = free_.back();
    free_.pop_back();
    slot[missing[m]] = s;
    token_[static_cast<size_t>(s)] = token;
    used_[static_cast<size_t>(s)] = clock_;
    while (old != order_.end() && token_[static_cast<size_t>(*old)] < token) buffer_.push_back(*old++);
    buffer_.push_back(s);
  }
  buffer_.insert(buffer_.end(), old, order_.end());
  order_.swap(buffer_);
  return n_missing;
}

void KltHotKeys::make_room(int64_t n_missing) {
  const int64_t n_leaving = n_missing - static_cast<int64_t>(free_.size());
  if (n_leaving <= 0) return;
  const auto age = [this](int32_t s) { return clock_ - used_[static_cast<size_t>(s)]; };
  buffer_.clear();
  for (const int32_t s : order_) {
    if (age(s) > 0) buffer_.push_back(s);
  }
  // Ties go by token, so that what leaves does not depend on how the list happened to be arranged.
  const auto leaves_first = [&](int32_t a, int32_t b) {
    return age(a) != age(b) ? age(a) > age(b)
                            : token_[static_cast<size_t>(a)] < token_[static_cast<size_t>(b)];
  };
  std::nth_element(buffer_.begin(), buffer_.begin() + n_leaving - 1, buffer_.end(), leaves_first);
  const int32_t last = buffer_[static_cast<size_t>(n_leaving - 1)];
  const auto leaves = [&](int32_t s) { return age(s) > 0 && !leaves_first(last, s); };
  auto kept = order_.begin();
  for (const int32_t s : order_) {
    if (leaves(s)) {
      free_.push_back(s);
    } else {
      *kept++ = s;
    }
  }
  order_.erase(kept, order_.end());
}

void KltHotKeys::clear() {
  free_.insert(free_.end(), order_.begin(), order_.end());
  order_.clear();
}

int64_t KltHotKeys::bytes() const {
  const size_t words =
      token_.capacity() + used_.capacity() + order_.capacity() + free_.capacity() + buffer_.capacity();
  return static_cast<int64_t>(key_.capacity() * sizeof(kernels::f16_t) + words * sizeof(int32_t));
}

}  // namespace narrows
