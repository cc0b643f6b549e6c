// Ctrl-C: a flag that the long loops look at, so that a run ends with its summary and a chat returns to its
// prompt.
#pragma once

namespace narrows::cli {

/// Catches SIGINT and ignores SIGPIPE (a closed pipe is then an error of the write). System calls are
/// interrupted. Where nobody looks at the flag, the third Ctrl-C in a row ends the process.
void install_signal_handlers();

bool interrupted();
void clear_interrupt();

}  // namespace narrows::cli
