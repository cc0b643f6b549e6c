// Lines are read and written whole; nlohmann's parser is called without exceptions.
#include "eval/task/answers.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <nlohmann/json.hpp>
#include <system_error>

#include "base/file.h"
#include "base/utf8.h"

namespace narrows {

namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kMaxFileBytes = int64_t{4} << 30;
constexpr const char* kFormat = "narrows_answers";
constexpr int kVersion = 1;

std::string text_of(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

Json header(const std::map<std::string, std::string>& made_with) {
  Json line = {{kFormat, kVersion}};
  for (const auto& [key, value] : made_with) line[key] = value;
  return line;
}

Status check_header(const std::string& path, const std::string& line,
                    const std::map<std::string, std::string>& made_with) {
  const Json found = Json::parse(line, nullptr, false);
  if (!found.is_object() || !found.contains(kFormat) || found[kFormat] != kVersion) {
    return {StatusCode::invalid_file,
            fmt::format("{} holds no answers of an eval in its first line; give another file, or one that is "
                        "not there yet",
                        quote(path))};
  }
  const Json want = header(made_with);
  for (const auto& [key, value] : want.items()) {
    const std::string there = found.contains(key) ? text_of(found[key]) : "nothing";
    if (there == text_of(value)) continue;
    return {StatusCode::invalid_file,
            fmt::format("the answers in {} were made with another {} ({} there, {} here); give the same "
                        "options or another file",
                        quote(path), key, quote(there), quote(text_of(value)))};
  }
  return {};
}

}  // namespace

Status Answers::take_line(const std::string& line, size_t number) {
  const auto damaged = [&](const char* what) {
    return Status(StatusCode::invalid_file,
                  fmt::format("line {} of {} {}; remove that line", number, quote(path_), what));
  };
  const Json row = Json::parse(line, nullptr, false);
  if (!row.is_object()) return damaged("is no JSON object");
  for (const char* key : {"task", "kv", "answer"}) {
    if (!row.contains(key) || !row[key].is_string()) return damaged("has no text where one must be");
  }
  for (const char* key : {"context", "index", "answer_tokens", "prompt_tokens"}) {
    if (!row.contains(key) || !row[key].is_number_integer())
      return damaged("has no number where one must be");
  }
  if (!row.contains("ended") || !row["ended"].is_boolean())
    return damaged("does not say how the answer ended");
  TaskAnswer answer;
  answer.text = row["answer"].get<std::string>();
  answer.n_tokens = row["answer_tokens"].get<int64_t>();
  answer.prompt_tokens = row["prompt_tokens"].get<int64_t>();
  answer.ended = row["ended"].get<bool>();
  const ItemId id = {row["task"].get<std::string>(), row["context"].get<int64_t>(),
                     row["index"].get<int64_t>()};
  answers_[{id, row["kv"].get<std::string>()}] = std::move(answer);
  return {};
}

Result<Answers> Answers::open(const std::string& path, const std::map<std::string, std::string>& made_with) {
  Answers all;
  all.path_ = path;
  all.file_.reset(std::fopen(path.c_str(), "a+b"));
  if (all.file_ == nullptr) {
    return Status(StatusCode::invalid_file, fmt::format("answers cannot be kept in {}: {}", quote(path),
                                                        std::generic_category().message(errno)));
  }
  Result<std::string> content = read_file(path, kMaxFileBytes, true);
  if (!content.ok()) return content.status();
  const size_t whole = content->rfind('\n') + 1;  // npos + 1 is 0
  if (whole == 0) {
    // New, or cut off in its first line: but not any file without a line's end, which would be lost.
    if (!content->empty() && content->rfind("{\"" + std::string(kFormat), 0) != 0)
      return check_header(path, *content, made_with);
    if (::ftruncate(::fileno(all.file_.get()), 0) != 0)
      return Status(StatusCode::io_error, fmt::format("{} cannot be emptied", quote(path)));
    if (Status s = all.write(text_of(header(made_with))); !s.ok()) return s;
    return all;
  }
  size_t number = 0;
  for (size_t at = 0; at < whole;) {
    const size_t end = content->find('\n', at);
    const std::string line = content->substr(at, end - at);
    at = end + 1;
    const Status s = ++number == 1 ? check_header(path, line, made_with) : all.take_line(line, number);
    if (!s.ok()) return s;
  }
  if (whole < content->size() && ::ftruncate(::fileno(all.file_.get()), static_cast<off_t>(whole)) != 0) {
    return Status(StatusCode::io_error,
                  fmt::format("the cut-off last line of {} cannot be removed", quote(path)));
  }
  return all;
}

const TaskAnswer* Answers::find(const ItemId& id, const std::string& kv) const {
  const auto found = answers_.find({id, kv});
  return found == answers_.end() ? nullptr : &found->second;
}

Status Answers::add(const ItemId& id, const std::string& kv, TaskAnswer answer) {
  const Json line = {{"task", id.task},
                     {"context", id.context},
                     {"index", id.index},
                     {"kv", kv},
                     {"prompt_tokens", answer.prompt_tokens},
                     {"answer_tokens", answer.n_tokens},
                     {"ended", answer.ended},
                     {"answer", answer.text}};
  if (Status s = write(text_of(line)); !s.ok()) return s;
  answers_[{id, kv}] = std::move(answer);
  return {};
}

Status Answers::write(const std::string& line) {
  if (file_ == nullptr) return {};
  const std::string text = line + "\n";
  if (std::fwrite(text.data(), 1, text.size(), file_.get()) == text.size() && std::fflush(file_.get()) == 0) {
    return {};
  }
  return {errno == ENOSPC ? StatusCode::disk_full : StatusCode::io_error,
          fmt::format("answers cannot be written to {}: {}", quote(path_),
                      std::generic_category().message(errno))};
}

}  // namespace narrows
