#include "base/guarded.h"

#include <fmt/format.h>

#include <exception>
#include <new>

#include "base/utf8.h"

namespace narrows {

Status status_of_exception(const char* what) noexcept {
  StatusCode code = StatusCode::internal;
  try {
    try {
      throw;
    } catch (const std::bad_alloc&) {
      code = StatusCode::out_of_memory;
      return {code, fmt::format("no memory for {}", what)};
    } catch (const std::exception& e) {
      return {code, fmt::format("{} failed: {}", what, quote(e.what(), 200))};
    } catch (...) {
      return {code, fmt::format("{} failed", what)};
    }
  } catch (...) {
    // As many bytes as a string holds without memory.
    return {code, code == StatusCode::out_of_memory ? "out of memory" : "it failed"};
  }
}

}  // namespace narrows
