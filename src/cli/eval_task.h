// `narrows eval --task ruler` and `--task file`: questions, answers, scores against those of f16.
#pragma once

#include <string>
#include <vector>

#include "cli/eval_flags.h"
#include "cli/exit_code.h"
#include "eval/task/run.h"

namespace narrows::cli {

Outcome judge_ruler(const EvalFlags& flags);
Outcome judge_file(const EvalFlags& flags);

std::string task_table(const std::vector<TaskRow>& rows);
/// With every answer.
std::string task_json(const std::vector<TaskRow>& rows, const TaskResult& result);

}  // namespace narrows::cli
