// Files of questions, files of answers, and a run over a tiny model: paired scores, what a resumed run
// repeats (nothing), and hostile lines.
#include <gtest/gtest.h>

#include <fstream>

#include "eval/ruler/ruler.h"
#include "eval/task/questions.h"
#include "eval/task/run.h"
#include "support/refusal.h"
#include "support/session.h"

namespace narrows::testing {
namespace {

std::string content(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

void append(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary | std::ios::app) << text;
}

// --- questions

Result<std::vector<Question>> read(const std::string& text) { return read_questions(text, "q.jsonl"); }

TEST(Questions, AllTheShapesThatAreKnown) {
  const auto all = read(
      "{\"input\": \"A?\", \"outputs\": [\"x\", \"y\"], \"length\": 5}\r\n"
      "\n"
      "{\"question\": \"B?\", \"answer\": \"so\\n#### 18\"}\n"
      "{\"messages\": [{\"role\": \"system\", \"content\": \"S\"}, {\"role\": \"user\", \"content\": "
      "\"C?\"}], "
      "\"answer\": 7}\n"
      "{\"context\": \"T.\", \"input\": \"D?\", \"answers\": [\"z\"], \"answer_prefix\": \"It is\"}");
  ASSERT_TRUE(all.ok()) << all.status().message();
  ASSERT_EQ(all->size(), 4U);
  EXPECT_EQ((*all)[0].expected, (std::vector<std::string>{"x", "y"}));
  EXPECT_EQ((*all)[0].messages[0].role, "user");
  EXPECT_EQ((*all)[1].line, 3);
  EXPECT_EQ((*all)[1].expected[0], "so\n#### 18");
  EXPECT_EQ((*all)[2].messages.size(), 2U);
  EXPECT_EQ((*all)[2].expected[0], "7");
  EXPECT_EQ((*all)[3].messages[0].content, "T.\n\nD?");
  EXPECT_EQ((*all)[3].lead_in, "It is");
}

TEST(Questions, EveryBadLineIsNamed) {
  const std::vector<std::pair<std::string, std::string>> bad = {
      {"nonsense", "no JSON"},
      {"[1]", "no JSON object"},
      {"{\"input\": \"A\"}", "outputs"},
      {"{\"outputs\": [\"A\"]}", "messages"},
      {"{\"input\": 5, \"outputs\": [\"A\"]}", "input"},
      {"{\"input\": \"\", \"outputs\": [\"A\"]}", "empty"},
      {"{\"input\": \"A\", \"outputs\": []}", "empty"},
      {"{\"input\": \"A\", \"outputs\": [\"\"]}", "empty"},
      {"{\"input\": \"A\", \"outputs\": [null]}", "neither"},
      {"{\"input\": \"A\", \"answer\": {}}", "neither"},
      {"{\"messages\": [], \"answer\": 1}", "messages"},
      {"{\"messages\": [\"A\"], \"answer\": 1}", "role"},
      {"{\"messages\": [{\"role\": \"user\"}], \"answer\": 1}", "role"},
      {"{\"input\": \"\xFF\", \"answer\": 1}", "UTF-8"},
      {"{\"input\": \"cut o", "no JSON"},
      {std::string("\0\0", 2), "no JSON"},
      {std::string(100000, '['), "deeply"},
      {"{\"x\":" + std::string(100000, '{'), "deeply"}};
  std::string all = "{\"input\": \"good\", \"answer\": 1}\n";
  for (const auto& [line, word] : bad) {
    expect_refusal(read("{\"input\": \"good\", \"answer\": 1}\n" + line + "\n").status(),
                   StatusCode::invalid_file, {"q.jsonl", "line 2 ", word});
    all += line + "\n";
  }
  // All in one file: the number of each is told.
  const Status s = read(all).status();
  for (size_t i = 0; i < bad.size(); ++i)
    EXPECT_NE(s.message().find(std::to_string(i + 2)), std::string::npos) << i;
  expect_refusal(read("\n \n").status(), StatusCode::invalid_file, {"no question"});
  std::string many;
  for (int i = 0; i < 1000; ++i) many += "x\n";
  EXPECT_LT(read(many).status().message().size(), 1000U);
}

TEST(Questions, WorkedExamplesGoBeforeAndAreNotAsked) {
  std::string text;
  for (int i = 0; i < 10; ++i)
    text += "{\"input\": \"Q" + std::to_string(i) + "\", \"answer\": \"A" + std::to_string(i) + "\"}\n";
  FewShot few{2, 4, 30};
  const auto items = question_items(*read(text), few);
  ASSERT_TRUE(items.ok());
  std::vector<int64_t> lines;
  for (const ItemId& id : items->ids) lines.push_back(id.index);
  EXPECT_EQ(lines, (std::vector<int64_t>{3, 5, 7, 9}));  // of lines 3 to 10
  const auto item = items->make(items->ids[1]);
  ASSERT_TRUE(item.ok());
  ASSERT_EQ(item->messages.size(), 5U);
  EXPECT_EQ(item->messages[2].content, "Q1");
  EXPECT_EQ(item->messages[3].role, "assistant");
  EXPECT_EQ(item->messages[3].content, "A1");
  EXPECT_EQ(item->messages[4].content, "Q4");
  EXPECT_EQ(item->expected, (std::vector<std::string>{"A4"}));
  EXPECT_EQ(item->max_tokens, 30);
  few.few_shot = 10;
  expect_refusal(question_items(*read(text), few).status(), StatusCode::invalid_argument,
                 {"10", "--few-shot"});
}

// --- answers

const std::map<std::string, std::string> kMadeWith = {{"model", "abc"}, {"seed", "1"}};

TEST(Answers, GoOnWhereTheyWere) {
  const TempDir dir;
  const std::string path = dir.path("a.jsonl");
  const ItemId one = {"vt", 4096, 0}, two = {"vt", 4096, 1};
  {
    auto answers = Answers::open(path, kMadeWith);
    ASSERT_TRUE(answers.ok()) << answers.status().message();
    ASSERT_OK(answers->add(one, "klt", {"a \"b\"\n\xC3\xA4", 5, true, 70}));
    ASSERT_OK(answers->add(two, "klt", {"second", 6, false, 71}));
  }
  const std::string whole = content(path);
  append(path, "{\"task\":\"vt\",\"cut o");  // the program was killed while it wrote
  {
    auto answers = Answers::open(path, kMadeWith);
    ASSERT_TRUE(answers.ok()) << answers.status().message();
    EXPECT_EQ(answers->size(), 2U);
    const TaskAnswer* found = answers->find(one, "klt");
    ASSERT_NE(found, nullptr);
    EXPECT_EQ(found->text, "a \"b\"\n\xC3\xA4");
    EXPECT_EQ(found->n_tokens, 5);
    EXPECT_TRUE(found->ended);
    EXPECT_EQ(found->prompt_tokens, 70);
    EXPECT_EQ(answers->find(one, "f16"), nullptr);
    EXPECT_EQ(content(path), whole);
    ASSERT_OK(answers->add(one, "f16", {"x", 1, true, 70}));
  }
  auto answers = Answers::open(path, kMadeWith);
  ASSERT_TRUE(answers.ok());
  EXPECT_EQ(answers->size(), 3U);
}

TEST(Answers, Refusals) {
  const TempDir dir;
  const std::string path = dir.path("a.jsonl");
  ASSERT_TRUE(Answers::open(path, kMadeWith).ok());
  expect_refusal(Answers::open(path, {{"model", "abc"}, {"seed", "2"}}).status(), StatusCode::invalid_file,
                 {"a.jsonl", "seed", "1", "2"});
  append(path, "{\"task\": \"vt\"}\n");
  expect_refusal(Answers::open(path, kMadeWith).status(), StatusCode::invalid_file, {"line 2", "a.jsonl"});
  // A file of something else stays as it is, with or without a line's end.
  for (const char* text : {"my notes", "my notes\n", "{\"a\": 1}\n"}) {
    const std::string other = dir.file("notes.txt", text);
    expect_refusal(Answers::open(other, kMadeWith).status(), StatusCode::invalid_file, {"notes.txt"});
    EXPECT_EQ(content(other), text);
  }
  expect_refusal(Answers::open(dir.path("no/such/folder"), kMadeWith).status(), StatusCode::invalid_file,
                 {"folder"});
  expect_refusal(Answers::open(dir.path(""), kMadeWith).status(), StatusCode::invalid_file, {});
}

// --- a run

const LoadedTiny& tiny() {
  static const LoadedTiny loaded{TinyModel()};
  return loaded;
}

TaskOptions options(const std::vector<std::string>& profiles) {
  TaskOptions o;
  for (const std::string& p : profiles) o.profiles.push_back(kv(p));
  o.n_threads = 1;
  o.prompt = {PrefillProducts::int8, PrefillAttention::f32};
  return o;
}

/// Questions of some hundred bytes, as many tokens.
TaskItems items(int64_t n, int64_t length = 300) {
  TaskItems all;
  for (int64_t i = 0; i < n; ++i) all.ids.push_back({i % 2 == 0 ? "even" : "odd", 0, i});
  all.make = [length](const ItemId& id) -> Result<TaskItem> {
    TaskItem item;
    item.id = id;
    std::string text;
    while (static_cast<int64_t>(text.size()) < length)
      text += std::to_string(id.index * 7919 + static_cast<int64_t>(text.size())) + " ";
    item.messages = {{"user", text}};
    item.expected = {"e", "t"};
    item.max_tokens = 12;
    return item;
  };
  return all;
}

TEST(TaskRun, AnswersAreThoseOfSessionsAlone) {
  Answers answers;
  const auto result = run_task(tiny().model, items(2), options({"kivi-2", "f16", "kivi-2"}), answers);
  ASSERT_TRUE(result.ok()) << result.status().message();
  EXPECT_EQ(result->profiles, (std::vector<std::string>{"f16", "kivi-2"}));  // f16 first, each once
  ASSERT_EQ(result->items.size(), 2U);
  for (const AnsweredItem& item : result->items) {
    const TaskItem asked = *items(2).make(item.id);
    const auto prompt = *item_prompt(tiny().model->tokenizer(), asked, false);
    for (size_t p = 0; p < 2; ++p) {
      auto session = make_session(tiny().model, {.kv = result->profiles[p]});
      ASSERT_OK(session->prefill(prompt));
      std::vector<Token> reply;
      for (const Token t : greedy(*session, 12)) {
        if (tiny().model->tokenizer().is_end(t)) break;
        reply.push_back(t);
      }
      EXPECT_EQ(item.answers[p].n_tokens, static_cast<int64_t>(reply.size()));
      Utf8Stream stream;
      std::string text = stream.push(tiny().model->tokenizer().decode(reply));
      text += stream.flush();
      EXPECT_EQ(item.answers[p].text, text);
      EXPECT_EQ(item.answers[p].prompt_tokens, static_cast<int64_t>(prompt.size()));
      EXPECT_EQ(item.scores[p], score_answer(Score::contains_all, text, asked.expected));
    }
  }
}

TEST(TaskRun, WhatWasAnsweredIsNotAskedAgain) {
  const TempDir dir;
  const auto o = options({"kivi-2"});
  std::string first;
  {
    auto answers = Answers::open(dir.path("a.jsonl"), kMadeWith);
    int calls = 0;  // stops somewhere in the middle
    const auto stop = [&](double done) { return ++calls, done < 0.5; };
    const auto cut = run_task(tiny().model, items(4), o, *answers, stop);
    EXPECT_EQ(cut.status().code(), StatusCode::cancelled);
    EXPECT_GT(answers->size(), 0U);
    EXPECT_LT(answers->size(), 8U);
    first = content(dir.path("a.jsonl"));
  }
  auto answers = Answers::open(dir.path("a.jsonl"), kMadeWith);
  const auto rest = run_task(tiny().model, items(4), o, *answers);
  ASSERT_TRUE(rest.ok());
  EXPECT_EQ(content(dir.path("a.jsonl")).rfind(first, 0), 0U);  // what was there has stayed
  Answers fresh;
  const auto whole = run_task(tiny().model, items(4), o, fresh);
  for (size_t i = 0; i < 4; ++i) {
    for (size_t p = 0; p < 2; ++p) EXPECT_EQ(rest->items[i].answers[p].text, whole->items[i].answers[p].text);
  }
  // A further profile is read alone and gives what it gives beside others.
  const size_t before = answers->size();
  const auto more = run_task(tiny().model, items(4), options({"kivi-2", "kivi-4"}), *answers);
  EXPECT_EQ(answers->size(), before + 4);
  Answers fresh2;
  const auto both = run_task(tiny().model, items(4), options({"kivi-4"}), fresh2);
  for (size_t i = 0; i < 4; ++i) EXPECT_EQ(more->items[i].answers[2].text, both->items[i].answers[1].text);
}

TEST(TaskRun, RowsAreMeansAndPairedDifferences) {
  TaskResult r;
  r.profiles = {"f16", "klt"};
  const auto add = [&](const char* task, int64_t index, double f16, double klt, const char* text) {
    AnsweredItem item;
    item.id = {task, 4096, index};
    item.answers = {{"same", 10, true, 100}, {text, 20, false, 100}};
    item.scores = {f16, klt};
    r.items.push_back(std::move(item));
  };
  add("a", 0, 1, 1, "same");
  add("a", 1, 1, 0.5, "other");
  add("b", 0, 0, 1, "other");
  const auto rows = task_rows(r);
  ASSERT_EQ(rows.size(), 6U);  // a, b, all: f16 and klt
  EXPECT_EQ(rows[0].kv, "f16");
  EXPECT_EQ(rows[0].score, 1);
  EXPECT_EQ(rows[1].score, 0.75);
  EXPECT_EQ(rows[1].score_f16, 1);
  EXPECT_EQ(rows[1].n, 2);
  EXPECT_EQ(rows[1].changed_text, 1);
  EXPECT_EQ(rows[1].difference.worse, 1);
  EXPECT_EQ(rows[1].difference.better, 0);
  EXPECT_EQ(rows[1].answer_tokens, 20);
  EXPECT_EQ(rows[3].difference.better, 1);
  EXPECT_EQ(rows[5].task, "all");
  EXPECT_EQ(rows[5].kv, "klt");
  EXPECT_EQ(rows[5].n, 3);
  EXPECT_DOUBLE_EQ(rows[5].score, (0.75 + 1) / 2);  // tasks count alike
  EXPECT_DOUBLE_EQ(rows[5].difference.mean, (-0.25 + 1) / 2);
  EXPECT_EQ(rows[5].changed_text, 2);
}

TEST(TaskRun, RulerOnATinyModel) {
  RulerOptions o;
  o.tasks = {"niah_single_1", "fwe"};
  o.contexts = {1500};
  o.samples = 1;
  const auto questions = ruler_items(tiny().model->tokenizer(), o);
  ASSERT_TRUE(questions.ok());
  TaskOptions to = options({"kivi-4"});
  to.n_ctx = 1500;
  Answers answers;
  const auto result = run_task(tiny().model, *questions, to, answers);
  ASSERT_TRUE(result.ok()) << result.status().message();
  EXPECT_EQ(task_rows(*result).size(), 6U);
  EXPECT_GT(result->items[0].answers[0].prompt_tokens, 1200);
}

TEST(TaskRun, Refusals) {
  Answers answers;
  expect_refusal(run_task(tiny().model, {}, options({}), answers).status(), StatusCode::invalid_argument,
                 {"question"});
  TaskOptions o = options({});
  o.n_ctx = 305;
  expect_refusal(run_task(tiny().model, items(1), o, answers).status(), StatusCode::invalid_argument,
                 {"305", "12", "question 0"});
  // A template that refuses what a line has: the line is named.
  TinyModel strict;
  strict.edit_metadata = [](gguf_context* file) {
    gguf_set_val_str(file, "tokenizer.chat_template", "{{ raise_exception('no such role') }}");
  };
  const LoadedTiny refusing(strict);
  const auto asked = question_items(*read("\n{\"input\": \"A\", \"answer\": 1}"), {});
  expect_refusal(run_task(refusing.model, *asked, options({}), answers).status(),
                 StatusCode::invalid_argument, {"line 2", "no such role"});
  EXPECT_EQ(
      run_task(tiny().model, items(1), options({}), answers, [](double) { return false; }).status().code(),
      StatusCode::cancelled);
}

}  // namespace
}  // namespace narrows::testing
