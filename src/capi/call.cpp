// The last error of each thread, and the checks that all entries share.
#include "capi/call.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

namespace narrows::capi {
namespace {

thread_local std::string t_last_error;

constexpr const char* kNames[] = {"ok",           "invalid_argument", "invalid_file", "unsupported",
                                  "context_full", "out_of_memory",    "disk_full",    "io_error",
                                  "cancelled",    "non_finite",       "internal"};

constexpr bool same(StatusCode ours, narrows_status c) {
  return static_cast<int>(ours) == static_cast<int>(c);
}
static_assert(same(StatusCode::ok, NARROWS_OK) &&
              same(StatusCode::invalid_argument, NARROWS_INVALID_ARGUMENT) &&
              same(StatusCode::invalid_file, NARROWS_INVALID_FILE) &&
              same(StatusCode::unsupported, NARROWS_UNSUPPORTED) &&
              same(StatusCode::context_full, NARROWS_CONTEXT_FULL) &&
              same(StatusCode::out_of_memory, NARROWS_OUT_OF_MEMORY) &&
              same(StatusCode::disk_full, NARROWS_DISK_FULL) &&
              same(StatusCode::io_error, NARROWS_IO_ERROR) &&
              same(StatusCode::cancelled, NARROWS_CANCELLED) &&
              same(StatusCode::non_finite, NARROWS_NON_FINITE) &&
              same(StatusCode::internal, NARROWS_INTERNAL));

narrows_status too_small(size_t capacity, size_t n) noexcept {
  Status s = guarded("a message", [&]() -> Status {
    return {StatusCode::invalid_argument, fmt::format("the buffer holds {} and {} are needed", capacity, n)};
  });
  finish(std::move(s));
  return NARROWS_BUFFER_TOO_SMALL;
}

}  // namespace

narrows_status finish(Status status) noexcept {
  if (status.ok()) return NARROWS_OK;
  const auto code = static_cast<narrows_status>(status.code());
  // A copy may lack memory where the sentence itself had it.
  const Status kept = guarded("the sentence of an error", [&] { t_last_error = status.message(); });
  if (!kept.ok()) t_last_error.clear();
  return code;
}

Status given(std::initializer_list<Argument> arguments) {
  for (const Argument& a : arguments) {
    if (a.pointer == nullptr) return {StatusCode::invalid_argument, fmt::format("{} is NULL", a.name)};
  }
  return {};
}

Status given(const void* pointer, size_t n, const char* name) {
  if (n == 0 || pointer != nullptr) return {};
  return {StatusCode::invalid_argument, fmt::format("{} is NULL, but there are to be {} of them", name, n)};
}

Status check_struct_size(size_t size, size_t first_version, const char* name) {
  if (size >= first_version && size <= kMostStructBytes) return {};
  return {StatusCode::invalid_argument,
          fmt::format("struct_size of {} is {}, which is not from {} to {}; call its _init function first",
                      name, size, first_version, kMostStructBytes)};
}

template <class T>
narrows_status give(std::span<const T> from, T* to, size_t capacity, size_t* n, size_t tail) noexcept {
  if (n != nullptr) *n = from.size();
  if (to == nullptr && capacity == 0) return NARROWS_OK;
  if (to == nullptr) return finish(guarded("a message", [] { return given({{nullptr, "the buffer"}}); }));
  if (capacity < from.size() + tail) return too_small(capacity, from.size() + tail);
  std::copy(from.begin(), from.end(), to);
  std::fill_n(to + from.size(), tail, T{});
  return NARROWS_OK;
}
template narrows_status give(std::span<const narrows_token>, narrows_token*, size_t, size_t*,
                             size_t) noexcept;
template narrows_status give(std::span<const char>, char*, size_t, size_t*, size_t) noexcept;

}  // namespace narrows::capi

using namespace narrows;

extern "C" {

const char* narrows_last_error(void) { return capi::t_last_error.c_str(); }

const char* narrows_status_name(int status) {
  if (status == NARROWS_BUFFER_TOO_SMALL) return "buffer_too_small";
  const bool known = status >= 0 && static_cast<size_t>(status) < std::size(capi::kNames);
  return known ? capi::kNames[status] : "unknown";
}

const char* narrows_version(void) { return NARROWS_VERSION; }
}
