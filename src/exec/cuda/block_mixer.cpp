#include "exec/cuda/block_mixer.h"

#include <algorithm>

#include "kv/layout.h"

namespace narrows {

using device::Api;
using device::kBlockTokens;

namespace {

constexpr int64_t kWord = sizeof(int32_t);

}  // namespace

void BlockMixer::begin_step(std::span<const Row> rows, RopeOfRow rope_of) {
  rows_.assign(rows.begin(), rows.end());
  begin_angles(std::move(rope_of));
  is_prompt_ = false;
}

void BlockMixer::begin_prompt(BlockSequence& blocks, int64_t first, int64_t n, RopeOfRow rope_of) {
  rows_.clear();
  for (int64_t r = 0; r < n; ++r) rows_.push_back({&blocks, first + r});
  begin_angles(std::move(rope_of));
  is_prompt_ = true;
}

void BlockMixer::begin_angles(RopeOfRow rope_of) {
  std::vector<int64_t> positions;
  for (const Row& row : rows_) positions.push_back(row.position);
  angles_.begin(std::move(positions), std::move(rope_of));
}

void BlockMixer::begin(std::span<const LayerPlan> layers, device::Stream& stream) {
  send_rows(stream);
  angles_.send(layers, stream);
}

/// Tables and positions: the same for all layers.
void BlockMixer::send_rows(device::Stream& stream) {
  const auto n = static_cast<int64_t>(rows_.size()), n_sequence = is_prompt_ ? 1 : n;
  ld_table_ = 1;
  for (const Row& row : rows_) ld_table_ = std::max(ld_table_, row.blocks->n_block());
  ld_table_ = round_up(ld_table_, 16);
  host_.assign(static_cast<size_t>(n_sequence * ld_table_), 0);
  for (int64_t s = 0; s < n_sequence; ++s) {
    const BlockSequence& blocks = *rows_[static_cast<size_t>(s)].blocks;
    for (int64_t b = 0; b < blocks.n_block(); ++b)
      host_[static_cast<size_t>(s * ld_table_ + b)] = blocks.block(b);
  }
  send_to_device(table_, host_.data(), n_sequence * ld_table_ * kWord, stream);
  host_.assign(static_cast<size_t>(4 * n), 0);
  for (int64_t r = 0; r < n; ++r) {
    const auto position = static_cast<int32_t>(rows_[static_cast<size_t>(r)].position);
    host_[static_cast<size_t>(r)] = position;
    host_[static_cast<size_t>(n + r)] = is_prompt_ ? 0 : static_cast<int32_t>(r);
    host_[static_cast<size_t>(2 * n + r)] = position + 1;
  }
  send_to_device(numbers_, host_.data(), 4 * n * kWord, stream);
}

void BlockMixer::mix(const LayerPlan& layer, const DeviceRows& rows, device::Stream& stream) {
  device::StoreArgs store = angles_.store_args(layer, rows, stream);
  store.pool = rows_.front().blocks->pool().layer(layer.index);
  store.table = table_.data<int32_t>();
  store.ld_table = ld_table_;
  store.position = numbers_.data<int32_t>();
  store.sequence = store.position + rows.n;
  store.bad = numbers_.data<int32_t>() + 3 * rows.n;
  store.block = static_cast<int32_t>(kBlockTokens);
  if (!stream.ok()) return;
  stream.op(&Api::store, store);
  if (rows.from < rows.n) attend(layer, rows, store, stream);
  if (seen_ && rows.from < rows.n) show_row(layer, rows, seen_, stream);
  if (see_rows_ && stream.ok()) see_rows_(layer, rows, stream);
}

void BlockMixer::attend(const LayerPlan& layer, const DeviceRows& rows, const device::StoreArgs& store,
                        device::Stream& stream) {
  const AttentionSpec& a = layer.mix.attention;
  if (is_prompt_) {
    const int64_t at = rows.from * a.width_q() * 2;
    const device::PromptArgs args = {static_cast<const char*>(rows.q16) + at,
                                     static_cast<char*>(rows.out) + at,
                                     store.pool,
                                     store.table,
                                     store.n_head,
                                     store.n_head_kv,
                                     store.head_dim,
                                     static_cast<int32_t>(a.window),
                                     rows_.front().position + rows.from,
                                     rows.n - rows.from,
                                     a.scale};
    stream.op(&Api::prompt, args);
  } else {
    attend_step(
        layer, rows,
        {store.pool, store.table, static_cast<int32_t>(ld_table_), static_cast<int32_t>(kBlockTokens)},
        stream);
  }
}

void BlockMixer::attend_step(const LayerPlan& layer, const DeviceRows& rows,
                             const narrows_cuda_blocks& blocks, device::Stream& stream) {
  const AttentionSpec& a = layer.mix.attention;
  int64_t n_max = 0;
  for (const Row& row : rows_) n_max = std::max(n_max, row.position + 1);
  narrows_cuda_f16_args args{};
  args.heads = heads_of(a, rows.q16, rows, 0, rows.n);
  args.blocks = blocks;
  args.n_tokens = numbers_.data<int32_t>() + 2 * rows.n;
  args.window = static_cast<int32_t>(a.window);
  attention_.run(args, n_max, stream);
}

void BlockMixer::finish(device::Stream& stream) {
  const auto n = static_cast<int64_t>(rows_.size());
  if (!stream.ok()) return;
  host_.assign(static_cast<size_t>(n), 0);
  stream.download(host_.data(), numbers_.data<int32_t>() + 3 * n, n * kWord);
  for (int64_t r = 0; r < n; ++r) {
    const Row& row = rows_[static_cast<size_t>(r)];
    if (host_[static_cast<size_t>(r)] != 0) row.blocks->note_bad(row.position);
  }
}

}  // namespace narrows
