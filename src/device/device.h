// A GPU that work is done on: its memory and the order of its work, with errors as Status. No CUDA here: it
// speaks through device_api.h's table.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "device/device_api.h"
#include "device/step_graphs.h"
#include "narrows/status.h"

namespace narrows::device {

class Device;

/// Memory of a device; what it holds at first is not defined.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer();

  int64_t bytes() const { return bytes_; }
  template <class T = void>
  T* data() const {
    return static_cast<T*>(data_);
  }

 private:
  friend class Device;
  std::shared_ptr<Device> device_;
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

/// A card. Thread-safe.
class Device : public std::enable_shared_from_this<Device> {
 public:
  /// unsupported as check_card(). api outlives it.
  static Result<std::shared_ptr<Device>> open(const Api& api, int index);

  const Api& api() const { return api_; }
  int index() const { return index_; }
  std::string name() const { return info_.name; }
  /// That may still be allocated; 0 if the card does not say.
  int64_t free_bytes() const;

  /// out_of_memory with both figures; what: a sentence's object.
  Result<Buffer> allocate(int64_t bytes, const char* what);
  /// At least so many bytes, in place of what it was if that was less.
  Status grow(Buffer& buffer, int64_t bytes, const char* what);

  /// What one of the table's functions returned, as a Status: internal.
  Status status(int code) const;

 private:
  friend class Buffer;
  Device(const Api& api, int index, const Info& info) : api_(api), index_(index), info_(info) {}
  const Api& api_;
  int index_;
  Info info_;
};

/// Work of a device in order. Not thread-safe.
class Stream {
 public:
  static Result<std::unique_ptr<Stream>> create(std::shared_ptr<Device> device);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  Device& device() const { return *device_; }
  void* get() const { return stream_; }

  /// As the table's; the first error of all since take_error() is kept, and nothing is begun after it.
  void upload(void* to, const void* from, int64_t bytes) {
    run([&](const Api& a, int d) { return a.upload(d, to, from, bytes, stream_); });
  }
  void download(void* to, const void* from, int64_t bytes) {
    run([&](const Api& a, int d) { return a.download(d, to, from, bytes, stream_); });
  }
  void download_rows(void* to, int64_t to_ld, const void* from, int64_t from_ld, int64_t bytes, int64_t n) {
    run([&](const Api& a, int d) { return a.download_rows(d, to, to_ld, from, from_ld, bytes, n, stream_); });
  }
  void copy(void* to, const void* from, int64_t bytes) {
    if (steps_.records()) return steps_.add(CopyArgs{to, from, bytes});
    run([&](const Api& a, int d) { return a.copy(d, to, from, bytes, stream_); });
  }
  void fill(void* to, int byte, int64_t bytes) {
    run([&](const Api& a, int d) { return a.fill(d, to, byte, bytes, stream_); });
  }
  void wait() {
    run([&](const Api& a, int d) { return a.wait(d, stream_); });
  }
  /// One of the table's operators.
  template <class Args>
  void op(int (*Api::*function)(int, const Args*, void*), const Args& args) {
    if constexpr (StepGraphs::can_hold<Args>()) {
      if (steps_.records()) return steps_.add(args);
    }
    run([&](const Api& a, int d) { return (a.*function)(d, &args, stream_); });
  }
  void decode(const narrows_cuda_f16_args& args, const Buffer& workspace) {
    if (steps_.records()) return steps_.add(args, workspace.data(), workspace.bytes());
    run([&](const Api& a, int d) {
      return a.f16_decode(d, &args, workspace.data(), static_cast<size_t>(workspace.bytes()), stream_);
    });
  }
  void decode(const narrows_cuda_klt_args& args, const Buffer& workspace) {
    if (steps_.records()) return steps_.add(args, workspace.data(), workspace.bytes());
    run([&](const Api& a, int d) {
      return a.klt_decode(d, &args, workspace.data(), static_cast<size_t>(workspace.bytes()), stream_);
    });
  }

  /// From here on operators and copies are kept, to be launched together. Whatever else is asked for in
  /// between is begun after them, and then nothing is kept any more.
  void record() {
    if (error_.ok()) steps_.begin();
  }
  /// Launches what was kept as a graph; the same operators with the same arguments as a run before are that
  /// graph again.
  void launch();
  /// What only the host answers: it is in nobody's order.
  template <class Fn>
  void ask(Fn&& fn) {
    if (!error_.ok()) return;
    if (const int code = fn(device_->api(), device_->index()); code != 0) error_ = device_->status(code);
  }
  template <class Fn>
  void run(Fn&& fn) {
    if (steps_.records()) launch_kept();
    if (!error_.ok()) return;
    if (const int code = fn(device_->api(), device_->index()); code != 0) error_ = device_->status(code);
  }
  void fail(Status status) {
    if (error_.ok()) error_ = std::move(status);
  }
  bool ok() const { return error_.ok(); }
  Status take_error() {
    steps_.drop();
    return std::exchange(error_, Status());
  }

 private:
  Stream(std::shared_ptr<Device> device, void* stream) : device_(std::move(device)), stream_(stream) {}
  std::shared_ptr<Device> device_;
  void* stream_;
  void launch_kept();
  Status error_;
  StepGraphs steps_;
};

}  // namespace narrows::device
