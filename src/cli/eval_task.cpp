// Questions from the generator or a file, through the runner, to a table.
#include "cli/eval_task.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>

#include "base/checksum.h"
#include "base/file.h"
#include "base/utf8.h"
#include "cli/output.h"
#include "cli/progress.h"
#include "eval/ruler/ruler.h"
#include "eval/task/questions.h"

namespace narrows::cli {
namespace {

constexpr int64_t kMaxQuestionBytes = int64_t{1} << 30;
constexpr int64_t kRulerSamples = 20;

std::string checksum(const std::string& text) {
  Checksum sum;
  sum.add(text.data(), text.size());
  return fmt::format("{:016x}", sum.value());
}

/// Everything that changes an answer, but for what a question's name says (task, context, number) and the
/// profile.
std::map<std::string, std::string> made_with(const EvalFlags& flags, const Model& model) {
  const PromptOptions& prompt = flags.options.prompt;
  return {{"version", NARROWS_VERSION},
          {"model", model.info().fingerprint},
          {"weights", flags.weights},
          {"basis", flags.basis},
          {"products", std::to_string(static_cast<int>(prompt.products))},
          {"attention", attention_name(prompt.attention)},
          {"prefill mass", std::to_string(prompt.mass)},
          {"template", flags.raw ? "none" : "the model's"}};
}

Outcome ask(const EvalFlags& flags, const std::shared_ptr<const Model>& model, const TaskItems& items,
            TaskOptions options, const std::map<std::string, std::string>& with) {
  options.profiles = flags.options.profiles;
  options.basis_path = flags.basis;
  options.n_threads = flags.options.n_threads;
  options.prompt = flags.options.prompt;
  options.raw = flags.raw;
  Answers answers;
  if (!flags.resume.empty()) {
    Result<Answers> opened = Answers::open(flags.resume, with);
    if (!opened.ok()) return opened.status();
    answers = std::move(*opened);
    if (answers.size() > 0)
      note(fmt::format("{} holds {} answers already", quote(flags.resume), answers.size()));
  }
  ProgressBar bar(static_cast<int64_t>(items.ids.size()), "questions");
  const Result<TaskResult> result = run_task(model, items, options, answers, bar.callback());
  if (!result.ok()) {
    if (result.status().code() == StatusCode::cancelled && !flags.resume.empty()) {
      return {Status(StatusCode::cancelled,
                     fmt::format("interrupted with {} answers in {}; the same command goes on from there",
                                 answers.size(), quote(flags.resume))),
              Phase::at_work};
    }
    return {result.status(), Phase::at_work};
  }
  const std::vector<TaskRow> rows = task_rows(*result);
  return {write_stdout(flags.json ? task_json(rows, *result) : task_table(rows)), Phase::at_work};
}

}  // namespace

Outcome judge_ruler(const EvalFlags& flags) {
  RulerOptions options;
  options.tasks = flags.ruler;
  options.contexts = flags.contexts;
  options.samples = flags.samples.value_or(kRulerSamples);
  options.seed = static_cast<uint64_t>(flags.seed);
  options.raw = flags.raw;
  if (!flags.file.empty()) {
    Result<std::string> text = read_text_file(flags.file);
    if (!text.ok()) return text.status();
    options.filler = std::move(*text);
  }
  const Result<std::shared_ptr<const Model>> model = flags.load();
  if (!model.ok()) return model.status();
  const Result<TaskItems> items = ruler_items((*model)->tokenizer(), options);
  if (!items.ok()) return items.status();
  TaskOptions task;
  task.n_ctx = *std::max_element(flags.contexts.begin(), flags.contexts.end());
  auto with = made_with(flags, **model);
  with["task"] = "ruler";
  with["seed"] = std::to_string(flags.seed);
  with["filler"] = options.filler.empty() ? "generated" : checksum(options.filler);
  return ask(flags, *model, *items, task, with);
}

Outcome judge_file(const EvalFlags& flags) {
  if (flags.file.empty())
    return Status(StatusCode::invalid_argument,
                  "--task file needs a file of questions: give one with -f FILE");
  if (flags.contexts.size() != 1)
    return Status(StatusCode::invalid_argument,
                  "--task file takes one --context: the most that a prompt and its answer may have");
  const Result<Score> score = parse_score(flags.score);
  if (!score.ok()) return score.status();
  // Not read_text_file(): a line that is no UTF-8 is to be named.
  Result<std::string> text = read_file(flags.file, kMaxQuestionBytes);
  if (!text.ok()) return text.status();
  drop_byte_order_mark(*text);
  Result<std::vector<Question>> questions = read_questions(*text, flags.file);
  if (!questions.ok()) return questions.status();
  const Result<TaskItems> items =
      question_items(std::move(*questions), {flags.few_shot, flags.samples.value_or(0), flags.max_tokens});
  if (!items.ok()) return items.status();
  const Result<std::shared_ptr<const Model>> model = flags.load();
  if (!model.ok()) return model.status();
  TaskOptions task;
  task.score = *score;
  task.n_ctx = flags.context_given ? flags.contexts.front() : 0;
  auto with = made_with(flags, **model);
  with["task"] = "file";
  with["file"] = checksum(*text);
  with["few-shot"] = std::to_string(flags.few_shot);
  with["max-tokens"] = std::to_string(flags.max_tokens);
  return ask(flags, *model, *items, task, with);
}

void add_task_options(CLI::App& command, EvalFlags& flags) {
  command.add_option("--ruler", flags.ruler, "ruler: these of its tasks (default: all eleven)")
      ->type_name("TASK[,TASK]")
      ->delimiter(',')
      ->check(CLI::IsMember(ruler_tasks()));
  command
      .add_option(
          "--samples", flags.samples,
          "ruler: questions a task (default 20); file: at most so many, spread over it (default: all); "
          "long: texts (default 1)")
      ->type_name("N")
      ->check(whole_number(1, 1'000'000));
  command
      .add_option("--seed", flags.seed,
                  "ruler, long: another seed makes other questions or texts (default 1)")
      ->type_name("S")
      ->check(whole_number(0, 0xFFFFFFFE));
  command
      .add_option(
          "--score", flags.score,
          "file: contains-all (share of the outputs in the answer, default), contains-any, exact, number "
          "(the last one, or the one behind ####), f1, rouge-l")
      ->type_name("NAME")
      ->check(CLI::IsMember(score_names()));
  command
      .add_option("--few-shot", flags.few_shot,
                  "file: its first N questions go before each as worked examples")
      ->type_name("N")
      ->check(whole_number(0, 1000));
  command.add_option("--max-tokens", flags.max_tokens, "file: most tokens of an answer (default 256)")
      ->type_name("N")
      ->check(whole_number(1, 1'000'000));
  command
      .add_option("--resume", flags.resume,
                  "ruler, file: keep answers in this file as they come, and do not ask again what is in it")
      ->type_name("FILE");
  command.add_flag("--raw", flags.raw, "ruler, file: no chat template (a model without one has none anyway)");
}

}  // namespace narrows::cli
