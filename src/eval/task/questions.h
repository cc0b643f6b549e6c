// Questions of a file, a JSON object a line: "input" or "question" (a text, behind that of "context" if there
// is one) or "messages" ([{"role", "content"}, ...]), with "outputs", "answer" or "answers": a text, a number
// or a list of them; "answer_prefix": how the answer begins. Other fields are left alone, so that files of
// RULER's own generator, LongBench and GSM8K are read as they are.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "eval/task/item.h"

namespace narrows {

struct Question {
  int64_t line = 0;  ///< from 1
  std::vector<ChatMessage> messages;
  std::string lead_in;
  std::vector<std::string> expected;
};

/// Lines of white space are left out. invalid_file names `path` and the numbers of all lines that are wrong
/// (of the first ten what is wrong), or says that there is no question.
Result<std::vector<Question>> read_questions(std::string_view text, const std::string& path);

struct FewShot {
  int64_t few_shot = 0;  ///< the first so many questions go before each of the others, with their answers
  int64_t samples = 0;   ///< at most so many of the others, evenly spread over the file; 0: all
  int64_t max_tokens = 256;
};

/// The questions behind the worked examples. As messages, an example is its own, and the first of its
/// expected answers by the assistant. invalid_argument if no question is left behind the examples.
Result<TaskItems> question_items(std::vector<Question> questions, const FewShot& options);

}  // namespace narrows
