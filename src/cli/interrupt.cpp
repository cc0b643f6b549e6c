// The handler only counts: everything else would not be safe inside a signal.
#include "cli/interrupt.h"

#include <signal.h>

#include <initializer_list>

namespace narrows::cli {
namespace {

constexpr int kPatience = 3;
volatile sig_atomic_t g_count = 0;
volatile sig_atomic_t g_end_count = 0;

extern "C" void on_interrupt(int signal_number) {
  g_count = g_count + 1;
  if (g_count >= kPatience) {
    (void)::signal(signal_number, SIG_DFL);
    (void)::raise(signal_number);
  }
}

extern "C" void on_end(int signal_number) {
  g_end_count = g_end_count + 1;
  if (g_end_count >= kPatience) {
    (void)::signal(signal_number, SIG_DFL);
    (void)::raise(signal_number);
  }
}

}  // namespace

void catch_end_signals() {
  for (const int number : {SIGTERM, SIGHUP}) {
    struct sigaction action = {};
    if (::sigaction(number, nullptr, &action) != 0 || action.sa_handler == SIG_IGN) continue;
    action = {};
    action.sa_handler = on_end;
    (void)::sigemptyset(&action.sa_mask);
    (void)::sigaction(number, &action, nullptr);
  }
}

void install_signal_handlers() {
  struct sigaction action = {};
  action.sa_handler = on_interrupt;
  (void)::sigemptyset(&action.sa_mask);
  action.sa_flags = 0;  // without SA_RESTART: waiting for a line ends too
  (void)::sigaction(SIGINT, &action, nullptr);
  (void)::signal(SIGPIPE, SIG_IGN);
}

bool interrupted() { return g_count > 0 || told_to_end(); }
bool told_to_end() { return g_end_count > 0; }
void clear_interrupt() { g_count = 0; }

}  // namespace narrows::cli
