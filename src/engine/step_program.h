// One decode step of one or several sessions, our own program instead of a ggml graph: all threads run it
// from the first layer to the logits, share the rows of each product and meet at as few barriers as its data
// needs,
//
//   norm, q k v | (q and k norms |) attention phases | wo, residual | norm, gate, up, swiglu | down, residual
//   |
//
// a "|" each. Where sessions are as many as threads or more, a thread does all of the attention of one, and
// attention is a single "|". What is small, norms and the rounding of inputs to bytes, every thread does for
// itself. The weights are read once for all sessions (memory bandwidth bounds a step). Pipeline steps 3 and
// 6.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/aligned.h"
#include "base/thread_pool.h"
#include "decode/layer_decoder.h"
#include "model/linear.h"
#include "model/weights.h"

namespace narrows {

/// One session's part of a step: its decoders, one a layer, and what they work in.
struct DecodeLane {
  std::span<const std::unique_ptr<LayerDecoder>> decoders;
  StepScratch* scratch = nullptr;
  int64_t n_tokens = 0;  ///< in its cache
};

/// What the time of a step goes to, as the first thread sees it, waiting included: products, and attention's
/// stages in AttentionStage's order (of several sessions, all in the first one's).
enum class StepStage { qkv, score, select, rebuild, attend, wo, gate_up, down, logits };
inline constexpr size_t kStepStages = 9;
constexpr bool is_product(StepStage s) { return s < StepStage::score || s > StepStage::attend; }

class StepProgram {
 public:
  /// Room for steps of up to max_lanes sessions. out_of_memory.
  static Result<std::unique_ptr<StepProgram>> create(const ModelWeights& weights, int max_lanes,
                                                     ThreadPool& pool);
  StepProgram(const StepProgram&) = delete;
  StepProgram& operator=(const StepProgram&) = delete;

  /// Embedding row of a lane, to be filled before run(), [n_embd]; used up by it.
  float* input(int lane) { return x_.data() + lane * hp_.n_embd; }
  /// Computes the step of lanes 0, 1, ..: max_lanes at most, whose decoders have been prepared; their scratch
  /// is made for the pool's threads. A lane's numbers are the same to the last bit whatever the others are,
  /// and as many as they are, and with any number of threads.
  void run(std::span<const DecodeLane> lanes);
  /// [n_vocab], of the last run.
  std::span<const float> logits(int lane) const;

  /// q, k, v (before RoPE) and attention output of one layer in the last run, for eval and tests. With
  /// max_lanes > 1 only of the last layer: the others' are overwritten.
  DecodeStep step(int64_t layer, int lane = 0);

  /// Nanoseconds of each StepStage, summed over the runs since measure(true).
  using Times = std::array<int64_t, kStepStages>;
  void measure(bool on);
  const Times& times() const { return times_; }

 private:
  /// A product and where its outputs go.
  struct Output {
    Linear w;
    const float* bias = nullptr;  ///< [n_out] or null
    float* y = nullptr;           ///< [n_lane, ldy]
    int64_t ldy = 0;
    bool accumulate = false;
  };
  struct Layer {
    const LayerWeights* w = nullptr;
    std::vector<Output> qkv;  ///< one, or q, k and v; y is an offset into the layer's rows
    Output wo, down;
    Linear gate, up;
    const float* b_gate = nullptr;
    const float* b_up = nullptr;
  };
  struct Worker {
    LinearInput input;
    AlignedArray<float> norm;  ///< [max_lanes, n_embd]
  };

  StepProgram(const ModelWeights& weights, int max_lanes, ThreadPool& pool);
  bool allocate();
  void plan();
  void run_layer(size_t l, int ith, Worker& worker);
  void run_thread(int ith);
  void attention(size_t l, int ith);
  void share_lanes();
  void norm_heads(size_t l, int64_t first, int64_t end);
  void gate_and_up(const Layer& layer, int ith, Worker& worker);
  void norm_input(const float* weight, Worker& worker);
  void multiply(std::span<const Output> outputs, int ith, LinearInput& input);
  void finish_stage(StepStage stage, int ith);
  float* qkv_rows(size_t layer) { return qkv_.data() + static_cast<int64_t>(layer) * qkv_stride_; }
  float* attention_rows(size_t layer) { return out_.data() + static_cast<int64_t>(layer) * out_stride_; }

  const ModelWeights& weights_;
  const Hparams& hp_;
  const int64_t max_lanes_;
  ThreadPool& pool_;
  int64_t width_q_, width_qkv_;  ///< of a lane's row
  int64_t qkv_stride_ = 0;       ///< between layers; 0: all in one place
  int64_t out_stride_ = 0;

  std::vector<Layer> layers_;
  Output output_;
  std::vector<Worker> workers_;
  AlignedArray<float> x_;        ///< [max_lanes, n_embd] residual stream
  AlignedArray<float> qkv_;      ///< [layers kept, max_lanes, width_qkv]
  AlignedArray<float> out_;      ///< [layers kept, max_lanes, width_q] attention
  AlignedArray<float> gate_up_;  ///< [2][max_lanes, n_ff]; the first becomes the activation
  AlignedArray<float> logits_;   ///< [max_lanes, n_vocab]

  std::span<const DecodeLane> lanes_;  ///< of the running step
  std::vector<int> by_tokens_;         ///< [max_lanes] lanes, longest first
  std::vector<int> owner_;     ///< [max_lanes] thread that attends for all of a lane; -1: all threads do
  std::vector<int64_t> load_;  ///< [threads] tokens of their lanes
  int n_shared_ = 0;           ///< lanes that all threads attend for
  bool measure_ = false;
  int64_t last_ns_ = 0;
  Times times_{};
};

}  // namespace narrows
