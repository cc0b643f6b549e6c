// Status and Result: how every function of the library reports failure.
// The library never aborts, prints or exits; the CLI and the server turn a Status into a sentence and a code.
#pragma once

#include <cassert>
#include <optional>
#include <string>
#include <utility>

namespace narrows {

enum class StatusCode {
  ok,
  invalid_argument,  ///< a flag, profile, prompt or request is wrong; nothing was done
  invalid_file,      ///< a file is missing, cut off, corrupt or made for another model
  unsupported,       ///< well-formed, but outside what this build can do (architecture, tensor type)
  context_full,      ///< the prompt or the generation does not fit n_ctx
  out_of_memory,     ///< more memory than the machine has or the system gives
  disk_full,         ///< no room for the file to be written; nothing of it is left
  io_error,          ///< reading or writing failed while the work was going on
  cancelled,         ///< the caller asked to stop
  non_finite,        ///< NaN or infinity where numbers must be finite; the message names the layer
  internal,          ///< a bug in narrows; the message says where
};

/// Success, or a code and one sentence: what, where, what to do. The sentence has no full stop and no
/// newline.
class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {
    assert(code != StatusCode::ok);
  }

  bool ok() const { return code_ == StatusCode::ok; }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::ok;
  std::string message_;
};

/// A value, or the Status that says why there is none.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}
  Result(Status status) : status_(std::move(status)) { assert(!status_.ok()); }
  Result(StatusCode code, std::string message) : status_(code, std::move(message)) {}

  bool ok() const { return value_.has_value(); }
  const Status& status() const { return status_; }

  T& value() & {
    assert(ok());
    return *value_;
  }
  const T& value() const& {
    assert(ok());
    return *value_;
  }
  T&& value() && {
    assert(ok());
    return std::move(*value_);
  }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

 private:
  std::optional<T> value_;
  Status status_;
};

}  // namespace narrows
