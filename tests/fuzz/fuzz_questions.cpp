// Files of questions and of answers, which people write and edit: read, asked and scored, or refused in one
// line. The first byte says which of them the rest is.
#include <cmath>
#include <map>

#include "eval/task/answers.h"
#include "eval/task/questions.h"
#include "eval/task/score.h"
#include "fuzz/fuzz.h"

namespace narrows::fuzz {

namespace {

const std::map<std::string, std::string> kMadeWith = {{"model", "abc"}, {"seed", "1"}};

void read_as_answers(const uint8_t* data, size_t size) {
  const MemoryFile file(data, size);
  const Result<Answers> answers = Answers::open(file.path(), kMadeWith);
  if (!answers.ok()) {
    check(answers.status().code() == StatusCode::invalid_file, "another code");
    check_sentence(answers.status());
    return;
  }
  ++g_accepted;
  // What was read can be read again, and is as much.
  const Result<Answers> again = Answers::open(file.path(), kMadeWith);
  check(again.ok() && again->size() == answers->size(), "answers that were taken are not taken again");
}

void read_as_questions(std::string_view text) {
  Result<std::vector<Question>> questions = read_questions(text, "q.jsonl");
  if (!questions.ok()) {
    check(questions.status().code() == StatusCode::invalid_file, "another code");
    check_sentence(questions.status());
    return;
  }
  ++g_accepted;
  const FewShot few{static_cast<int64_t>(questions->size()) / 2, 3, 10};
  const Result<TaskItems> items = question_items(std::move(*questions), few);
  check(items.ok(), "questions were refused");
  for (const ItemId& id : items->ids) {
    const Result<TaskItem> item = items->make(id);
    check(item.ok() && !item->expected.empty() && !item->messages.empty(), "a question without a part");
    for (const std::string& name : score_names()) {
      const Score how = *parse_score(name);
      for (const std::string& answer : {item->expected.front(), item->messages.front().content}) {
        const double worth = score_answer(how, answer, item->expected);
        check(worth >= 0 && worth <= 1, "a score out of range");
      }
      check(how == Score::number ||
                score_answer(how, item->expected.front(), {&item->expected.front(), 1}) == 1,
            "the right answer is not worth 1");
    }
  }
}

}  // namespace

std::vector<Seed> seeds() {
  const std::string questions =
      "Q{\"input\": \"What?\", \"outputs\": [\"one 1,200.50\", \"\\u00e4\"]}\n\n"
      "{\"question\": \"B\", \"answer\": \"so #### -18\", \"x\": [[1]]}\r\n"
      "{\"messages\": [{\"role\": \"user\", \"content\": \"C\"}], \"answers\": [7, 1e5]}\n"
      "{\"context\": \"T\", \"input\": \"D\", \"answer\": 3, \"answer_prefix\": \"It\"}";
  const std::string answers =
      "A{\"narrows_answers\":1,\"model\":\"abc\",\"seed\":\"1\"}\n"
      "{\"task\":\"vt\",\"context\":4096,\"index\":0,\"kv\":\"klt\",\"prompt_tokens\":9,\"answer_tokens\":2,"
      "\"ended\":true,"
      "\"answer\":\"x\"}\n"
      "{\"task\":\"file\",\"context\":0,\"index\":3,\"kv\":\"f16\",\"prompt_tokens\":9,\"answer_tokens\":2,"
      "\"ended\":false,"
      "\"answer\":\"\"}\n";
  return {{questions, 60}, {answers, 60}};
}

}  // namespace narrows::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace narrows;
  if (size == 0) return 0;
  if (data[0] == 'A') {
    fuzz::read_as_answers(data + 1, size - 1);
  } else {
    fuzz::read_as_questions({reinterpret_cast<const char*>(data) + 1, size - 1});
  }
  return 0;
}
