// Runs decode steps in tests: phase by phase on one thread, or on real threads with a barrier between phases.
#pragma once

#include <barrier>
#include <thread>
#include <vector>

#include "kv/cache_data.h"
#include "kv/step/step_scratch.h"

namespace narrows::test {

enum class Run { in_turn, on_threads };

/// One step with token t; the output [n_head, head_dim], or empty after a failure.
inline std::vector<float> run_step(KvLayer& layer, StepScratch& scratch, const Tokens& tokens, int64_t t,
                                   const std::vector<float>& q, Run how = Run::in_turn,
                                   const float* sinks = nullptr) {
  scratch.may_convert = true;
  const Status s = layer.begin_step(scratch);
  EXPECT_TRUE(s.ok()) << s.message();
  if (!s.ok()) return {};
  std::vector<float> out(q.size(), std::numeric_limits<float>::quiet_NaN());
  const DecodeStep step{q.data(), tokens.key(t), tokens.value(t), out.data(), sinks};
  const int n = scratch.n_threads();
  if (how == Run::in_turn) {
    for (int phase = 0; phase < layer.n_phase(); ++phase) {
      for (int i = 0; i < n; ++i) layer.run_phase(phase, step, scratch, i, n);
    }
  } else {
    std::barrier barrier(n);
    std::vector<std::thread> threads;
    for (int i = 0; i < n; ++i) {
      threads.emplace_back([&, i] {
        for (int phase = 0; phase < layer.n_phase(); ++phase) {
          layer.run_phase(phase, step, scratch, i, n);
          barrier.arrive_and_wait();
        }
      });
    }
    for (auto& thread : threads) thread.join();
  }
  layer.end_step();
  return out;
}

/// Positions that a KV head read in the last step: all but those in pages that were neither selected nor are
/// anchors.
inline std::vector<int64_t> positions_read(const KvLayer& layer, int64_t head_kv) {
  std::vector<int64_t> read;
  const auto chosen = layer.last_selection(head_kv);
  for (int64_t t = 0; t < layer.n_tokens(); ++t) {
    if (!chosen || layer.always_reads(t) || std::find(chosen->begin(), chosen->end(), t) != chosen->end())
      read.push_back(t);
  }
  return read;
}

/// What the last step should have written: each KV head's attention over the positions that it read.
inline std::vector<double> attention_of_step(const Heads& s, const std::vector<float>& q, int64_t t,
                                             const KvLayer& layer, const std::vector<float>& sinks = {}) {
  const Decoded decoded(layer);
  std::vector<double> out(q.size());
  const auto part = static_cast<int64_t>(q.size()) / s.shape.n_head_kv;
  for (int64_t g = 0; g < s.shape.n_head_kv; ++g) {
    const auto own = attention(s, q, t, decoded, positions_read(layer, g), g, sinks);
    std::copy_n(own.begin() + g * part, part, out.begin() + g * part);
  }
  return out;
}

}  // namespace narrows::test
