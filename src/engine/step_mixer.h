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

#include "exec/cuda/block_mixer.h"
#include "exec/cuda/klt_mixer.h"
#include "exec/executor.h"
#include "kv/kv_cache.h"
#include "kv/step/step_scratch.h"

namespace narrows {

/// One sequence's part of a step: its cache, and what the layers work in.
struct StepSequence {
  KvCache* cache = nullptr;
  StepScratch* scratch = nullptr;
};

class StepMixer final : public Mixer {
 public:
  StepMixer(int max_sequences, int n_threads);

  /// The sequences of the next run, all of them with caches on a GPU or all on the host, row i of which is
  /// sequence i's: max_sequences at most, whose step has begun; their scratch is made for the executor's
  /// threads. A sequence's numbers are the same to the last bit whatever the others are, and as many as they
  /// are, and with any number of threads.
  void begin(std::span<const StepSequence> sequences);

  void mix(const LayerPlan& layer, const MixRows& rows, Team& team) override;
  DeviceMixer* on_device() override { return on_device_; }
  void measure_from(int64_t now_ns) override;
  std::array<int64_t, 4> measured(int64_t now_ns) override;

  /// Called on one thread with the first sequence's rows of each layer that attends once they are mixed:
  /// for eval and tests. Empty: not.
  void observe(std::function<void(int64_t layer, const DecodeStep&)> seen);

 private:
  void share_sequences();
  static DecodeStep step_of(const LayerPlan& layer, const MixRows& rows, int64_t sequence);
  void prepare_sequence(const LayerPlan& layer, const MixRows& rows, int64_t sequence, int64_t first,
                        int64_t end) const;

  std::span<const StepSequence> sequences_;  ///< of the running step
  std::vector<int> by_tokens_;               ///< [max_sequences] sequences, longest first
  std::vector<int> owner_;  ///< [max_sequences] thread that attends for all of a sequence; -1: all threads do
  std::vector<int64_t> load_;  ///< [threads] tokens of their sequences
  int n_shared_ = 0;           ///< sequences that all threads attend for
  std::function<void(int64_t, const DecodeStep&)> seen_;
  // Of sequences whose caches are on a GPU, as these are.
  BlockMixer blocks_;
  KltMixer klt_;
  std::vector<BlockMixer::Row> rows_;
  DeviceMixer* on_device_ = nullptr;  ///< the one of the running step
};

}  // namespace narrows
