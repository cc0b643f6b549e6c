// Walks over the header once more, with every length checked against the file.
#include "gguf/header_fault.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "base/utf8.h"
#include "ggml.h"
#include "gguf.h"

namespace narrows {

namespace {

constexpr uint32_t kOldest = 2;
constexpr uint32_t kNewest = GGUF_VERSION;
constexpr int64_t kCountsAt = 8;  ///< behind magic and version

uint32_t swapped(uint32_t x) { return x >> 24 | (x >> 8 & 0xFF00) | (x << 8 & 0xFF0000) | x << 24; }

/// Numbers and texts one after another; once something does not fit, everything is 0 and ok() false.
class Walk {
 public:
  explicit Walk(const GgufFile& file) : file_(file), at_(kCountsAt) {}

  bool ok() const { return ok_; }

  template <class T>
  T number() {
    T value{};
    if (has(sizeof(T))) {
      std::memcpy(&value, window_.data() + (at_ - begin_), sizeof(T));
      at_ += static_cast<int64_t>(sizeof(T));
    }
    return value;
  }

  std::string text() {
    const auto n = number<uint64_t>();
    if (!ok_ || n > kWindow || !has(static_cast<int64_t>(n))) {
      skip(n);
      return {};
    }
    std::string value(window_.data() + (at_ - begin_), n);
    at_ += static_cast<int64_t>(n);
    return value;
  }

  void skip(uint64_t bytes) {
    ok_ = ok_ && bytes <= static_cast<uint64_t>(file_.size() - at_);
    if (ok_) at_ += static_cast<int64_t>(bytes);
  }

  void skip_value(int32_t type) {
    if (type == GGUF_TYPE_STRING) return skip(number<uint64_t>());
    if (type != GGUF_TYPE_ARRAY) return skip_numbers(type, 1);
    const auto item = number<int32_t>();
    const auto n = number<uint64_t>();
    if (item != GGUF_TYPE_STRING) return skip_numbers(item, n);
    for (uint64_t i = 0; ok_ && i < n; ++i) skip(number<uint64_t>());
  }

 private:
  static constexpr uint64_t kWindow = uint64_t{1} << 16;

  static uint64_t bytes_of(int32_t type) {
    switch (type) {
      case GGUF_TYPE_UINT8:
      case GGUF_TYPE_INT8:
      case GGUF_TYPE_BOOL:
        return 1;
      case GGUF_TYPE_UINT16:
      case GGUF_TYPE_INT16:
        return 2;
      case GGUF_TYPE_UINT32:
      case GGUF_TYPE_INT32:
      case GGUF_TYPE_FLOAT32:
        return 4;
      case GGUF_TYPE_UINT64:
      case GGUF_TYPE_INT64:
      case GGUF_TYPE_FLOAT64:
        return 8;
      default:
        return 0;
    }
  }

  void skip_numbers(int32_t type, uint64_t n) {
    const uint64_t bytes = bytes_of(type);
    ok_ = ok_ && bytes > 0 && n <= static_cast<uint64_t>(file_.size()) / bytes;
    if (ok_) skip(n * bytes);
  }

  /// The next n bytes are in the window.
  bool has(int64_t n) {
    ok_ = ok_ && n <= file_.size() - at_;
    if (!ok_) return false;
    const auto filled = static_cast<int64_t>(window_.size());
    if (at_ >= begin_ && at_ + n <= begin_ + filled) return true;
    window_.resize(static_cast<size_t>(std::min(std::max<int64_t>(n, kWindow), file_.size() - at_)));
    begin_ = at_;
    ok_ = file_.read(at_, static_cast<int64_t>(window_.size()), window_.data()).ok();
    return ok_;
  }

  const GgufFile& file_;
  int64_t at_;
  int64_t begin_ = 0;  ///< of the window in the file
  std::string window_;
  bool ok_ = true;
};

bool known(int32_t type) {
  return type >= 0 && type < GGML_TYPE_COUNT && ggml_blck_size(static_cast<ggml_type>(type)) > 0;
}

}  // namespace

std::string version_fault(uint32_t version) {
  if (version >= kOldest && version <= kNewest) return {};
  if (const uint32_t other = swapped(version); other >= 1 && other <= kNewest) {
    return "is a big-endian file, this machine reads little-endian ones; get that, or convert it with "
           "gguf_convert_endian.py of llama.cpp";
  }
  return fmt::format(
      "is a GGUF file of version {}, this build reads {} and {}; {}", version, kOldest, kNewest,
      version < kOldest ? "convert the model again with a newer converter" : "a newer build may read it");
}

std::string type_fault(const GgufFile& file) {
  Walk in(file);
  const auto n_tensor = in.number<int64_t>();
  const auto n_key = in.number<int64_t>();
  for (int64_t i = 0; in.ok() && i < n_key; ++i) {
    (void)in.text();
    in.skip_value(in.number<int32_t>());
  }
  for (int64_t i = 0; in.ok() && i < n_tensor; ++i) {
    const std::string name = in.text();
    const auto n_dim = in.number<uint32_t>();
    if (n_dim > GGML_MAX_DIMS) return {};
    in.skip(n_dim * sizeof(int64_t));
    const auto type = in.number<int32_t>();
    if (in.ok() && !known(type)) {
      return fmt::format(
          "tensor {} is of type number {}, which this build does not know; get the model in a common "
          "type, such as Q4_K_M or Q8_0",
          quote(name), type);
    }
    (void)in.number<uint64_t>();  // where it lies
  }
  return {};
}

}  // namespace narrows
