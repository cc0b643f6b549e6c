// Words are counted, not looked up in anything: the scorers know no language.
#include "eval/task/score.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <map>
#include <utility>

namespace narrows {

namespace {

constexpr std::array<std::pair<const char*, Score>, 6> kNames = {{
    {"contains-all", Score::contains_all},
    {"contains-any", Score::contains_any},
    {"exact", Score::exact},
    {"number", Score::number},
    {"f1", Score::f1},
    {"rouge-l", Score::rouge_l},
}};

using Words = std::vector<std::string>;

/// Longest common subsequences are made over tables of words times words: an answer without an end must not
/// become hours.
constexpr size_t kMostRougeWords = 5000;

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_upper(char c) { return c >= 'A' && c <= 'Z'; }
bool is_word_byte(char c) {
  return is_digit(c) || is_upper(c) || (c >= 'a' && c <= 'z') || static_cast<unsigned char>(c) >= 0x80;
}
bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

std::string lower(std::string_view text) {
  std::string out(text);
  for (char& c : out) {
    if (is_upper(c)) c = static_cast<char>(c - 'A' + 'a');
  }
  return out;
}

/// As SQuAD's judge has them: "The cat's." is "cats".
Words plain_words(std::string_view text) {
  Words words;
  std::string word;
  const auto end_word = [&] {
    if (!word.empty() && word != "a" && word != "an" && word != "the") words.push_back(word);
    word.clear();
  };
  for (const char c : lower(text)) {
    if (is_space(c)) {
      end_word();
    } else if (is_word_byte(c)) {
      word += c;
    }
  }
  end_word();
  return words;
}

/// Runs of letters and digits: "cat's" is two words.
Words runs(std::string_view text) {
  Words words(1);
  for (const char c : lower(text)) {
    if (is_word_byte(c)) {
      words.back() += c;
    } else if (!words.back().empty()) {
      words.emplace_back();
    }
  }
  if (words.back().empty()) words.pop_back();
  if (words.size() > kMostRougeWords) words.resize(kMostRougeWords);
  return words;
}

double f_measure(size_t common, size_t a, size_t b) {
  if (a == 0 || b == 0) return a == b ? 1.0 : 0.0;
  return 2.0 * static_cast<double>(common) / static_cast<double>(a + b);
}

double word_f1(const Words& answer, const Words& expected) {
  std::map<std::string, size_t> left;
  for (const std::string& word : expected) ++left[word];
  size_t common = 0;
  for (const std::string& word : answer) {
    const auto found = left.find(word);
    if (found == left.end() || found->second == 0) continue;
    --found->second;
    ++common;
  }
  return f_measure(common, answer.size(), expected.size());
}

double rouge_l(const Words& answer, const Words& expected) {
  std::vector<size_t> row(expected.size() + 1);  // lengths for the answer's words so far
  for (const std::string& word : answer) {
    size_t diagonal = 0;
    for (size_t i = 1; i <= expected.size(); ++i) {
      const size_t above = row[i];
      row[i] = word == expected[i - 1] ? diagonal + 1 : std::max(above, row[i - 1]);
      diagonal = above;
    }
  }
  return f_measure(row.back(), answer.size(), expected.size());
}

/// Reads a number at `at`, which must be its first digit or the point before it; moves on behind it.
std::string read_number(std::string_view text, size_t& at) {
  const size_t begin = at;
  std::string whole, part;
  while (at < text.size() && is_digit(text[at])) whole += text[at++];
  const auto three_digits = [&](size_t i) {
    return i + 3 <= text.size() && is_digit(text[i]) && is_digit(text[i + 1]) && is_digit(text[i + 2]) &&
           (i + 3 == text.size() || !is_digit(text[i + 3]));
  };
  while (!whole.empty() && at < text.size() && text[at] == ',' && three_digits(at + 1)) {
    whole.append(text.substr(at + 1, 3));
    at += 4;
  }
  if (at + 1 < text.size() && text[at] == '.' && is_digit(text[at + 1])) {
    for (++at; at < text.size() && is_digit(text[at]); ++at) part += text[at];
  }
  whole.erase(0, std::min(whole.find_first_not_of('0'), whole.size()));
  part.erase(part.find_last_not_of('0') + 1);
  std::string number = (whole.empty() ? "0" : whole) + (part.empty() ? "" : "." + part);
  // A minus between two things takes one from the other; at the beginning of one it is a sign.
  const bool minus = begin > 0 && text[begin - 1] == '-' &&
                     (begin < 2 || (!is_word_byte(text[begin - 2]) && text[begin - 2] != ')'));
  return minus && number != "0" ? "-" + number : number;
}

std::vector<std::string> numbers(std::string_view text) {
  std::vector<std::string> all;
  for (size_t at = 0; at < text.size();) {
    const bool point = text[at] == '.' && at + 1 < text.size() && is_digit(text[at + 1]);
    if (is_digit(text[at]) || point) {
      all.push_back(read_number(text, at));
    } else {
      ++at;
    }
  }
  return all;
}

double score_one(Score score, std::string_view answer, const std::string& expected) {
  switch (score) {
    case Score::contains_all:
    case Score::contains_any:
      return lower(answer).find(lower(expected)) != std::string::npos ? 1 : 0;
    case Score::exact:
      return plain_words(answer) == plain_words(expected) ? 1 : 0;
    case Score::number: {
      const auto want = final_number(expected), have = final_number(answer);
      return want && have && *want == *have ? 1 : 0;
    }
    case Score::f1:
      return word_f1(plain_words(answer), plain_words(expected));
    case Score::rouge_l:
      return rouge_l(runs(answer), runs(expected));
  }
  return 0;
}

}  // namespace

std::optional<std::string> final_number(std::string_view text) {
  constexpr std::string_view kMark = "####";
  if (const size_t mark = text.rfind(kMark); mark != std::string_view::npos) {
    const auto marked = numbers(text.substr(mark + kMark.size()));
    if (!marked.empty()) return marked.front();
  }
  const auto all = numbers(text);
  if (all.empty()) return std::nullopt;
  return all.back();
}

double score_answer(Score score, std::string_view answer, std::span<const std::string> expected) {
  double best = 0, sum = 0;
  for (const std::string& one : expected) {
    const double s = score_one(score, answer, one);
    best = std::max(best, s);
    sum += s;
  }
  if (expected.empty()) return 0;
  return score == Score::contains_all ? sum / static_cast<double>(expected.size()) : best;
}

Result<Score> parse_score(std::string_view name) {
  for (const auto& [known, score] : kNames) {
    if (name == known) return score;
  }
  return Status(StatusCode::invalid_argument,
                fmt::format("there is no score '{}'; there are {}", name, fmt::join(score_names(), ", ")));
}

const char* score_name(Score score) {
  for (const auto& [name, known] : kNames) {
    if (known == score) return name;
  }
  return "";
}

std::vector<std::string> score_names() {
  std::vector<std::string> names;
  for (const auto& [name, score] : kNames) names.emplace_back(name);
  return names;
}

}  // namespace narrows
