// klt storage of a layer (ours; DESIGN.md): keys before RoPE and values as latent codes of centred, weighted
// KLTs, all coordinates kept with the bits they deserve, in pages of 64 tokens. Without a basis file the
// layer keeps tokens exact until enough are there, makes its own transforms from them and converts itself.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "kv/klt/klt_anchor.h"
#include "kv/klt/klt_hot_keys.h"
#include "kv/klt/klt_page.h"
#include "kv/step/step_scratch.h"
#include "kv/window/windowed_layer.h"
#include "narrows/config.h"

namespace narrows {

struct KltWork;    // kv/klt/klt_work.h
struct KltThread;  // kv/klt/klt_work.h

/// What an error of a value costs, [n_head_kv, head_dim, head_dim]: the sum over a KV head's query heads of
/// Wo_h^T Wo_h. Asked for when a layer makes its own transforms.
using ValueWeightFn = std::function<Status(int64_t layer, std::vector<double>& weight)>;

/// Running statistics of a layer's keys, values and queries, all before RoPE.
class KltStatistics {
 public:
  explicit KltStatistics(const AttentionShape& shape);
  // The work is shared among workers, if there are any; the statistics do not depend on them.
  void add(const float* k, const float* v, int64_t n, Workers* workers = nullptr);  ///< [n, D] each
  void add_queries(const float* q, int64_t n, Workers* workers = nullptr);          ///< [n, n_head, head_dim]
  void add_queries(const KltStatistics& other);  ///< those that another has seen
  int64_t n_queries() const { return n_queries_; }
  /// Of the queries alone: keys and values are seen only when the transforms are made.
  void save_queries(SnapshotWriter& out) const;
  void load_queries(SnapshotReader& in);
  /// Sums of n queries of all heads that were made elsewhere: sum [n_head_kv, head_dim], moments [n_head_kv,
  /// head_dim, head_dim], over a KV head's group.
  void add_query_sums(int64_t n, const double* sum, const double* moments);
  /// Of keys (or values) in place of add(), of all parts: centre, sum [parts, width], moments [parts, width,
  /// width].
  void set_sums(bool of_values, int64_t n, const float* centre, const double* sum, const double* moments);
  Result<KltLayerBasis> basis(const DistanceAverage& distances, const std::vector<double>& value_weight,
                              Workers* workers = nullptr) const;

 private:
  AttentionShape shape_;
  int64_t heads_;                      ///< KV heads of a part
  std::vector<CentredMoments> key_;    ///< a part; empty until add()
  std::vector<CentredMoments> value_;  ///< a part
  std::vector<KeyMoments> query_;      ///< a KV head, over its group
  int64_t n_queries_ = 0;
};

/// Tokens a layer needs before it makes its own transforms: enough to estimate them (docs/experiments.md has
/// the sweep), and so many that the exact cache would be the larger one, transforms and rebuilt keys
/// included.
inline constexpr int64_t tokens_for_klt(int64_t width) {
  return std::max({int64_t{512}, 2 * width, 256 + 5 * std::min(width, kMaxTransform) / 2});
}

/// Positions that make a layer's own transforms: the first few are attention sinks with outlying keys, and
/// more than 4096 change nothing that was measurable.
inline constexpr int64_t kKltBegin = 4;
inline constexpr int64_t kKltEnd = 4096;

/// Bits and sizes of a profile for one layer.
struct KltOptions {
  double key_rate = 2;  ///< average bits a key coordinate
  double value_rate = 3;
  int64_t n_index = 0;  ///< coordinates scored, over all parts together
  int64_t anchors = 0;  ///< most tokens kept exact for each page made so far; 0: none
};

/// Coordinates that a layer's index has, over all parts together.
int64_t klt_n_index(const KvProfile& profile, int64_t width);

/// Tokens whose rebuilt keys a KV head keeps: the most that a step selects, in whole pages; with `budget=all`
/// only contexts as short as the smallest budget are kept.
int64_t klt_hot_tokens(const KvProfile& profile, int64_t n_in_pages, int64_t n_kv);

/// Tokens of a prompt on a device that does of them there what a layer would do on the host. Errors: the
/// device's.
class KltRowSource : public RowSource {
 public:
  /// What queries have shown of weights, of the first kKltEnd tokens at least if there are as many.
  virtual Status add_queries(KltStatistics& to) = 0;
  /// Keys and values of new tokens [first, first + n).
  virtual Status set_rows(int64_t first, int64_t n, KltStatistics& to) = 0;
  virtual Status value_weight(std::vector<double>& weight) = 0;
  /// Of n_page pages, the first of which begins at position pos: attention [n_page, kPageTokens] summed over
  /// heads and the sampled queries among the n_after tokens after each page. sinks [n_sink, D], rotated.
  virtual Status find_shares(int64_t pos, int64_t n_page, int64_t n_after, const std::vector<float>& sinks,
                             std::vector<float>& share) = 0;
  /// Writes pages from `first` on, by the layer's transforms, to where `page` says. The first that cannot be
  /// stored, or -1.
  virtual Result<int64_t> encode(int64_t first, const std::vector<AnchorBits>& anchors,
                                 const std::function<std::byte*(int64_t page)>& page) = 0;
  /// Every kQueryStride-th query from position pos on, a new one or one that was held.
  virtual Status samples(int64_t pos, std::vector<kernels::f16_t>& rows) = 0;
};

class KltLayer final : public WindowedLayer {
 public:
  /// basis may be null; if given, it fits the shape. distances outlive the layer.
  KltLayer(int64_t layer, const AttentionShape& shape, const kernels::RopeTable* rope, const WindowPlan& plan,
           const KvProfile& profile, const KltOptions& options,
           std::shared_ptr<const DistanceAverage> distances, ValueWeightFn value_weight);

  /// Transforms of a file: the layer need not wait for tokens.
  Status use_basis(const KltLayerBasis& basis);

  /// Queries before RoPE [n, n_head, head_dim] of the next tokens, in order, those of a prompt before
  /// append(): statistics until the transforms are made, samples that find anchors always. Layers that see no
  /// queries find no anchors.
  void observe_queries(const float* q, int64_t n) override;
  bool wants_queries() const override { return !has_codec() || options_.anchors > 0; }
  int64_t query_stride() const override;
  /// True if observe_queries() looks at the query of the next step.
  bool wants_next_query() const { return !has_codec() || (options_.anchors > 0 && samples_.wants_next()); }

  /// append() of n tokens of a source, with their queries, which nobody else observes; if it can be.
  bool can_append_from() const;
  Status append_from(KltRowSource& source, int64_t n);
  /// Of observe_queries(): every kQueryStride-th.
  const QuerySamples& samples() const { return samples_; }

  /// Phases: store the new token, attend to exact blocks, score; pool, candidates; select, two tasks a KV
  /// head; rebuild what the hot keys lack, attend, a slice of the pages a task; merge. Without a choice to
  /// make the second is left out, without pages all but the first and the last. A layer that waits for its
  /// transforms has no pages.
  Status begin_step(StepScratch& scratch) override;
  int n_phase() const override { return static_cast<int>(phases().size()); }
  void run_phase(int phase, const DecodeStep& step, StepScratch& scratch, int ith, int n_threads) override;
  void end_step() override;
  std::optional<std::span<const int32_t>> last_selection(int64_t head_kv) const override;
  bool always_reads(int64_t pos) const override;

  /// Tokens of a page that sinks() holds exactly: what the page has of them means nothing.
  AnchorBits anchors(int64_t p) const;

  const std::vector<KltPart>& parts() const { return *parts_; }
  /// The same, which layers share: it never changes.
  const std::shared_ptr<const std::vector<KltPart>>& shared_parts() const { return parts_; }
  const KvProfile& profile() const { return profile_; }
  /// The part of a KV head and the head's first channel in it.
  const KltPart& part_of_head(int64_t head) const {
    return (*parts_)[static_cast<size_t>(head / heads_of_a_part())];
  }
  int64_t channel_of_head(int64_t head) const { return head % heads_of_a_part() * shape().head_dim; }
  int64_t heads_of_a_part() const { return heads_; }
  const KltOptions& options() const { return options_; }
  const std::shared_ptr<const DistanceAverage>& distances() const { return distances_; }

  /// Keys of a KV head that the decode step keeps from step to step: its own to fill, forgotten by clear().
  KltHotKeys& hot_keys(int64_t head) { return hot_keys_[static_cast<size_t>(head)]; }

 protected:
  Status make_codec(const Incoming& incoming) override;
  bool has_codec() const override { return !parts_->empty(); }
  bool can_make_codec() const override { return n_tokens() >= tokens_for_klt(shape().width()); }
  int64_t codec_bytes() const override;
  int64_t hot_bytes() const override;
  void drop_codec() override;
  void settle(int64_t pos) override { samples_.drop_before(pos); }
  void retract(int64_t pos) override { samples_.drop_from(pos); }
  void share_codec(const WindowedLayer& from, int64_t n) override;
  void save_codec(SnapshotWriter& out) const override;
  void load_codec(SnapshotReader& in) override;
  void forget_from(int64_t n) override;
  int64_t count_kept(int64_t n_page) const override;
  Status encode(int64_t first, int64_t last, const Incoming& incoming) override;
  void decode(int64_t first, int64_t n, float* k, float* v) const override;

 private:
  /// Queries of one segment of the prompt, or of all tokens where prompts have no segments. Apart, because a
  /// segment may be forgotten, and shared, because one that is complete does not change.
  struct QueryStatistics {
    int64_t segment;
    std::shared_ptr<KltStatistics> sums;
  };

  Status set_transforms(const KltLayerBasis& basis);
  int64_t n_queries_seen() const;
  /// Pages [first, last), whose anchors are set; the first that cannot be stored, or -1.
  int64_t encode_pages(int64_t first, int64_t last, const Incoming& incoming);
  /// encode() of pages [first, last) on the source's device.
  Status encode_there(int64_t first, int64_t last, const Incoming& incoming);
  /// [n_sink, D], rotated.
  std::vector<float> rotated_sinks(const Incoming& incoming) const;
  /// Tokens after a page whose queries judge it: in steps the newest are not there yet when a page is made,
  /// and all ways of growing see the same.
  int64_t n_judging() const { return std::clamp<int64_t>(plan().n_recent - 1, 0, kPageTokens - 1); }
  void read_pages(int64_t first, int64_t n, float* k, float* v) const;

  /// Looks for anchors page by page; keys are rotated once each.
  class AnchorScan;
  void set_parts(std::vector<KltTransform> keys, std::vector<KltTransform> values);
  /// The segment that a query at pos counts for; -1: none.
  int64_t segment_of(int64_t pos) const;

  /// How a step reads the pages: those tokens that matter; all, out of hot keys; all, rebuilt and forgotten.
  enum class Way { no_pages, sparse, hot, streamed };
  enum class Phase { score, pool, select, attend, merge };

  std::span<const Phase> phases() const;
  void score(const DecodeStep& step, StepScratch& scratch, int ith, int n_threads);
  void select(KltWork& work, KltThread& thread);
  void choose(KltWork& work, const KltThread& thread, int64_t head_kv);
  void hold(KltWork& work, int64_t head_kv);
  void attend_slices(StepScratch::Thread& thread, int n_threads, KltWork& work, KltThread& mine);
  void attend_slice(StepScratch& scratch, int i, int ith);

  int64_t layer_;
  KltOptions options_;
  std::shared_ptr<const DistanceAverage> distances_;
  ValueWeightFn value_weight_;
  int64_t heads_;
  bool from_file_ = false;                ///< then the transforms outlive clear()
  std::vector<QueryStatistics> queries_;  ///< in order; empty: none seen, or no longer needed
  QuerySamples samples_;
  KltRowSource* source_ = nullptr;                     ///< during append_from()
  std::shared_ptr<const std::vector<KltPart>> parts_;  ///< never null
  std::vector<KltHotKeys> hot_keys_;                   ///< [n_head_kv]

  // Of the running step, or the last one.
  KvProfile profile_;
  int64_t budget_ = 0;  ///< most tokens that a KV head reads from pages
  Way way_ = Way::hot;
  std::vector<float> query_;        ///< [n_head, head_dim], if the layer wants it
  std::vector<int32_t> positions_;  ///< [n_head_kv, budget_]
  std::vector<int64_t> n_read_;     ///< [n_head_kv]: of positions_
};

}  // namespace narrows
