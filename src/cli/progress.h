// A bar on stderr while the prompt is read; nothing where stderr is not a terminal.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include "narrows/engine.h"

namespace narrows::cli {

class ProgressBar {
 public:
  /// Of n tokens, or of other things: then it says how long is left and not how fast it goes.
  explicit ProgressBar(int64_t n, const char* things = "tokens");
  ~ProgressBar();  ///< clears the line
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  /// For Session::prefill: draws, and asks to stop after Ctrl-C. Must not outlive the bar.
  ProgressFn callback();

 private:
  void draw(double done);

  int64_t n_;
  std::string things_;
  bool visible_;
  bool drawn_ = false;
  std::chrono::steady_clock::time_point begin_;
  std::chrono::steady_clock::time_point last_;
};

}  // namespace narrows::cli
