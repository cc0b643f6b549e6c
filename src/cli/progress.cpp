// Redraws at most ten times a second, and not at all for a prompt that is read at once.
#include "cli/progress.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "cli/interrupt.h"
#include "cli/output.h"

namespace narrows::cli {
namespace {

constexpr int kWidth = 30;
constexpr auto kPause = std::chrono::milliseconds(100);
constexpr const char* kClearLine = "\r\x1b[K";

}  // namespace

ProgressBar::ProgressBar(int64_t n, const char* things)
    : n_(n),
      things_(things),
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
  const double left = share > 0 ? elapsed.count() * (1 - share) / share : 0;
  const std::string speed =
      things_ == "tokens" ? fmt::format("{:.0f} tok/s", share * static_cast<double>(n_) / elapsed.count())
                          : fmt::format("{:.0f} min left", std::ceil(left / 60));
  const std::string line = fmt::format("{}reading {} {} [{:#<{}}{:.<{}}] {:3.0f}% {}", kClearLine, n_,
                                       things_, "", filled, "", kWidth - filled, share * 100, speed);
  (void)std::fputs(line.c_str(), stderr);
}

}  // namespace narrows::cli
