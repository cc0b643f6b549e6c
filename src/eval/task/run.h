// A task over cache profiles: every question is read once for all of them, in exact attention, each answers
// out of its own cache, always taking the likeliest token, and the scores are compared question by question
// with those of f16.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "eval/task/answers.h"
#include "eval/task/item.h"
#include "eval/task/paired.h"
#include "eval/task/score.h"
#include "narrows/engine.h"

namespace narrows {

struct TaskOptions {
  std::vector<KvProfile> profiles;  ///< f16 comes first, asked for or not; what is there twice counts once
  std::string basis_path;
  int64_t n_ctx = 0;  ///< of every session; 0: what the model was made for
  int n_threads = 0;
  PromptOptions prompt;
  bool raw = false;  ///< no chat template
  Score score = Score::contains_all;
};

/// A question with the answers of all profiles.
struct AnsweredItem {
  ItemId id;
  std::vector<std::string> expected;
  std::vector<TaskAnswer> answers;  ///< [profile]
  std::vector<double> scores;       ///< [profile]
};

/// One profile in one task at one context; or, with the task "all", in all of them.
struct TaskRow {
  std::string task, kv;
  int64_t context = 0;       ///< as asked for, or the most tokens of a prompt of the file
  int64_t n = 0;             ///< questions
  double prompt_tokens = 0;  ///< mean
  double answer_tokens = 0;  ///< mean
  double score = 0;          ///< mean; of "all": of the tasks' means
  double score_f16 = 0;
  int64_t changed_text = 0;  ///< answers that are not f16's word for word
  PairedDifference difference;
};

struct TaskResult {
  std::vector<std::string> profiles;
  std::vector<AnsweredItem> items;
};

/// Answers what `answers` does not hold, and adds it there. invalid_argument: no question, too many profiles,
/// a question that the context cannot hold together with its answer (its number, both counts);
/// out_of_memory: all caches together at that context; what sessions refuse. After `cancelled` the answers so
/// far are in `answers`.
Result<TaskResult> run_task(const std::shared_ptr<const Model>& model, const TaskItems& items,
                            const TaskOptions& options, Answers& answers, const ProgressFn& progress = {});

/// By context, task in the order of the questions, profile; "all" behind the tasks where they are several.
std::vector<TaskRow> task_rows(const TaskResult& result);

}  // namespace narrows
