// `narrows eval --task long`: KL by position of a text that f16 writes.
#pragma once

#include <string>

#include "cli/eval_flags.h"
#include "cli/exit_code.h"
#include "eval/long_text.h"

namespace narrows::cli {

Outcome judge_long_text(const EvalFlags& flags);

std::string long_text_table(const LongText& result);
std::string long_text_json(const LongText& result, const LongTextOptions& options);

}  // namespace narrows::cli
