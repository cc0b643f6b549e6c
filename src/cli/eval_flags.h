// What `narrows eval` was asked, for the file that a task is in.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cli/engine_flags.h"
#include "eval/eval.h"
#include "eval/needle.h"

namespace narrows::cli {

/// What needles are hidden in, or heads are judged on, unless -f says otherwise: every Debian has it.
inline constexpr const char* kEvalFiller = "/usr/share/common-licenses/GPL-3";

struct EvalFlags {
  ModelFlags model;
  std::string file;
  std::vector<std::string> profiles;
  std::string basis;
  std::string peer;
  std::string weights = "file";
  EvalOptions options;
  std::vector<int64_t> contexts = {4096};
  bool context_given = false;
  std::string task;
  std::string needles = "single";
  NeedleOptions needle;
  bool json = false;

  // Tasks of questions, and the long text.
  std::vector<std::string> ruler;
  std::optional<int64_t> samples;
  std::optional<int64_t> tokens;
  int64_t seed = 1;
  std::string resume;
  std::string score = "contains-all";
  int64_t few_shot = 0;
  int64_t max_tokens = 256;
  bool raw = false;

  Result<std::shared_ptr<const Model>> load() const {
    return model.load({.float_weights = weights == "f32"});
  }
};

/// The options of tasks of questions.
void add_task_options(CLI::App& command, EvalFlags& flags);

}  // namespace narrows::cli
