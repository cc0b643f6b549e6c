// SALS (arXiv:2510.24273) storage of a layer: the key of a token is its projection on the leading
// eigenvectors of K^T K (pre-RoPE, joint over KV heads, f16), the value is quantised in groups along its
// channels. Without a basis file the layer keeps tokens exact until enough are there, computes its own basis
// and converts itself.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/part.h"
#include "kv/basis.h"
#include "kv/step/step_scratch.h"
#include "kv/window/windowed_layer.h"
#include "narrows/config.h"

namespace narrows {

/// Tokens a layer needs before it computes its own basis: two a dimension, and enough text to be typical.
inline constexpr int64_t tokens_for_basis(int64_t width) { return std::max<int64_t>(512, 2 * width); }

/// The positions that make a layer's own basis: the first few are attention sinks with outlying keys, and
/// more than 4096 change nothing that was measurable.
inline constexpr int64_t kBasisBegin = 4;
inline constexpr int64_t kBasisEnd = 4096;

/// SALS encodes as many tokens at a time as a window block holds, so that a block leaves whole.
inline constexpr int64_t kSalsUnit = kWindowBlock;

class SalsLayer final : public WindowedLayer {
 public:
  /// basis may be null; if given, its width is D and its rank at least layout.rank.
  SalsLayer(const AttentionShape& shape, const kernels::RopeTable* rope, const WindowPlan& plan,
            const KvProfile& profile, const SalsLayout& layout, std::shared_ptr<const LayerBasis> basis)
      : WindowedLayer(shape, rope, plan, layout.bytes()),
        layout_(layout),
        shared_(std::move(basis)),
        profile_(profile) {}

  const SalsLayout& layout() const { return layout_; }

  /// Phase 0: store the new token, score. 1: select (one thread), attend to exact blocks (the others). 2:
  /// rebuild the selected and attend to them. 3: merge. A layer that waits for its basis has no pages, so
  /// that nothing is scored or selected.
  Status begin_step(StepScratch& scratch) override;
  int n_phase() const override { return 4; }
  void run_phase(int phase, const DecodeStep& step, StepScratch& scratch, int ith, int n_threads) override;
  std::optional<std::span<const int32_t>> last_selection(int64_t head_kv) const override;

  /// Eigenvectors [D, rank] with ld_basis() between rows; null while the layer waits for its basis (no pages
  /// then).
  const float* basis() const {
    const LayerBasis* b = shared_ ? shared_.get() : own_.get();
    return b ? b->u.data() : nullptr;
  }
  int64_t ld_basis() const { return shared_ ? shared_->rank : own_ ? own_->rank : 0; }

  /// Latents of n <= kTile tokens of the pages, as stored: z [rank, ld], a column a token.
  void gather_latents(const int32_t* tokens, int64_t n, kernels::f16_t* z, int64_t ld) const;
  /// Asks for the index part of a page.
  void prefetch_index(int64_t p) const;
  /// Asks for what gather_latents() and read_value() will need and score() did not touch.
  void prefetch(const int32_t* tokens, int64_t n) const;
  /// Value row [D] of a token of the pages.
  void read_value(int64_t token, float* v) const;
  /// Keys of one KV head before RoPE, k_t [head_dim, ld], out of latents z [rank, ld] of n <= kTile tokens.
  void rebuild_keys(const float* z, int64_t ld, int64_t n, int64_t head, float* k_t) const;

 protected:
  Status make_codec(const Incoming& incoming) override;
  bool has_codec() const override { return basis() != nullptr; }
  int64_t codec_bytes() const override;
  void drop_codec() override { own_.reset(); }
  void share_codec(const WindowedLayer& from, int64_t /*n*/) override {
    own_ = static_cast<const SalsLayer&>(from).own_;
  }
  void save_codec(SnapshotWriter& out) const override;
  void load_codec(SnapshotReader& in) override;
  Status encode(int64_t first, int64_t last, const Incoming& incoming) override;
  void decode(int64_t first, int64_t n, float* k, float* v) const override;

 private:
  bool reads_all() const { return n_selected_ == n_in_pages(); }
  std::span<const int32_t> slice_of_selected(const StepScratch& scratch, int64_t i) const;
  void attend_slices(StepScratch& scratch, Part slices, StepScratch::Thread& thread);

  SalsLayout layout_;
  std::shared_ptr<const LayerBasis> shared_;  ///< from a file, used by every session of the model
  std::shared_ptr<const LayerBasis> own_;  ///< from this layer's own tokens, or those of a layer that shares

  // Of the running step, or the last one.
  KvProfile profile_;
  int64_t n_selected_ = 0;
  bool sparse_ = false;             ///< tokens are left out
  std::vector<int32_t> positions_;  ///< [n_selected_]
};

}  // namespace narrows
