// The file is not trusted: each field is looked at before it is taken, and nesting is bounded.
#include "eval/task/questions.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

#include "base/utf8.h"

namespace narrows {

namespace {

using Json = nlohmann::json;

constexpr size_t kMostNamed = 10;    ///< lines whose fault is told
constexpr size_t kMostNumbers = 20;  ///< further lines whose number is told
/// Deeper JSON is none of these files', and the parser's tree is freed by recursion.
constexpr int kMostNesting = 32;

bool too_deep(std::string_view line) {
  int depth = 0;
  bool in_text = false;
  for (size_t i = 0; i < line.size(); ++i) {
    if (in_text) {
      if (line[i] == '\\')
        ++i;
      else if (line[i] == '"')
        in_text = false;
    } else if (line[i] == '"') {
      in_text = true;
    } else if (line[i] == '{' || line[i] == '[') {
      if (++depth > kMostNesting) return true;
    } else if (line[i] == '}' || line[i] == ']') {
      --depth;
    }
  }
  return false;
}

/// What is wrong with the line, "" if nothing is.
std::string take_messages(const Json& row, Question& question) {
  for (const char* key : {"input", "question"}) {
    if (!row.contains(key)) continue;
    if (!row[key].is_string()) return fmt::format("\"{}\" is no text", key);
    const std::string text = row[key].get<std::string>();
    if (text.empty()) return fmt::format("\"{}\" is empty", key);
    const bool about = row.contains("context") && row["context"].is_string();
    question.messages.push_back({"user", about ? row["context"].get<std::string>() + "\n\n" + text : text});
    return "";
  }
  if (!row.contains("messages")) return "has none of \"input\", \"question\" and \"messages\"";
  const Json& list = row["messages"];
  if (!list.is_array() || list.empty()) return "\"messages\" is no list, or an empty one";
  for (const Json& message : list) {
    const bool good = message.is_object() && message.contains("role") && message["role"].is_string() &&
                      message.contains("content") && message["content"].is_string();
    if (!good) return "a message is without \"role\" and \"content\" as texts";
    question.messages.push_back({message["role"].get<std::string>(), message["content"].get<std::string>()});
  }
  return "";
}

std::string take_expected(const Json& row, Question& question) {
  for (const char* key : {"outputs", "answer", "answers"}) {
    if (!row.contains(key)) continue;
    const Json list = row[key].is_array() ? row[key] : Json::array({row[key]});
    for (const Json& one : list) {
      if (one.is_string()) {
        question.expected.push_back(one.get<std::string>());
      } else if (one.is_number()) {
        question.expected.push_back(one.dump());
      } else {
        return fmt::format("\"{}\" is neither a text, a number nor a list of them", key);
      }
      // An empty text stands in every answer.
      if (question.expected.back().empty()) return fmt::format("an expected text in \"{}\" is empty", key);
    }
    return question.expected.empty() ? fmt::format("\"{}\" is empty", key) : "";
  }
  return "has none of \"outputs\", \"answer\" and \"answers\"";
}

std::string take_line(std::string_view line, Question& question) {
  if (const size_t bad = find_invalid_utf8(line); bad != std::string::npos)
    return fmt::format("is not UTF-8 at its byte {}", bad);
  if (too_deep(line)) return "is nested too deeply";
  const Json row = Json::parse(line, nullptr, false);
  if (row.is_discarded()) return "is no JSON";
  if (!row.is_object()) return "is no JSON object";
  if (row.contains("answer_prefix") && row["answer_prefix"].is_string())
    question.lead_in = row["answer_prefix"].get<std::string>();
  std::string fault = take_messages(row, question);
  return fault.empty() ? take_expected(row, question) : fault;
}

}  // namespace

Result<std::vector<Question>> read_questions(std::string_view text, const std::string& path) {
  std::vector<Question> questions;
  std::vector<std::string> faults;
  std::vector<int64_t> more;
  int64_t number = 0;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    const std::string_view line = text.substr(at, end - at);
    at = end + 1;
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    Question question;
    question.line = number;
    const std::string fault = take_line(line, question);
    if (fault.empty()) {
      questions.push_back(std::move(question));
    } else if (faults.size() < kMostNamed) {
      faults.push_back(fmt::format("line {} {}", number, fault));
    } else {
      more.push_back(number);
    }
  }
  if (!faults.empty()) {
    std::string rest;
    if (!more.empty()) {
      const size_t told = std::min(more.size(), kMostNumbers);
      rest = fmt::format("; so are lines {}",
                         fmt::join(more.begin(), more.begin() + static_cast<std::ptrdiff_t>(told), ", "));
      if (more.size() > told) rest += fmt::format(" and {} more", more.size() - told);
    }
    return Status(StatusCode::invalid_file,
                  fmt::format("questions of {} are wrong: {}{}", quote(path), fmt::join(faults, "; "), rest));
  }
  if (questions.empty())
    return Status(StatusCode::invalid_file, fmt::format("there is no question in {}", quote(path)));
  return questions;
}

Result<TaskItems> question_items(std::vector<Question> questions, const FewShot& options) {
  const auto n = static_cast<int64_t>(questions.size());
  if (options.few_shot < 0 || options.few_shot >= n) {
    return Status(StatusCode::invalid_argument,
                  fmt::format("the file has {} questions: no one is left behind {} worked examples; lower "
                              "--few-shot",
                              n, options.few_shot));
  }
  auto all = std::make_shared<const std::vector<Question>>(std::move(questions));
  const int64_t n_left = n - options.few_shot;
  const int64_t n_asked = options.samples > 0 ? std::min(options.samples, n_left) : n_left;
  std::map<int64_t, size_t> by_line;
  TaskItems items;
  for (int64_t i = 0; i < n_asked; ++i) {
    const auto at = static_cast<size_t>(options.few_shot + i * n_left / n_asked);
    items.ids.push_back({"file", 0, (*all)[at].line});
    by_line[(*all)[at].line] = at;
  }
  items.make = [all, by_line, options](const ItemId& id) -> Result<TaskItem> {
    const Question& question = (*all)[by_line.at(id.index)];
    TaskItem item;
    item.id = id;
    item.expected = question.expected;
    item.lead_in = question.lead_in;
    item.max_tokens = options.max_tokens;
    for (int64_t i = 0; i < options.few_shot; ++i) {
      const Question& example = (*all)[static_cast<size_t>(i)];
      item.messages.insert(item.messages.end(), example.messages.begin(), example.messages.end());
      item.messages.push_back({"assistant", example.expected.front()});
    }
    item.messages.insert(item.messages.end(), question.messages.begin(), question.messages.end());
    return item;
  };
  return items;
}

}  // namespace narrows
