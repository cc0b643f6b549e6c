// The time of the stages of a decode step, as one thread sees it: the decoder says which stage begins, what
// passes until the next one is that stage's, waiting for other threads included. Off, it costs a branch a
// stage.
#pragma once

#include <array>
#include <cstdint>

#include "base/clock.h"

namespace narrows {

/// What attention over a cache is made of: in this order.
enum class AttentionStage : uint8_t { score, select, rebuild, attend };
inline constexpr size_t kAttentionStages = 4;

class StageClock {
 public:
  using Times = std::array<int64_t, kAttentionStages>;  ///< nanoseconds

  /// Counts from `now` on, from zero; what comes before the first enter() is attention's own.
  void start(int64_t now) {
    times_ = {};
    last_ = now;
    stage_ = AttentionStage::attend;
    on_ = true;
  }
  void enter(AttentionStage stage) {
    if (on_) turn_to(stage, monotonic_ns());
  }
  /// Ends the counting.
  const Times& stop(int64_t now) {
    if (on_) turn_to(AttentionStage::attend, now);
    on_ = false;
    return times_;
  }

 private:
  void turn_to(AttentionStage stage, int64_t now) {
    times_[static_cast<size_t>(stage_)] += now - last_;
    last_ = now;
    stage_ = stage;
  }

  bool on_ = false;
  AttentionStage stage_ = AttentionStage::attend;
  int64_t last_ = 0;
  Times times_{};
};

}  // namespace narrows
