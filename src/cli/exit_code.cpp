// The table of exit codes.
#include "cli/exit_code.h"

namespace narrows::cli {

int exit_code(const Outcome& outcome) {
  const bool before = outcome.phase == Phase::before_work;
  switch (outcome.status.code()) {
    case StatusCode::ok:
      return kExitDone;
    case StatusCode::invalid_argument:
    case StatusCode::invalid_file:
    case StatusCode::unsupported:
    case StatusCode::disk_full:  // the place named on the command line is wrong
      return kExitUsage;
    case StatusCode::context_full:
    case StatusCode::out_of_memory:
      return before ? kExitUsage : kExitFailed;
    case StatusCode::io_error:
    case StatusCode::cancelled:
    case StatusCode::non_finite:
    case StatusCode::internal:
      return kExitFailed;
  }
  return kExitFailed;
}

}  // namespace narrows::cli
