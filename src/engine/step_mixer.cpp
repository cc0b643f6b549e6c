#include "engine/step_mixer.h"

#include <algorithm>
#include <numeric>

#include "base/part.h"
#include "kv/step/step_scratch.h"

namespace narrows {

namespace {

/// What attention of a sequence costs beside its tokens, in tokens.
constexpr int64_t kSequenceTokens = 256;

}  // namespace

StepMixer::StepMixer(int max_sequences, int n_threads)
    : by_tokens_(static_cast<size_t>(max_sequences)),
      owner_(static_cast<size_t>(max_sequences)),
      load_(static_cast<size_t>(n_threads)) {}

void StepMixer::begin(std::span<const StepSequence> sequences) {
  sequences_ = sequences;
  const KvCache& first = *sequences.front().cache;
  on_device_ = first.place().f16 != nullptr   ? static_cast<DeviceMixer*>(&blocks_)
               : first.place().klt != nullptr ? &klt_
                                              : nullptr;
  if (on_device_ == &klt_) {
    return klt_.begin_step(
        std::ssize(sequences), first.n_layer(), [this](int64_t row, int64_t layer) -> CudaKltLayer& {
          return static_cast<CudaKltLayer&>(sequences_[static_cast<size_t>(row)].cache->layer(layer));
        });
  }
  if (on_device_ != nullptr) {
    rows_.clear();
    for (const StepSequence& s : sequences)
      rows_.push_back({s.cache->place().f16.get(), s.cache->n_tokens()});
    return blocks_.begin_step(rows_, [this](int64_t row, const LayerPlan& l) -> const kernels::RopeTable& {
      return sequences_[static_cast<size_t>(row)].cache->layer(l.index).rope();
    });
  }
  share_sequences();
}

/// Which sequences a thread attends for alone: that needs no barriers, and parts that do not fit the number
/// of threads (3 KV heads on 2 threads) cost nothing. The longest sequences are shared by all threads where
/// the rest would keep one of them waiting.
void StepMixer::share_sequences() {
  const auto n_lane = static_cast<int>(sequences_.size());
  const auto n_threads = static_cast<int64_t>(load_.size());
  const auto cost = [&](int sequence) {
    return sequences_[static_cast<size_t>(sequence)].cache->n_tokens() + kSequenceTokens;
  };
  const auto by_tokens = std::span(by_tokens_).first(sequences_.size());
  std::iota(by_tokens.begin(), by_tokens.end(), 0);
  std::sort(by_tokens.begin(), by_tokens.end(),
            [&](int a, int b) { return cost(a) != cost(b) ? cost(a) > cost(b) : a < b; });
  for (n_shared_ = 0; n_shared_ < n_lane; ++n_shared_) {
    std::fill(owner_.begin(), owner_.end(), -1);
    std::fill(load_.begin(), load_.end(), 0);
    int64_t total = 0;
    for (const int sequence : by_tokens.subspan(static_cast<size_t>(n_shared_))) {
      const auto least = std::min_element(load_.begin(), load_.end());
      *least += cost(sequence);
      total += cost(sequence);
      owner_[static_cast<size_t>(sequence)] = static_cast<int>(least - load_.begin());
    }
    // A tenth more than its share is what barriers cost anyway.
    if (*std::max_element(load_.begin(), load_.end()) * n_threads * 10 <= total * 11) break;
  }
  if (n_shared_ == n_lane) std::fill(owner_.begin(), owner_.end(), -1);
  // The clock of the first sequence is read by the first thread.
  if (const int first = owner_[0]; first > 0) {
    for (int& o : owner_) o = o == first ? 0 : o == 0 ? first : o;
  }
}

void StepMixer::observe(std::function<void(int64_t layer, const DecodeStep&)> seen) {
  seen_ = std::move(seen);
  SeenRow seen_there;
  if (seen_) {
    seen_there = [this](int64_t layer, const float* q, const float* k, const float* v, float* out) {
      seen_(layer, DecodeStep{q, k, v, out, nullptr, nullptr});  // models with sinks do not run there
    };
  }
  blocks_.observe(seen_there);
  klt_.observe(seen_there);
}

DecodeStep StepMixer::step_of(const LayerPlan& layer, const MixRows& rows, int64_t sequence) {
  float* const q = rows.q + sequence * rows.ld;
  float* const out = rows.out + sequence * rows.ldo;
  if (layer.mix.is_recurrent()) return {q, nullptr, nullptr, out, nullptr, &layer.mix.delta_net};
  return {q, rows.k + sequence * rows.ld, rows.v + sequence * rows.ld, out, layer.mix.sinks, nullptr};
}

/// Runs [first, end) of q, then k, of a sequence: norms, and the queries' factor.
void StepMixer::prepare_sequence(const LayerPlan& layer, const MixRows& rows, int64_t sequence, int64_t first,
                                 int64_t end) const {
  const HeadNorms &q = layer.mix.q_norm, &k = layer.mix.k_norm;
  const int64_t split = std::clamp(q.n, first, end), at = sequence * rows.ld;
  norm_heads(q, first, split, rows.q + at);
  if (split < end) norm_heads(k, split - q.n, end - q.n, rows.k + at);
  if (layer.mix.attention.temperature == 0) return;
  const float factor =
      layer.mix.attention.query_factor(sequences_[static_cast<size_t>(sequence)].cache->n_tokens());
  for (int64_t i = first * q.width; i < split * q.width; ++i) rows.q[at + i] *= factor;
}

void StepMixer::mix(const LayerPlan& layer, const MixRows& rows, Team& team) {
  const int ith = team.ith(), n_threads = team.n_threads();
  const bool prepares = layer.mix.q_norm.norm.weight != nullptr || layer.mix.k_norm.norm.weight != nullptr ||
                        layer.mix.attention.temperature != 0;
  const int64_t runs = layer.mix.q_norm.n + layer.mix.k_norm.n;
  for (size_t i = 0; i < sequences_.size(); ++i) {
    if (owner_[i] != ith) continue;
    const auto sequence = static_cast<int64_t>(i);
    if (prepares) prepare_sequence(layer, rows, sequence, 0, runs);
    KvLayer& kv = sequences_[i].cache->layer(layer.index);
    for (int p = 0; p < kv.n_phase(); ++p)
      kv.run_phase(p, step_of(layer, rows, sequence), *sequences_[i].scratch, 0, 1);
  }
  int n_phase = 0;
  if (prepares && n_shared_ > 0) {
    // A product's parts do not end where heads do, hence a stage of its own.
    const Part mine = part_of(runs, ith, n_threads);
    for (size_t i = 0; i < sequences_.size(); ++i) {
      if (owner_[i] < 0) prepare_sequence(layer, rows, static_cast<int64_t>(i), mine.begin, mine.end);
    }
    team.barrier();
  }
  for (size_t i = 0; i < sequences_.size(); ++i) {
    if (owner_[i] < 0) n_phase = std::max(n_phase, sequences_[i].cache->layer(layer.index).n_phase());
  }
  if (n_phase == 0) team.barrier();
  for (int p = 0; p < n_phase; ++p) {
    for (size_t i = 0; i < sequences_.size(); ++i) {
      if (owner_[i] >= 0) continue;
      KvLayer& kv = sequences_[i].cache->layer(layer.index);
      // A sequence with fewer phases joins late: all end together.
      const int phase = p - (n_phase - kv.n_phase());
      if (phase < 0) continue;
      kv.run_phase(phase, step_of(layer, rows, static_cast<int64_t>(i)), *sequences_[i].scratch, ith,
                   n_threads);
    }
    team.barrier();
  }
  if (seen_ && ith == 0 && !layer.mix.is_recurrent()) seen_(layer.index, step_of(layer, rows, 0));
}

void StepMixer::measure_from(int64_t now_ns) {
  if (on_device_ != nullptr) return Mixer::measure_from(now_ns);
  sequences_[0].scratch->thread(0).clock.start(now_ns);
}

std::array<int64_t, 4> StepMixer::measured(int64_t now_ns) {
  static_assert(kAttentionStages == 4);
  if (on_device_ != nullptr) return Mixer::measured(now_ns);
  return sequences_[0].scratch->thread(0).clock.stop(now_ns);
}

}  // namespace narrows
