#include "device/device.h"

#include <fmt/format.h>

#include "device/library.h"

namespace narrows::device {

Buffer::~Buffer() {
  if (data_ != nullptr) device_->api_.release(device_->index_, data_);
}

Result<std::shared_ptr<Device>> Device::open(const Api& api, int index) {
  Info info{};
  if (Status s = check_card(api, index, &info); !s.ok()) return s;
  return std::shared_ptr<Device>(new Device(api, index, info));
}

int64_t Device::free_bytes() const {
  Info now{};
  return api_.info(index_, &now) == 0 ? now.free_bytes : 0;
}

Result<Buffer> Device::allocate(int64_t bytes, const char* what) {
  Buffer buffer;
  const int code = api_.allocate(index_, bytes, &buffer.data_);
  if (code != 0) return status(code);
  if (buffer.data_ == nullptr) {
    return Status(StatusCode::out_of_memory,
                  fmt::format("the GPU has no room for {}: {:.2f} GB are needed and {:.2f} GB are free", what,
                              static_cast<double>(bytes) / 1e9, static_cast<double>(free_bytes()) / 1e9));
  }
  buffer.bytes_ = bytes;
  buffer.device_ = shared_from_this();
  return buffer;
}

Status Device::grow(Buffer& buffer, int64_t bytes, const char* what) {
  if (bytes <= buffer.bytes()) return {};
  { const Buffer old = std::move(buffer); }
  Result<Buffer> made = allocate(bytes, what);
  if (!made.ok()) return made.status();
  buffer = std::move(*made);
  return {};
}

Status Device::status(int code) const {
  if (code == 0) return {};
  return {StatusCode::internal, fmt::format("GPU {} ({}): {}", index_, info_.name, api_.error())};
}

Result<std::unique_ptr<Stream>> Stream::create(std::shared_ptr<Device> device) {
  void* stream = nullptr;
  if (const int code = device->api().make_stream(device->index(), &stream); code != 0)
    return device->status(code);
  return std::unique_ptr<Stream>(new Stream(std::move(device), stream));
}

Stream::~Stream() {
  steps_.release(device_->api(), device_->index());
  device_->api().end_stream(device_->index(), stream_);
}

void Stream::launch() {
  if (!steps_.records()) return;
  if (!error_.ok()) return steps_.drop();
  if (const int code = steps_.launch(device_->api(), device_->index(), stream_); code != 0)
    error_ = device_->status(code);
}

void Stream::launch_kept() {
  if (!error_.ok()) return steps_.drop();
  if (const int code = steps_.launch_each(device_->api(), device_->index(), stream_); code != 0)
    error_ = device_->status(code);
}

}  // namespace narrows::device
