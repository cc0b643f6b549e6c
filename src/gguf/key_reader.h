// Metadata below "<architecture>.", with ranges; the first failure is kept, so that a reader of many keys is
// a plain list.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "gguf/gguf_file.h"
#include "narrows/status.h"

namespace narrows {

class KeyReader {
 public:
  KeyReader(const GgufFile& file, std::string prefix) : file_(file), prefix_(std::move(prefix)) {}

  /// The number at `key`, or the fallback; without one the key must be there. On a failure `low`.
  int64_t integer(const std::string& key, std::optional<int64_t> fallback, int64_t low, int64_t high);
  double real(const std::string& key, std::optional<double> fallback, double low, double high);
  std::string text(const std::string& key, const std::string& fallback);
  bool flag(const std::string& key, bool fallback);
  /// Empty if there is no such array; else one for each of n layers. On a failure empty.
  std::vector<bool> flags(const std::string& key, int64_t n);
  /// Empty if there is no such array; else its whole numbers.
  std::vector<int64_t> integers(const std::string& key);
  bool has(const std::string& key) const;

  const Status& status() const { return status_; }
  const GgufFile& file() const { return file_; }

  Status bad(const std::string& what) const;          ///< invalid_file, with the file's name
  Status unsupported(const std::string& what) const;  ///< the same

 private:
  template <class T>
  T fail(Status s, T value) {
    if (status_.ok()) status_ = std::move(s);
    return value;
  }
  Status missing(const std::string& key) const;

  const GgufFile& file_;
  std::string prefix_;
  Status status_;
};

}  // namespace narrows
