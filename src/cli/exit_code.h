// What a command hands back to main(), and the one table that makes an exit code of it:
// 0 done, 1 the work failed, 2 the command line or an input file is wrong.
#pragma once

#include <utility>

#include "narrows/status.h"

namespace narrows::cli {

/// Some failures are the user's before the work has begun (a prompt too long, a cache larger than the
/// machine) and the machine's afterwards.
enum class Phase { before_work, at_work };

struct [[nodiscard]] Outcome {
  Status status;
  Phase phase = Phase::before_work;

  Outcome() = default;
  Outcome(Status failed) : status(std::move(failed)) {}
  Outcome(Status failed, Phase when) : status(std::move(failed)), phase(when) {}
};

inline constexpr int kExitDone = 0;
inline constexpr int kExitFailed = 1;
inline constexpr int kExitUsage = 2;

int exit_code(const Outcome& outcome);

}  // namespace narrows::cli
