#include "exec/cuda/block_mixer.h"

#include <algorithm>

#include "kernels/ops.h"

namespace narrows {

using device::Api;
using device::kBlockTokens;

namespace {

constexpr int64_t kWord = sizeof(int32_t);
/// The attention's work is cut for as many tokens as the longest sequence has, rounded up to this: so its
/// work space is laid out anew now and then, not at every step.
constexpr int64_t kTokenUnit = 1024;

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace

void BlockMixer::begin_step(std::span<const Row> rows, RopeOf rope_of) {
  rows_.assign(rows.begin(), rows.end());
  rope_of_ = std::move(rope_of);
  is_prompt_ = sent_ = false;
}

void BlockMixer::begin_prompt(BlockSequence& blocks, int64_t first, int64_t n, RopeOf rope_of) {
  rows_.clear();
  for (int64_t r = 0; r < n; ++r) rows_.push_back({&blocks, first + r});
  rope_of_ = std::move(rope_of);
  is_prompt_ = true;
  sent_ = false;
}

void BlockMixer::send(device::Buffer& to, const void* from, int64_t bytes, device::Stream& stream) {
  if (to.bytes() < bytes) {
    stream.wait();  // what runs may read what the buffer holds
    stream.fail(stream.device().grow(to, round_up(bytes, 4096), "the positions of a run's tokens"));
  }
  stream.upload(to.data(), from, bytes);
}

/// Tables and positions: the same for all layers.
void BlockMixer::send_rows(device::Stream& stream) {
  sent_ = true;
  for (OfRope& of : angles_) of.sent = false;
  factor_sent_ = false;
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
  send(table_, host_.data(), n_sequence * ld_table_ * kWord, stream);
  host_.assign(static_cast<size_t>(4 * n), 0);
  for (int64_t r = 0; r < n; ++r) {
    const auto position = static_cast<int32_t>(rows_[static_cast<size_t>(r)].position);
    host_[static_cast<size_t>(r)] = position;
    host_[static_cast<size_t>(n + r)] = is_prompt_ ? 0 : static_cast<int32_t>(r);
    host_[static_cast<size_t>(2 * n + r)] = position + 1;
  }
  send(numbers_, host_.data(), 4 * n * kWord, stream);
}

const float* BlockMixer::angles(const LayerPlan& layer, device::Stream& stream) {
  const int64_t rope = layer.mix.attention.rope;
  auto of = std::find_if(angles_.begin(), angles_.end(), [&](const OfRope& a) { return a.rope == rope; });
  if (of == angles_.end()) {
    angles_.emplace_back();
    of = std::prev(angles_.end());
    of->rope = rope;
  }
  if (of->sent) return of->angles.data<float>();
  of->sent = true;
  const auto n = static_cast<int64_t>(rows_.size());
  const int64_t n_rot = rope_of_(0, layer).n_rot();
  std::vector<float> all(static_cast<size_t>(n * std::max<int64_t>(n_rot, 1)));
  for (int64_t r = 0; r < n; ++r) {
    float* to = all.data() + r * n_rot;
    rope_of_(r, layer).at(rows_[static_cast<size_t>(r)].position, to, to + 1, 2);
  }
  send(of->angles, all.data(), static_cast<int64_t>(all.size() * sizeof(float)), stream);
  return of->angles.data<float>();
}

/// Of all layers whose queries are scaled by position: they share the rule.
const float* BlockMixer::factors(const AttentionSpec& a, device::Stream& stream) {
  if (a.temperature == 0) return nullptr;
  if (!factor_sent_) {
    factor_sent_ = true;
    std::vector<float> all;
    for (const Row& row : rows_) all.push_back(a.query_factor(row.position));
    send(factor_, all.data(), static_cast<int64_t>(all.size() * sizeof(float)), stream);
  }
  return factor_.data<float>();
}

void BlockMixer::mix(const LayerPlan& layer, const DeviceRows& rows, device::Stream& stream) {
  if (!sent_) send_rows(stream);
  const AttentionSpec& a = layer.mix.attention;
  BlockPool& pool = rows_.front().blocks->pool();
  device::StoreArgs store{};
  store.q = rows.q;
  store.k = rows.k;
  store.v = rows.v;
  store.ld = rows.ld;
  store.n = rows.n;
  store.n_head = static_cast<int32_t>(a.n_head);
  store.n_head_kv = static_cast<int32_t>(a.n_head_kv);
  store.head_dim = static_cast<int32_t>(a.head_dim);
  store.n_rot = static_cast<int32_t>(rope_of_(0, layer).n_rot());
  store.angles = angles(layer, stream);
  store.factor = factors(a, stream);
  store.q_out = rows.q16;
  store.pool = pool.layer(layer.index);
  store.table = table_.data<int32_t>();
  store.ld_table = ld_table_;
  store.position = numbers_.data<int32_t>();
  store.sequence = store.position + rows.n;
  store.bad = numbers_.data<int32_t>() + 3 * rows.n;
  if (!stream.ok()) return;
  stream.op(&Api::store, store);
  if (rows.from == rows.n) return;
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
  if (seen_) show(layer, rows, stream);
}

void BlockMixer::attend_step(const LayerPlan& layer, const DeviceRows& rows,
                             const narrows_cuda_blocks& blocks, device::Stream& stream) {
  const AttentionSpec& a = layer.mix.attention;
  int64_t n_max = 0;
  for (const Row& row : rows_) n_max = std::max(n_max, row.position + 1);
  n_max = std::min(round_up(n_max, kTokenUnit), ld_table_ * kBlockTokens);
  narrows_cuda_f16_args args{};
  args.heads = {static_cast<int32_t>(rows.n),
                static_cast<int32_t>(a.n_head),
                static_cast<int32_t>(a.n_head_kv),
                static_cast<int32_t>(a.head_dim),
                rows.q16,
                rows.out,
                a.width_q(),
                a.width_q(),
                a.scale};
  args.blocks = blocks;
  args.n_tokens = numbers_.data<int32_t>() + 2 * rows.n;
  args.n_max = static_cast<int32_t>(n_max);
  args.window = static_cast<int32_t>(a.window);
  size_t bytes = 0;
  stream.run([&](const Api& api, int d) { return api.f16_workspace(d, &args, &bytes); });
  const auto needed = static_cast<int64_t>(bytes);
  if (workspace_.bytes() < needed || workspace_rows_ != rows.n || workspace_tokens_ != n_max) {
    if (workspace_.bytes() < needed) {
      stream.wait();
      stream.fail(stream.device().grow(workspace_, needed, "what attention works in"));
    }
    if (stream.ok()) stream.fill(workspace_.data(), 0, workspace_.bytes());
    workspace_rows_ = rows.n;
    workspace_tokens_ = n_max;
  }
  stream.run([&](const Api& api, int d) {
    return api.f16_decode(d, &args, workspace_.data(), static_cast<size_t>(workspace_.bytes()), stream.get());
  });
}

void BlockMixer::finish(device::Stream& stream) {
  const auto n = static_cast<int64_t>(rows_.size());
  if (!stream.ok() || !sent_) return;
  host_.assign(static_cast<size_t>(n), 0);
  stream.download(host_.data(), numbers_.data<int32_t>() + 3 * n, n * kWord);
  for (int64_t r = 0; r < n; ++r) {
    const Row& row = rows_[static_cast<size_t>(r)];
    if (host_[static_cast<size_t>(r)] != 0) row.blocks->note_bad(row.position);
  }
}

void BlockMixer::show(const LayerPlan& layer, const DeviceRows& rows, device::Stream& stream) const {
  const AttentionSpec& a = layer.mix.attention;
  const auto width_q = static_cast<size_t>(a.width_q()), width = static_cast<size_t>(a.width_kv());
  std::vector<float> q(width_q), k(width), v(width), out(width_q);
  std::vector<kernels::f16_t> half(width_q);
  const auto fetch = [&](std::vector<float>& to, const float* from) {
    stream.download(to.data(), from, static_cast<int64_t>(to.size() * sizeof(float)));
  };
  fetch(q, rows.q);
  fetch(k, rows.k);
  fetch(v, rows.v);
  stream.download(half.data(), rows.out, static_cast<int64_t>(half.size()) * 2);
  kernels::ops().f16_to_f32(half.data(), out.data(), a.width_q());
  seen_(layer.index, q.data(), k.data(), v.data(), out.data());
}

}  // namespace narrows
