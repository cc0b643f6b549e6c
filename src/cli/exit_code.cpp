// The table of exit codes.
#include "cli/exit_code.h"

namespace narrows::cli {

int exit_code(const Outcome& outcome) {
  const bool before = outcome.phase == Phase::before_work;
  // A row a code, and the compiler names a code that is forgotten. NOLINTNEXTLINE(bugprone-branch-clone)
  switch (outcome.status.code()) {
    case StatusCode::ok:
      return kExitDone;
    case StatusCode::invalid_argument:
      return kExitUsage;
    case StatusCode::invalid_file:
      return kExitUsage;
    case StatusCode::unsupported:
      return kExitUsage;
    case StatusCode::context_full:
      return before ? kExitUsage : kExitFailed;
    case StatusCode::out_of_memory:
      return before ? kExitUsage : kExitFailed;
    case StatusCode::disk_full:
      return kExitUsage;  // the place named on the command line is wrong
    case StatusCode::io_error:
      return kExitFailed;
    case StatusCode::cancelled:
      return kExitFailed;
    case StatusCode::non_finite:
      return kExitFailed;
    case StatusCode::internal:
      return kExitFailed;
  }
  return kExitFailed;
}

}  // namespace narrows::cli
