// What every entry of the C API goes through: the border for exceptions, the last error of a thread, missing
// arguments, structs of other versions, buffers of the caller.
#pragma once

#include <cstddef>
#include <cstring>
#include <initializer_list>
#include <span>
#include <string>

#include "base/guarded.h"
#include "narrows/narrows.h"

namespace narrows::capi {

/// The status as C's, its message as this thread's last error.
narrows_status finish(Status status) noexcept;

/// One entry: fn() returns a Status. `what` was going on when an exception came.
template <class Fn>
narrows_status call(const char* what, Fn&& fn) noexcept {
  return finish(guarded(what, std::forward<Fn>(fn)));
}

struct Argument {
  const void* pointer;
  const char* name;
};
/// invalid_argument names the first that is NULL.
Status given(std::initializer_list<Argument> arguments);
/// As given(), if there is anything at all: n things at a pointer.
Status given(const void* pointer, size_t n, const char* name);

inline std::string text_or(const char* text, const char* otherwise) {
  return text != nullptr ? text : otherwise;
}

// --- structs that begin with struct_size

/// More than any struct of ours will have: a size that was never set.
inline constexpr size_t kMostStructBytes = 4096;

Status check_struct_size(size_t size, size_t first_version, const char* name);

template <class T>
size_t size_of_struct(const T* s) {
  size_t size = 0;
  std::memcpy(&size, s, sizeof size);
  return size;
}

/// narrows_*_init_size(): the defaults, as far as the caller's struct has room for them.
template <class T>
void init_struct(T* to, size_t size, T defaults) noexcept {
  if (to == nullptr || size < sizeof(size_t) || size > kMostStructBytes) return;
  defaults.struct_size = size;
  std::memset(static_cast<void*>(to), 0, size);
  std::memcpy(static_cast<void*>(to), &defaults, size < sizeof(T) ? size : sizeof(T));
}

/// Over the defaults in `options`, the caller's struct as far as it goes; NULL: the defaults. first_version:
/// bytes that the struct had when it was first released. unsupported if it is longer than ours and says
/// something there.
template <class T>
Status read_struct(const T* from, size_t first_version, const char* name, T* options) {
  if (from == nullptr) return {};
  const size_t size = size_of_struct(from);
  if (Status s = check_struct_size(size, first_version, name); !s.ok()) return s;
  const auto* bytes = reinterpret_cast<const unsigned char*>(from);
  for (size_t i = sizeof(T); i < size; ++i) {
    if (bytes[i] != 0)
      return {StatusCode::unsupported,
              std::string(name) + " sets options that this version of libnarrows does not have"};
  }
  std::memcpy(static_cast<void*>(options), from, size < sizeof(T) ? size : sizeof(T));
  return {};
}

/// The other way: our values into the caller's struct, zeros where it is longer.
template <class T>
Status write_struct(T value, size_t first_version, const char* name, T* to) {
  const size_t size = size_of_struct(to);
  if (Status s = check_struct_size(size, first_version, name); !s.ok()) return s;
  init_struct(to, size, value);
  return {};
}

// --- buffers

/// The things into the caller's buffer [capacity], and their number. `tail` more places must be there and
/// become zero.
template <class T>
narrows_status give(std::span<const T> from, T* to, size_t capacity, size_t* n, size_t tail = 0) noexcept;
extern template narrows_status give(std::span<const narrows_token>, narrows_token*, size_t, size_t*,
                                    size_t) noexcept;
extern template narrows_status give(std::span<const char>, char*, size_t, size_t*, size_t) noexcept;

}  // namespace narrows::capi
