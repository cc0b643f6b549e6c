// Opens and checks a GGUF file with ggml's reader. ggml's typed getters abort on a wrong type, so every
// access here looks at the type first; ggml does not compare tensor offsets with the file's size, so that is
// done here as well.
#include "gguf/gguf_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <set>

#include "base/utf8.h"
#include "gguf.h"
#include "gguf/header_fault.h"
#include "gguf/split_name.h"

namespace narrows {

namespace {

/// Metadata of a 405B model with its vocabulary is about 20 MB; the tensor table of the largest known model
/// has a few thousand rows. Beyond this a file is taken for garbage before ggml allocates for it.
constexpr int64_t kMaxTensors = 1 << 20;

/// Files of one model; each takes a descriptor. The largest known models come in some 50.
constexpr int64_t kMaxParts = 512;

Status bad(const std::string& path, const std::string& what) {
  return {StatusCode::invalid_file, fmt::format("{}: {}", path, what)};
}

/// FNV-1a, 64 bit.
class Fnv {
 public:
  void add(const void* data, size_t n) {
    const auto* p = static_cast<const unsigned char*>(data);
    for (size_t i = 0; i < n; ++i) hash_ = (hash_ ^ p[i]) * 0x100000001b3ULL;
  }
  uint64_t value() const { return hash_; }

 private:
  uint64_t hash_ = 0xcbf29ce484222325ULL;
};

}  // namespace

GgufFile::~GgufFile() {
  if (gguf_ != nullptr) gguf_free(gguf_);
  if (fd_ >= 0) close(fd_);
}

GgufFile::GgufFile(GgufFile&& other) noexcept { *this = std::move(other); }

GgufFile& GgufFile::operator=(GgufFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(size_, other.size_);
  std::swap(stamp_, other.stamp_);
  std::swap(fd_, other.fd_);
  std::swap(gguf_, other.gguf_);
  std::swap(tensors_, other.tensors_);
  std::swap(parts_, other.parts_);
  return *this;
}

Result<GgufFile> GgufFile::open(const std::string& path) {
  Result<GgufFile> file = open_one(path);
  if (!file.ok()) return file;
  const Result<int64_t> count = file->part_count();
  if (!count.ok()) return count.status();
  if (*count > 1) {
    file = open_parts(std::move(*file), *count);
    if (!file.ok()) return file;
  }
  if (Status s = file->check_names(); !s.ok()) return s;
  return file;
}

Result<GgufFile> GgufFile::open_one(const std::string& path) {
  GgufFile file;
  file.path_ = path;
  file.fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe would wait for its writer
  if (file.fd_ < 0) return bad(path, fmt::format("cannot be opened: {}", std::strerror(errno)));
  struct stat info {};
  if (fstat(file.fd_, &info) != 0) return bad(path, fmt::format("cannot be read: {}", std::strerror(errno)));
  if (S_ISDIR(info.st_mode)) return bad(path, "is a directory, give a GGUF file");
  if (!S_ISREG(info.st_mode)) return bad(path, "is not a regular file, give a GGUF file");
  file.size_ = info.st_size;
  file.stamp_ = stamp_of(info);
  if (file.size_ == 0) return bad(path, "is empty, give a GGUF file");

  char magic[4] = {};
  if (file.size_ < 24 || !file.read(0, 4, magic).ok() || std::memcmp(magic, GGUF_MAGIC, 4) != 0) {
    return bad(path, "is not a GGUF file (it does not begin with \"GGUF\")");
  }
  uint32_t version = 0;
  if (Status s = file.read(4, sizeof(version), &version); !s.ok()) return s;
  if (const std::string fault = version_fault(version); !fault.empty()) return bad(path, fault);
  const gguf_init_params params = {/*no_alloc=*/true, /*ctx=*/nullptr};
  file.gguf_ = gguf_init_from_file(path.c_str(), params);
  if (file.gguf_ == nullptr) {
    const std::string fault = type_fault(file);
    return bad(path, !fault.empty() ? fault
                                    : "is cut off or corrupt in its header (metadata or tensor table), get "
                                      "the file again");
  }
  if (Status s = file.unchanged_under_its_name(); !s.ok()) return s;  // ggml opened it by its name
  if (Status s = file.check_tensors(); !s.ok()) return s;
  return file;
}

GgufFile::Stamp GgufFile::stamp_of(const struct stat& info) {
  return {info.st_dev, info.st_ino, info.st_size, info.st_mtim.tv_sec, info.st_mtim.tv_nsec};
}

Status GgufFile::changed(const Stamp& now) const {
  if (now == stamp_) return {};
  return {StatusCode::io_error,
          fmt::format("{}: the file was overwritten after it was opened ({}), and two models must not be "
                      "mixed; start again to load it, and replace model files by renaming",
                      path_,
                      now.bytes != stamp_.bytes
                          ? fmt::format("it had {} bytes and has {}", stamp_.bytes, now.bytes)
                          : std::string("its time of change is another"))};
}

Status GgufFile::changed_at(bool by_name) const {
  struct stat info {};
  if ((by_name ? ::stat(path_.c_str(), &info) : fstat(fd_, &info)) != 0)
    return {StatusCode::io_error, fmt::format("{}: cannot be read: {}", path_, std::strerror(errno))};
  if (Status s = changed(stamp_of(info)); !s.ok()) return s;
  for (const GgufFile& part : parts_) {
    if (Status s = part.changed_at(by_name); !s.ok()) return s;
  }
  return {};
}

Status GgufFile::unchanged() const { return changed_at(false); }

Status GgufFile::unchanged_under_its_name() const { return changed_at(true); }

/// 0 if it is missing.
Result<int64_t> GgufFile::split_key(const char* key, int64_t low, int64_t high) const {
  const Result<std::optional<int64_t>> value = integer(key);
  if (!value.ok()) return value.status();
  if (!value->has_value()) return int64_t{0};
  if (**value < low || **value > high)
    return bad(path_, fmt::format("metadata {} = {} is not between {} and {}", key, **value, low, high));
  return **value;
}

/// Files of the model; joined ones may still say 0 or 1, and what is no number means nothing.
Result<int64_t> GgufFile::part_count() const {
  return integer("split.count").ok() ? split_key("split.count", 0, kMaxParts) : Result<int64_t>(int64_t{0});
}

/// All `count` parts, of which one is open.
Result<GgufFile> GgufFile::open_parts(GgufFile opened, int64_t count) {
  const Result<int64_t> own = opened.split_key("split.no", 0, count - 1);
  if (!own.ok()) return own.status();
  const std::string path = opened.path_;
  std::vector<GgufFile> parts;
  for (int64_t i = 0; i < count; ++i) {
    if (i == *own) {
      parts.push_back(std::move(opened));
      continue;
    }
    const std::optional<std::string> name = part_beside(path, *own, i, count);
    if (!name) {
      return bad(path,
                 fmt::format("is part {0} of {1} of a split model, but its name does not end in "
                             "-{0:05}-of-{1:05}.gguf, so that the others cannot be found; give the parts "
                             "their names back, or join them with llama-gguf-split --merge",
                             *own + 1, count));
    }
    Result<GgufFile> part = open_one(*name);
    if (!part.ok()) {
      return Status(part.status().code(), fmt::format("{} (part {} of {}; all parts must lie in one folder)",
                                                      part.status().message(), i + 1, count));
    }
    const Result<int64_t> its_count = part->part_count(), number = part->split_key("split.no", 0, count - 1);
    if (!its_count.ok()) return its_count.status();
    if (!number.ok()) return number.status();
    if (*its_count != count || *number != i)
      return bad(*name, fmt::format("says that it is part {} of {}, not {} of {} as its name does: the parts "
                                    "are not of one model",
                                    *number + 1, *its_count, i + 1, count));
    parts.push_back(std::move(*part));
  }
  GgufFile whole = std::move(parts.front());
  for (size_t i = 1; i < parts.size(); ++i) {
    for (TensorEntry& t : parts[i].tensors_) {
      t.part = i;
      whole.tensors_.push_back(t);
    }
    whole.parts_.push_back(std::move(parts[i]));
  }
  const Result<int64_t> n_tensor = whole.split_key("split.tensors.count", 1, kMaxTensors);
  if (!n_tensor.ok()) return n_tensor.status();
  if (*n_tensor != 0 && *n_tensor != static_cast<int64_t>(whole.tensors_.size()))
    return bad(whole.path_,
               fmt::format("is split into parts with {} tensors and should have {}: the parts are "
                           "not of one model",
                           whole.tensors_.size(), *n_tensor));
  return whole;
}

Status GgufFile::check_tensors() {
  const int64_t n = gguf_get_n_tensors(gguf_);
  if (n > kMaxTensors) return bad(path_, fmt::format("claims {} tensors, which no model has", n));
  const auto data_offset = static_cast<int64_t>(gguf_get_data_offset(gguf_));
  tensors_.reserve(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    TensorEntry t;
    t.name = gguf_get_tensor_name(gguf_, i);
    t.type = static_cast<TensorType>(gguf_get_tensor_type(gguf_, i));
    std::copy_n(gguf_get_tensor_ne(gguf_, i), 4, t.ne);
    const size_t offset = gguf_get_tensor_offset(gguf_, i);
    const size_t bytes = gguf_get_tensor_size(gguf_, i);
    constexpr auto kMax = static_cast<size_t>(std::numeric_limits<int64_t>::max() / 4);
    if (offset > kMax || bytes > kMax)
      return bad(path_, fmt::format("tensor {} lies beyond any file", quote(t.name)));
    t.offset = data_offset + static_cast<int64_t>(offset);
    t.bytes = static_cast<int64_t>(bytes);
    if (t.offset > size_ || t.bytes > size_ - t.offset) {
      return bad(path_,
                 fmt::format("is cut off: tensor {} ends at byte {}, the file has {}; get the file again",
                             quote(t.name), t.offset + t.bytes, size_));
    }
    tensors_.push_back(std::move(t));
  }
  return {};
}

Status GgufFile::check_names() const {
  std::set<std::string_view> names;
  for (const TensorEntry& t : tensors_) {
    if (!names.insert(t.name).second)
      return bad(path_, fmt::format("holds two tensors named {}", quote(t.name)));
  }
  return {};
}

Result<std::optional<int64_t>> GgufFile::integer(const std::string& key) const {
  const int64_t id = gguf_find_key(gguf_, key.c_str());
  if (id < 0) return std::optional<int64_t>();
  switch (gguf_get_kv_type(gguf_, id)) {
    case GGUF_TYPE_UINT8:
      return std::optional<int64_t>(gguf_get_val_u8(gguf_, id));
    case GGUF_TYPE_INT8:
      return std::optional<int64_t>(gguf_get_val_i8(gguf_, id));
    case GGUF_TYPE_UINT16:
      return std::optional<int64_t>(gguf_get_val_u16(gguf_, id));
    case GGUF_TYPE_INT16:
      return std::optional<int64_t>(gguf_get_val_i16(gguf_, id));
    case GGUF_TYPE_UINT32:
      return std::optional<int64_t>(gguf_get_val_u32(gguf_, id));
    case GGUF_TYPE_INT32:
      return std::optional<int64_t>(gguf_get_val_i32(gguf_, id));
    case GGUF_TYPE_INT64:
      return std::optional<int64_t>(gguf_get_val_i64(gguf_, id));
    case GGUF_TYPE_UINT64: {
      const uint64_t v = gguf_get_val_u64(gguf_, id);
      if (v > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
        return bad(path_, fmt::format("metadata {} = {} is out of range", key, v));
      }
      return std::optional<int64_t>(static_cast<int64_t>(v));
    }
    default:
      return bad(path_, fmt::format("metadata {} should be a whole number but is of type {}", key,
                                    gguf_type_name(gguf_get_kv_type(gguf_, id))));
  }
}

Result<std::optional<double>> GgufFile::real(const std::string& key) const {
  const int64_t id = gguf_find_key(gguf_, key.c_str());
  if (id < 0) return std::optional<double>();
  switch (gguf_get_kv_type(gguf_, id)) {
    case GGUF_TYPE_FLOAT32:
      return std::optional<double>(gguf_get_val_f32(gguf_, id));
    case GGUF_TYPE_FLOAT64:
      return std::optional<double>(gguf_get_val_f64(gguf_, id));
    default:
      return bad(path_, fmt::format("metadata {} should be a real number but is of type {}", key,
                                    gguf_type_name(gguf_get_kv_type(gguf_, id))));
  }
}

Result<std::optional<std::string>> GgufFile::text(const std::string& key) const {
  const int64_t id = gguf_find_key(gguf_, key.c_str());
  if (id < 0) return std::optional<std::string>();
  if (gguf_get_kv_type(gguf_, id) != GGUF_TYPE_STRING) {
    return bad(path_, fmt::format("metadata {} should be text but is of type {}", key,
                                  gguf_type_name(gguf_get_kv_type(gguf_, id))));
  }
  return std::optional<std::string>(gguf_get_val_str(gguf_, id));
}

Result<std::optional<bool>> GgufFile::boolean(const std::string& key) const {
  const int64_t id = gguf_find_key(gguf_, key.c_str());
  if (id < 0) return std::optional<bool>();
  if (gguf_get_kv_type(gguf_, id) != GGUF_TYPE_BOOL) {
    return bad(path_, fmt::format("metadata {} should be true or false but is of type {}", key,
                                  gguf_type_name(gguf_get_kv_type(gguf_, id))));
  }
  return std::optional<bool>(gguf_get_val_bool(gguf_, id));
}

std::optional<std::vector<bool>> GgufFile::booleans(const std::string& key) const {
  const int64_t id = gguf_find_key(gguf_, key.c_str());
  if (id < 0 || gguf_get_kv_type(gguf_, id) != GGUF_TYPE_ARRAY ||
      gguf_get_arr_type(gguf_, id) != GGUF_TYPE_BOOL)
    return std::nullopt;
  const auto* data = static_cast<const uint8_t*>(gguf_get_arr_data(gguf_, id));
  std::vector<bool> all;
  for (size_t i = 0; i < gguf_get_arr_n(gguf_, id); ++i) all.push_back(data[i] != 0);
  return all;
}

std::optional<std::vector<int64_t>> GgufFile::integers(const std::string& key) const {
  const int64_t id = gguf_find_key(gguf_, key.c_str());
  if (id < 0 || gguf_get_kv_type(gguf_, id) != GGUF_TYPE_ARRAY) return std::nullopt;
  const gguf_type type = gguf_get_arr_type(gguf_, id);
  if (type != GGUF_TYPE_INT32 && type != GGUF_TYPE_UINT32) return std::nullopt;
  const void* data = gguf_get_arr_data(gguf_, id);
  std::vector<int64_t> all;
  for (size_t i = 0; i < gguf_get_arr_n(gguf_, id); ++i) {
    all.push_back(type == GGUF_TYPE_INT32 ? int64_t{static_cast<const int32_t*>(data)[i]}
                                          : int64_t{static_cast<const uint32_t*>(data)[i]});
  }
  return all;
}

std::optional<int64_t> GgufFile::array_size(const std::string& key) const {
  const int64_t id = gguf_find_key(gguf_, key.c_str());
  if (id < 0 || gguf_get_kv_type(gguf_, id) != GGUF_TYPE_ARRAY) return std::nullopt;
  return static_cast<int64_t>(gguf_get_arr_n(gguf_, id));
}

const TensorEntry* GgufFile::find(std::string_view name) const {
  const auto it =
      std::find_if(tensors_.begin(), tensors_.end(), [&](const TensorEntry& t) { return t.name == name; });
  return it == tensors_.end() ? nullptr : &*it;
}

Status GgufFile::read(int64_t offset, int64_t n, void* into) const {
  auto* to = static_cast<char*>(into);
  while (n > 0) {
    const ssize_t got = pread(fd_, to, static_cast<size_t>(n), offset);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) {
      return {StatusCode::io_error,
              fmt::format("{}: cannot be read at byte {}: {}", path_, offset,
                          got == 0 ? "the file has become shorter" : std::strerror(errno))};
    }
    to += got;
    offset += got;
    n -= got;
  }
  return {};
}

Status GgufFile::read(const TensorEntry& t, int64_t from, int64_t n, void* into) const {
  return (t.part == 0 ? *this : parts_[t.part - 1]).read(t.offset + from, n, into);
}

Result<std::string> GgufFile::fingerprint() const {
  constexpr int64_t kSample = 4096;
  Fnv fnv;
  std::vector<char> buffer(1 << 20);
  const auto add_header = [&](const GgufFile& file) -> Status {
    const auto header = std::min(static_cast<int64_t>(gguf_get_data_offset(file.gguf_)), file.size_);
    for (int64_t at = 0; at < header;) {
      const int64_t n = std::min<int64_t>(header - at, static_cast<int64_t>(buffer.size()));
      if (Status s = file.read(at, n, buffer.data()); !s.ok()) return s;
      fnv.add(buffer.data(), static_cast<size_t>(n));
      at += n;
    }
    return {};
  };
  if (Status s = add_header(*this); !s.ok()) return s;
  for (const GgufFile& part : parts_) {
    if (Status s = add_header(part); !s.ok()) return s;
  }
  for (const TensorEntry& t : tensors_) {
    const int64_t n = std::min(t.bytes, kSample);
    for (const int64_t at : {int64_t{0}, t.bytes - n}) {
      if (Status s = read(t, at, n, buffer.data()); !s.ok()) return s;
      fnv.add(buffer.data(), static_cast<size_t>(n));
    }
  }
  return fmt::format("{:016x}", fnv.value());
}

std::string describe_shape(const TensorEntry& t) {
  int n_dim = 4;
  while (n_dim > 1 && t.ne[n_dim - 1] == 1) --n_dim;
  std::string dims;
  for (int i = 0; i < n_dim; ++i) dims += fmt::format("{}{}", i > 0 ? ", " : "", t.ne[i]);
  return fmt::format("[{}] {}", dims, type_name(t.type));
}

}  // namespace narrows
