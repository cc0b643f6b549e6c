// GGUF files of our own: a few keys, and float32 tensors by name. Written as ggml writes them, read as
// hostile.
#pragma once

#include <cstdint>
#include <cstdio>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "narrows/status.h"

namespace narrows {

class FloatFileWriter {
 public:
  /// Throws std::bad_alloc if there is no memory to describe n_tensor tensors.
  explicit FloatFileWriter(size_t n_tensor);
  ~FloatFileWriter();
  FloatFileWriter(const FloatFileWriter&) = delete;
  FloatFileWriter& operator=(const FloatFileWriter&) = delete;

  void text(const char* key, const std::string& value);
  void count(const char* key, uint32_t value);
  void long_count(const char* key, int64_t value);
  /// [rows, columns], or [columns] if there is one row; the file's order is that of these calls.
  void tensor(const std::string& name, int64_t rows, int64_t columns);

  /// All but the numbers; then those of each tensor in order. Errors stay in the stream.
  void write_head(std::FILE* file) const;
  void write(std::span<const float> numbers, std::FILE* file) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// One open file; every failure is invalid_file and names it. May throw std::exception where a file asks for
/// more memory than there is.
class FloatFileReader {
 public:
  /// what: "basis file"; maker: the command that makes one. Both for error sentences.
  static Result<FloatFileReader> open(const std::string& path, const std::string& what,
                                      const std::string& maker);
  ~FloatFileReader();
  FloatFileReader(FloatFileReader&&) noexcept;

  Status bad(const std::string& what) const;
  // The key's value if it is there with this type; else nothing of use, and status says what is wrong.
  std::string text(const char* key, Status& status) const;
  int64_t count(const char* key, Status& status) const;
  int64_t long_count(const char* key, Status& status) const;
  /// A tensor of exactly this shape, all numbers finite. The caller bounds rows * columns.
  Status tensor(const std::string& name, int64_t rows, int64_t columns, std::vector<float>& to);

 private:
  struct Impl;
  explicit FloatFileReader(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace narrows
