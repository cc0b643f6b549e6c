// A GGUF file, opened and checked: metadata by key, tensors by name. Pipeline step 1. The file is hostile
// until checked: counts, types, shapes and offsets are verified against the file's real size before anything
// is read. A model that is split over several files is opened by any of them and read as one: metadata are
// those of the first part, tensors those of all.
#pragma once

#include <sys/stat.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "gguf/tensor_type.h"
#include "narrows/status.h"

struct gguf_context;  // of ggml

namespace narrows {

/// One tensor of the file. ggml's ne order: ne[0] is the fastest dimension.
struct TensorEntry {
  std::string name;
  TensorType type = TensorType::f32;
  int64_t ne[4] = {1, 1, 1, 1};
  int64_t offset = 0;  ///< from the start of the file that it is in
  int64_t bytes = 0;
  size_t part = 0;  ///< of a split model, from 0

  int64_t n_row() const { return ne[1] * ne[2] * ne[3]; }
  int64_t row_bytes() const { return n_row() > 0 ? bytes / n_row() : 0; }
};

class GgufFile {
 public:
  /// invalid_file: missing, a directory, empty, not GGUF, of a version, byte order or tensor type that cannot
  /// be read, cut off, tensors beyond the end of the file; of a split model the same of any part, and parts
  /// that do not belong together.
  static Result<GgufFile> open(const std::string& path);
  ~GgufFile();
  GgufFile(GgufFile&&) noexcept;
  GgufFile& operator=(GgufFile&&) noexcept;

  /// Of a split model its first part, whichever it was opened by: what libllama wants too.
  const std::string& path() const { return path_; }
  int64_t size() const { return size_; }  ///< of that file

  /// nullopt if there is no such key; invalid_file if it has another type or does not fit.
  Result<std::optional<int64_t>> integer(const std::string& key) const;
  Result<std::optional<double>> real(const std::string& key) const;
  Result<std::optional<std::string>> text(const std::string& key) const;
  Result<std::optional<bool>> boolean(const std::string& key) const;
  /// nullopt if there is no such key, or it is no array of them.
  std::optional<std::vector<bool>> booleans(const std::string& key) const;
  /// nullopt if there is no such key, or it is no array of int32 or uint32.
  std::optional<std::vector<int64_t>> integers(const std::string& key) const;
  /// Number of elements if key is an array (of any type).
  std::optional<int64_t> array_size(const std::string& key) const;

  const std::vector<TensorEntry>& tensors() const { return tensors_; }
  const TensorEntry* find(std::string_view name) const;

  /// Reads bytes [offset, offset + n) of the file at path(). io_error if they cannot be read any more.
  /// Thread-safe.
  Status read(int64_t offset, int64_t n, void* into) const;
  /// Bytes [from, from + n) of one of tensors(). The same.
  Status read(const TensorEntry& tensor, int64_t from, int64_t n, void* into) const;

  /// io_error if the file (any part of it) has been written to since it was opened (its size or time of
  /// change differs): what is read now need not fit what was read before. Another file under the same name
  /// does no harm. A check after read() covers what it read. Thread-safe.
  Status unchanged() const;
  /// The same, or if the path names another file by now: for what has been read by its name meanwhile.
  Status unchanged_under_its_name() const;

  /// 16 hex digits: FNV-1a over the metadata, the tensor table and the first and last bytes of every tensor.
  /// Tells models apart cheaply; no protection against somebody who wants a collision.
  Result<std::string> fingerprint() const;

 private:
  GgufFile() = default;
  /// What tells one state of a file from another.
  struct Stamp {
    uint64_t device = 0, inode = 0;
    int64_t bytes = 0, seconds = 0, nanoseconds = 0;
    bool operator==(const Stamp&) const = default;
  };
  static Stamp stamp_of(const struct stat& info);
  Status changed(const Stamp& now) const;
  static Result<GgufFile> open_one(const std::string& path);
  Status changed_at(bool by_name) const;
  Result<int64_t> split_key(const char* key, int64_t low, int64_t high) const;
  Result<int64_t> part_count() const;
  static Result<GgufFile> open_parts(GgufFile opened, int64_t count);
  Status check_tensors();
  Status check_names() const;

  std::string path_;
  int64_t size_ = 0;
  Stamp stamp_;
  int fd_ = -1;
  gguf_context* gguf_ = nullptr;
  std::vector<TensorEntry> tensors_;  ///< of all parts
  std::vector<GgufFile> parts_;       ///< those after the first, of which this is one
};

/// "[576, 1536] Q4_1", fastest dimension first as GGUF tools print it; for error sentences.
std::string describe_shape(const TensorEntry& tensor);

}  // namespace narrows
