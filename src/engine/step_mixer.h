// The mix stage of a step of one or several sequences: norms of heads and the phases of each sequence's
// cache. Where sequences are as many as threads or more, a thread does all of the attention of one, and
// attention costs a single barrier. Pipeline step 6.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "decode/layer_decoder.h"
#include "decode/stage_clock.h"
#include "exec/executor.h"

namespace narrows {

/// One sequence's part of a step: its decoders, one a layer, and what they work in.
struct DecodeLane {
  std::span<const std::unique_ptr<LayerDecoder>> decoders;
  StepScratch* scratch = nullptr;
  int64_t n_tokens = 0;  ///< in its cache
};

class StepMixer final : public Mixer {
 public:
  StepMixer(int max_lanes, int n_threads);

  /// The lanes of the next run, row i of which is lane i's: max_lanes at most, whose decoders have been
  /// prepared; their scratch is made for the executor's threads. A lane's numbers are the same to the last
  /// bit whatever the others are, and as many as they are, and with any number of threads.
  void begin(std::span<const DecodeLane> lanes);

  void mix(const LayerPlan& layer, const MixRows& rows, Team& team) override;
  void measure_from(int64_t now_ns) override;
  std::array<int64_t, 4> measured(int64_t now_ns) override;

  /// Called on one thread with the first lane's rows of each layer once they are mixed: for eval and tests.
  /// Empty: not.
  void observe(std::function<void(int64_t layer, const DecodeStep&)> seen) { seen_ = std::move(seen); }

 private:
  void share_lanes();
  static DecodeStep step_of(const MixRows& rows, int64_t lane);
  static void norm_lane(const LayerPlan& layer, const MixRows& rows, int64_t lane, int64_t first,
                        int64_t end);

  std::span<const DecodeLane> lanes_;  ///< of the running step
  std::vector<int> by_tokens_;         ///< [max_lanes] lanes, longest first
  std::vector<int> owner_;     ///< [max_lanes] thread that attends for all of a lane; -1: all threads do
  std::vector<int64_t> load_;  ///< [threads] tokens of their lanes
  int n_shared_ = 0;           ///< lanes that all threads attend for
  std::function<void(int64_t, const DecodeStep&)> seen_;
};

}  // namespace narrows
