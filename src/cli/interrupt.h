// Ctrl-C: a flag that the long loops look at, so that a run ends with its summary and a chat returns to its
// prompt.
#pragma once

namespace narrows::cli {

/// Catches SIGINT and ignores SIGPIPE (a closed pipe is then an error of the write). System calls are
/// interrupted. Where nobody looks at the flag, the third Ctrl-C in a row ends the process.
void install_signal_handlers();

/// From here on SIGTERM and SIGHUP too end the loops, so that what has been read can be saved; but not one
/// that the program was started to ignore, as nohup does. The third of them ends the process.
void catch_end_signals();

bool interrupted();      ///< by any of them
bool told_to_end();      ///< by SIGTERM or SIGHUP
void clear_interrupt();  ///< forgets Ctrl-C

}  // namespace narrows::cli
