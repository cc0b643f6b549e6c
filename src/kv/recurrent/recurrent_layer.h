// The cache of a layer of gated DeltaNet: a state of one size, float32, however many tokens there were; and
// snapshots of it, the only places that it can go back to.
#pragma once

#include <vector>

#include "kv/kv_layer.h"
#include "kv/recurrent/recurrent_marks.h"

namespace narrows {

class RecurrentLayer final : public KvLayer {
 public:
  /// Snapshots lie at n_sink and whole segments behind it. segmented: seal() makes them; else prompts and
  /// steps on their way.
  RecurrentLayer(const kernels::DeltaNetShape& net, const kernels::RopeTable* rope, int64_t n_sink,
                 bool segmented);

  /// Counts n tokens that run_rows() has taken.
  Status append(const float* k, const float* v, int64_t n) override;
  Status begin_rows(int64_t n) override;
  void run_rows(int phase, const RecurrentRows& rows, int ith, int n_threads) override;
  Status make_room(bool may_convert) override;
  void store_step(const float* /*k*/, const float* /*v*/) override {}
  void count_step() override;
  /// It has neither keys nor values.
  void read(int64_t /*first*/, int64_t /*n*/, float* /*k*/, float* /*v*/) const override {}
  Status seal(int64_t* changed_from) override;
  bool can_keep(int64_t n) const override;
  bool goes_back_anywhere() const override { return false; }
  void keep(int64_t n) override;
  Status share(const KvLayer& from, int64_t n) override;
  void save(SnapshotWriter& out) const override;
  Status load(SnapshotReader& in) override;
  int64_t n_tokens() const override { return n_tokens_; }
  LayerBytes bytes() const override { return {.exact = state_.bytes() + marks_.bytes()}; }
  void clear() override;

  Status begin_step(StepScratch& scratch) override;
  int n_phase() const override { return 1; }
  void run_phase(int phase, const DecodeStep& step, StepScratch& scratch, int ith, int n_threads) override;

  /// Bytes behind n tokens, snapshots included.
  static int64_t bytes_for(const kernels::DeltaNetShape& net, int64_t n);

 private:
  /// Where a thread works on a head; see RecurrentRows::work_floats().
  struct Work {
    float* before;  ///< [n_conv - 1, 3 head_dim] q, k and v of the tokens before a tile
    float* kq;      ///< [2 n, head_dim]
    float* v;       ///< [n, head_dim]
    float* out;     ///< [n, head_dim] what a head gives, before its norm
    float* log_decay;
    float* beta;
    float* rule;  ///< delta_work_floats(); of one token null
  };
  /// A snapshot that the running chunk passes.
  struct Stop {
    int64_t row;   ///< rows before it
    float* state;  ///< of its mark
  };

  bool is_clean() const { return n_coming_ == 0 && !in_step_; }
  bool is_place(int64_t n) const;
  Status open_state();
  float* state() { return reinterpret_cast<float*>(state_.page(0)); }
  /// A state is the last n_conv projected rows of the convolution's channels, that of position p at p modulo
  /// n_conv; then the heads' matrices.
  int64_t ring_slot(int64_t position) const;
  float* head_of(float* state, int64_t head) const;
  void run_heads(const RecurrentRows& rows, int64_t base, int64_t key, const Work& work);
  void run_head(const RecurrentRows& rows, int64_t first, int64_t n, int64_t head, const Work& work);
  void convolve(const RecurrentRows& rows, int64_t base, int64_t first, int64_t n, int64_t part,
                int64_t channel, float* to, const Work& work);
  void run_ring(const RecurrentRows& rows, int64_t begin, int64_t end);

  kernels::DeltaNetShape net_;
  int64_t n_sink_;
  bool segmented_;
  PageStore state_;  ///< a page, or none before the first token
  RecurrentMarks marks_;
  int64_t n_tokens_ = 0;
  int64_t n_coming_ = 0;  ///< tokens of a prompt that the state has seen and nobody has counted
  int64_t base_ = 0;      ///< position of the running chunk's first token
  std::vector<Stop> stops_;
  bool in_step_ = false;  ///< the state has seen a token of a step that does not count
  bool begins_ = true;    ///< the next tokens of a prompt are those of another one
};

}  // namespace narrows
