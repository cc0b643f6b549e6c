// The eleven synthetic tasks of RULER (arXiv:2404.06654), written anew: its definitions of what is hidden and
// what is asked, our own words, numbers and filler. Every question is made for a length in the model's own
// tokens, chat template and answer included. docs/quality.md says where it differs.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "eval/task/item.h"

namespace narrows {

/// Names as RULER has them: niah_single_1 .. 3, niah_multikey_1 .. 3, niah_multivalue, niah_multiquery, vt,
/// cwe, fwe.
std::vector<std::string> ruler_tasks();

struct RulerOptions {
  std::vector<std::string> tasks;  ///< empty: all
  std::vector<int64_t> contexts;   ///< tokens of prompt and answer together
  int64_t samples = 20;            ///< questions a task and context
  uint64_t seed = 1;
  std::string filler;  ///< UTF-8; the essays that needles are hidden in; empty: generated sentences
  bool raw = false;    ///< no chat template
};

/// The questions, ordered by context, number, task, so that a run that is ended early has as many of each
/// task; make() fits one to its length: at most `context` tokens with max_tokens of answer, and at least nine
/// tenths of what that leaves for the prompt, whatever the task, if it can be filled so finely. The tokenizer
/// outlives them. invalid_argument: an unknown task (lists the names), no context or sample, a filler without
/// a sentence; of make(): a context that cannot hold the question (both counts).
Result<TaskItems> ruler_items(const Tokenizer& tokenizer, const RulerOptions& options);

}  // namespace narrows
