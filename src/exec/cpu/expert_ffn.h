// The experts of a layer, on all threads together, out of packed tiles or the file's rows:
//
//   norm | router | choice | gate, up, activation, times the weight | down, added |
//
// a "|" is a barrier. A pair is a row and an expert that it goes through; pairs stand sorted by expert, so
// that an expert's weights are read once however many rows chose it. The outputs of gate and up of all chosen
// experts are shared out as one long list, by what they cost; of down every thread adds up some outputs of
// all pairs. A row's experts are added in the order of their numbers: its result depends on nothing but the
// row.
#pragma once

#include <cstdint>
#include <vector>

#include "base/aligned.h"
#include "exec/cpu/linear.h"
#include "exec/executor.h"

namespace narrows {

/// The n_used experts with the largest of logits [n_expert], ties to the lower one, in ascending order, and
/// their weights: softmax over all logits, brought to a sum of `scale` if the spec normalises them. A NaN is
/// less than any number. expert, weight: [n_used].
void choose_experts(const ExpertSpec& spec, const float* logits, int32_t* expert, float* weight);

class ExpertFfn {
 public:
  /// Of the largest layer with experts; n_used 0: there is none.
  struct Sizes {
    int64_t n_embd = 0, n_ff = 0, n_expert = 0, n_used = 0;
  };
  static Sizes sizes_of(const Plan& plan, int64_t n_embd);

  /// Rows that a product takes at once.
  static constexpr int64_t kBlock = 64;

  ExpertFfn(const Sizes& sizes, int n_threads);
  /// Room for n rows. False if there is no memory.
  bool reserve(int64_t n);
  /// Lets go of all of it.
  void shrink();
  static int64_t bytes_needed(const Sizes& sizes, int64_t n, int n_threads);

  /// Activations of rows x [n, n_embd], n as reserved. Every thread calls it; what it makes is complete after
  /// a barrier of the caller's.
  void activate(const LayerPlan& layer, const float* x, int64_t n, Team& team);
  /// [n] What the shared expert's activations of these rows are to be multiplied by, after activate().
  const float* shared_weight() const { return shared_weight_.data(); }
  /// x += what the experts make of the activations. Every thread calls it, after that barrier.
  void add(const LayerPlan& layer, float* x, int64_t n, Team& team);

 private:
  /// What one thread works in.
  struct Worker {
    LinearInput input;
    AlignedArray<float> normed;    ///< [kBlock, n_embd] of few rows, which every thread norms for itself
    AlignedArray<float> gathered;  ///< [kBlock, n_embd] rows of one expert
    AlignedArray<float> sums;      ///< [kBlock, n_embd] what down gives for them
    std::vector<int64_t> begin;    ///< [n_expert + 1] first pair of each expert
    std::vector<int32_t> row;      ///< [pairs] its row
    std::vector<float> weight;     ///< [pairs]
  };

  void route(const LayerPlan& layer, const float* x, int64_t n, Team& team);
  void sort_pairs(const ExpertSpec& spec, int64_t n, Worker& w) const;
  void activate_outputs(const LayerPlan& layer, size_t expert, int64_t begin, int64_t end, int64_t n,
                        Worker& w);

  Sizes sizes_;
  int64_t rows_ = 0;  ///< reserved
  std::vector<Worker> workers_;
  AlignedArray<float> normed_;         ///< [rows, n_embd] if they are many
  AlignedArray<float> logits_;         ///< [rows, n_expert]
  AlignedArray<int32_t> chosen_;       ///< [rows, n_used]
  AlignedArray<float> weight_;         ///< [rows, n_used]
  AlignedArray<float> shared_weight_;  ///< [rows]
  AlignedArray<float> gate_up_;        ///< [2][pairs, n_ff]; the first becomes the activation
  ByteInput bytes_;                    ///< [pairs, n_ff] the same, rounded, if they are many
};

}  // namespace narrows
