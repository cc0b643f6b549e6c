#include "exec/cuda/row_angles.h"

#include <algorithm>

#include "kernels/ops.h"
#include "kv/layout.h"

namespace narrows {

using device::Api;

namespace {

/// The attention's work is cut for as many tokens as the longest sequence has, rounded up to this: so its
/// work space is laid out anew now and then, not at every step.
constexpr int64_t kTokenUnit = 1024;

}  // namespace

void send_to_device(device::Buffer& to, const void* from, int64_t bytes, device::Stream& stream) {
  if (to.bytes() < bytes) {
    stream.wait();  // what runs may read what the buffer holds
    stream.fail(stream.device().grow(to, round_up(bytes, 4096), "the positions of a run's tokens"));
  }
  stream.upload(to.data(), from, bytes);
}

void RowAngles::begin(std::vector<int64_t> positions, RopeOfRow rope_of) {
  positions_ = std::move(positions);
  rope_of_ = std::move(rope_of);
  for (OfRope& of : angles_) of.sent = false;
  factor_sent_ = false;
}

const float* RowAngles::angles(const LayerPlan& layer, device::Stream& stream) {
  const int64_t rope = layer.mix.attention.rope;
  auto of = std::find_if(angles_.begin(), angles_.end(), [&](const OfRope& a) { return a.rope == rope; });
  if (of == angles_.end()) {
    angles_.emplace_back();
    of = std::prev(angles_.end());
    of->rope = rope;
  }
  if (of->sent) return of->angles.data<float>();
  of->sent = true;
  const auto n = static_cast<int64_t>(positions_.size());
  const int64_t n_rot = this->n_rot(layer);
  std::vector<float> all(static_cast<size_t>(n * std::max<int64_t>(n_rot, 1)));
  for (int64_t r = 0; r < n; ++r) {
    float* to = all.data() + r * n_rot;
    rope_of_(r, layer).at(positions_[static_cast<size_t>(r)], to, to + 1, 2);
  }
  send_to_device(of->angles, all.data(), static_cast<int64_t>(all.size() * sizeof(float)), stream);
  return of->angles.data<float>();
}

const float* RowAngles::factors(const AttentionSpec& a, device::Stream& stream) {
  if (a.temperature == 0) return nullptr;
  if (!factor_sent_) {
    factor_sent_ = true;
    std::vector<float> all;
    for (const int64_t position : positions_) all.push_back(a.query_factor(position));
    send_to_device(factor_, all.data(), static_cast<int64_t>(all.size() * sizeof(float)), stream);
  }
  return factor_.data<float>();
}

void RowAngles::send(std::span<const LayerPlan> layers, device::Stream& stream) {
  for (const LayerPlan& l : layers) {
    angles(l, stream);
    factors(l.mix.attention, stream);
  }
}

device::StoreArgs RowAngles::store_args(const LayerPlan& layer, const DeviceRows& rows,
                                        device::Stream& stream) {
  const AttentionSpec& a = layer.mix.attention;
  device::StoreArgs store{};
  store.q = rows.q;
  store.k = rows.k;
  store.v = rows.v;
  store.ld = rows.ld;
  store.n = rows.n;
  store.n_head = static_cast<int32_t>(a.n_head);
  store.n_head_kv = static_cast<int32_t>(a.n_head_kv);
  store.head_dim = static_cast<int32_t>(a.head_dim);
  store.n_rot = static_cast<int32_t>(n_rot(layer));
  store.angles = angles(layer, stream);
  store.factor = factors(a, stream);
  store.q_out = rows.q16;
  return store;
}

narrows_cuda_heads heads_of(const AttentionSpec& a, const void* q, const DeviceRows& rows, int64_t first,
                            int64_t n) {
  const int64_t at = first * a.width_q() * 2;
  return {static_cast<int32_t>(n),
          static_cast<int32_t>(a.n_head),
          static_cast<int32_t>(a.n_head_kv),
          static_cast<int32_t>(a.head_dim),
          static_cast<const char*>(q) + at,
          static_cast<char*>(rows.out) + at,
          a.width_q(),
          a.width_q(),
          a.scale};
}

void show_row(const LayerPlan& layer, const DeviceRows& rows, const SeenRow& seen, device::Stream& stream) {
  const AttentionSpec& a = layer.mix.attention;
  const auto width_q = static_cast<size_t>(a.width_q()), width = static_cast<size_t>(a.width_kv());
  std::vector<float> q(width_q), k(width), v(width), out(width_q);
  std::vector<kernels::f16_t> half(width_q);
  const auto fetch = [&](std::vector<float>& to, const float* from) {
    stream.download(to.data(), from, std::ssize(to) * int64_t{sizeof(float)});
  };
  fetch(q, rows.q);
  fetch(k, rows.k);
  fetch(v, rows.v);
  stream.download(half.data(), rows.out, std::ssize(half) * 2);
  if (!stream.ok()) return;
  kernels::ops().f16_to_f32(half.data(), out.data(), a.width_q());
  seen(layer.index, q.data(), k.data(), v.data(), out.data());
}

void F16Attention::run(narrows_cuda_f16_args args, int64_t n_longest, device::Stream& stream) {
  const int64_t n_max =
      std::min(round_up(n_longest, kTokenUnit), int64_t{args.blocks.ld} * args.blocks.block);
  args.n_max = static_cast<int32_t>(n_max);
  size_t bytes = 0;
  stream.ask([&](const Api& api, int d) { return api.f16_workspace(d, &args, &bytes); });
  const auto needed = static_cast<int64_t>(bytes);
  if (workspace_.bytes() < needed || rows_ != args.heads.n_seq || tokens_ != n_max) {
    if (workspace_.bytes() < needed) {
      stream.wait();
      stream.fail(stream.device().grow(workspace_, needed, "what attention works in"));
    }
    if (stream.ok()) stream.fill(workspace_.data(), 0, workspace_.bytes());
    rows_ = args.heads.n_seq;
    tokens_ = n_max;
  }
  stream.decode(args, workspace_);
}

}  // namespace narrows
