// A klt layer whose steps attend on a GPU. The host's layer (kv/klt/klt_layer.h) stays what says which token
// is where, makes transforms, finds anchors, encodes pages, saves and shares; the device has a copy of its
// exact blocks and pages, in the kernels' order, and what keys it has rebuilt. The tokens of steps are stored
// on the device, by the executor, and fetched when the host is to read them: once a page.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "kv/klt/cuda/klt_card.h"
#include "kv/klt/cuda/klt_codec.h"
#include "kv/klt/klt_layer.h"

namespace narrows {

class KltRows;  // kv/klt/cuda/klt_rows.h

/// What a step's kernels are told of one layer of one sequence; device pointers unless said.
struct KltStepView {
  int64_t index = 0;                 ///< of the new token, counted over exact blocks
  int64_t position = 0;              ///< its
  std::vector<int32_t> exact;        ///< the host's: blocks, in order
  std::vector<uint8_t> exact_count;  ///< tokens in each, the new one included
  int64_t n_in_pages = 0;            ///< 0: what follows is not set
  int64_t n_max = 0, budget = 0, max_budget = 0;
  float mass = 1;
  const void* pages = nullptr;
  int64_t page_bytes = 0;
  const int32_t* page_table = nullptr;
  narrows_cuda_kept kept = {};
  std::shared_ptr<const KltCodec> codec;
  std::shared_ptr<const KltTables> tables;
};

class CudaKltLayer final : public KvLayer {
 public:
  CudaKltLayer(std::unique_ptr<KltLayer> host, std::shared_ptr<KltOnDevice> on);

  /// True if the kernels take caches of this profile and these heads.
  static bool can_be_on_device(const KvProfile& profile, const AttentionShape& shape, int64_t n_rot);

  Status append(const float* k, const float* v, int64_t n) override;
  /// append() of a prompt's rows that the device has; with host().can_append_from(). May be called for
  /// several layers of a cache at once.
  Status append_from(KltRows& rows, Workers& lent);
  Status make_room(bool may_convert) override;
  void store_step(const float* /*k*/, const float* /*v*/) override {}
  void count_step() override;
  void read(int64_t first, int64_t n, float* k, float* v) const override;
  void observe_queries(const float* q, int64_t n) override { host_->observe_queries(q, n); }
  bool wants_queries() const override { return host_->wants_queries(); }
  int64_t query_stride() const override { return host_->query_stride(); }
  Status seal(int64_t* changed_from) override;
  bool can_keep(int64_t n) const override { return host_->can_keep(n); }
  void keep(int64_t n) override;
  Status share(const KvLayer& from, int64_t n) override;
  void save(SnapshotWriter& out) const override;
  Status load(SnapshotReader& in) override;
  int64_t n_tokens() const override { return host_->n_tokens(); }
  /// What the device holds; transforms as the host has them, if the device has none yet.
  LayerBytes bytes() const override;
  void clear() override;

  /// The executor attends; there are no phases.
  Status begin_step(StepScratch& scratch) override;
  int n_phase() const override { return 0; }
  void run_phase(int, const DecodeStep&, StepScratch&, int, int) override {}
  void end_step() override;
  std::optional<std::span<const int32_t>> last_selection(int64_t head_kv) const override;
  bool always_reads(int64_t pos) const override { return host_->always_reads(pos); }

  const KltLayer& host() const { return *host_; }
  KltOnDevice& on_device() const { return *on_; }
  const KltStepView& view() const { return view_; }
  /// The query of the running step, before RoPE, if wants_next_query(); until end_step().
  void give_query(const float* q) { query_ = q; }
  bool wants_next_query() const { return host_->wants_next_query(); }
  /// What a KV head has read from pages in the running step, as tokens of them: for whoever observes.
  void note_selection(std::vector<std::vector<int32_t>> tokens);

  // KvCache::encode_together()
  bool encodes_next() const { return !host_->parts().empty() && host_->encodes_next(false); }
  Status fetch() const;
  /// Without workers; errors come again in begin_step().
  void encode_alone();

 private:
  /// Exact blocks on the device.
  struct Blocks {
    std::vector<BlockPool::Block> blocks;
    int64_t there = 0;  ///< tokens that the device holds
    int64_t here = 0;   ///< and the host
  };
  void host_has_all();
  void trim();
  void forget();
  Status send();
  Status send(device::Stream& stream);
  Status send_pages(device::Stream& stream);
  Status send_exact(const ExactStore& store, Blocks& to, device::Stream& stream);
  Status fetch_exact(bool of_window, device::Stream& stream) const;
  Status make_step_room();
  Status make_kept(int64_t n_tokens_kept, device::Stream& stream);
  Status make_view();
  /// What the host's layer did, on the device too if that goes well: begin_step() tries again.
  Status after(Status status);

  std::unique_ptr<KltLayer> host_;
  std::shared_ptr<KltOnDevice> on_;
  mutable std::mutex mutex_;  ///< of fetch() among readers
  mutable Blocks sinks_, window_;
  int64_t window_first_;  ///< position of the window's first token
  int64_t page_bytes_;
  std::shared_ptr<BlockPool> page_pool_;
  std::vector<BlockPool::Block> pages_;
  int64_t n_in_table_ = 0;  ///< pages whose numbers are in table_
  device::Buffer table_;    ///< int32 [n_max / 64]
  std::shared_ptr<const KltCodec> codec_;
  int64_t n_max_ = 0, max_budget_ = 0, capacity_ = 0;
  device::Buffer kept_;  ///< keys, token_of, slot_of, hand
  bool kept_is_stale_ = true;
  KltStepView view_;
  const float* query_ = nullptr;
  bool is_sparse_ = false;
  std::vector<std::vector<int32_t>> selection_;  ///< [n_head_kv] positions
};

}  // namespace narrows
