// Redraws at most ten times a second, and not at all for a prompt that is read at once.
#include "cli/progress.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>

#include "cli/interrupt.h"
#include "cli/output.h"

namespace narrows::cli {
namespace {

constexpr int kWidth = 30;
constexpr auto kPause = std::chrono::milliseconds(100);
constexpr const char* kClearLine = "\r\x1b[K";

}  // namespace

ProgressBar::ProgressBar(int64_t n_tokens)
    : n_tokens_(n_tokens),
      visible_(stderr_is_terminal()),
      begin_(std::chrono::steady_clock::now()),
      last_(begin_) {}

ProgressBar::~ProgressBar() {
  if (drawn_) (void)std::fputs(kClearLine, stderr);
}

ProgressFn ProgressBar::callback() {
  return [this](double done) {
    draw(done);
    return !interrupted();
  };
}

void ProgressBar::draw(double done) {
  const auto now = std::chrono::steady_clock::now();
  if (!visible_ || now - last_ < kPause) return;
  last_ = now;
  drawn_ = true;
  const double share = std::clamp(done, 0.0, 1.0);
  const std::chrono::duration<double> elapsed = now - begin_;
  const auto filled = static_cast<int>(share * kWidth);
  const std::string line = fmt::format("{}reading {} tokens [{:#<{}}{:.<{}}] {:3.0f}% {:.0f} tok/s",
                                       kClearLine, n_tokens_, "", filled, "", kWidth - filled, share * 100,
                                       share * static_cast<double>(n_tokens_) / elapsed.count());
  (void)std::fputs(line.c_str(), stderr);
}

}  // namespace narrows::cli
