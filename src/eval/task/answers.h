// Answers that were given, by question and profile; in a file too if asked for, so that a long run that was
// interrupted goes on where it was.
#pragma once

#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "eval/task/item.h"

namespace narrows {

struct TaskAnswer {
  std::string text;      ///< UTF-8, without the lead-in
  int64_t n_tokens = 0;  ///< generated, the end token not counted
  bool ended = false;    ///< by the model itself, and not by max_tokens or a full context
  int64_t prompt_tokens = 0;
};

/// The file is a line of JSON that says what the answers were made with, and a line an answer. Each is
/// written as it comes; a last line that was cut off is dropped.
class Answers {
 public:
  Answers() = default;  ///< in memory alone

  /// Reads what `path` holds, or begins it; `made_with` is compared with what stands there, word for word.
  /// invalid_file: the file is none of these, a line of it is damaged (its number), or it was made with other
  /// options (which); what cannot be opened, written or read.
  static Result<Answers> open(const std::string& path, const std::map<std::string, std::string>& made_with);

  /// Null if this was not answered yet.
  const TaskAnswer* find(const ItemId& id, const std::string& kv) const;
  /// io_error, disk_full.
  Status add(const ItemId& id, const std::string& kv, TaskAnswer answer);
  size_t size() const { return answers_.size(); }

 private:
  struct Close {
    void operator()(std::FILE* file) const { (void)std::fclose(file); }
  };

  Status take_line(const std::string& line, size_t number);
  Status write(const std::string& line);

  std::map<std::pair<ItemId, std::string>, TaskAnswer> answers_;
  std::string path_;
  std::unique_ptr<std::FILE, Close> file_;
};

}  // namespace narrows
