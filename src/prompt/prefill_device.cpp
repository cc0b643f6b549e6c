// Prompts that are read on a device: activations stay there, and keys and values come back where the cache is
// the host's to encode.
#include <fmt/format.h>

#include <algorithm>

#include "kernels/ops.h"
#include "kv/klt/cuda/klt_prompt.h"
#include "kv/layout.h"
#include "prompt/prefill.h"
#include "prompt/prefill_buffers.h"

namespace narrows {

/// Attention of one chunk where the cache is on the executor's device.
class Prefill::DeviceChunkMixer final : public Mixer {
 public:
  explicit DeviceChunkMixer(BlockMixer& blocks) : blocks_(blocks) {}
  void mix(const LayerPlan& /*layer*/, const MixRows& /*rows*/, Team& /*team*/) override {}
  DeviceMixer* on_device() override { return &blocks_; }

 private:
  BlockMixer& blocks_;
};

Status Prefill::begin_on_device(std::span<const Token> tokens) {
  LayerBuffers& b = *buffers_;
  const int64_t d = weights_.spec().n_embd, n = chunk_tokens();
  const int64_t held = hooks_.scratch != nullptr ? 0 : b.n_past;
  if (Status s = hooks_.blocks->reserve(held, b.n_past + b.n); !s.ok()) return s;
  device::Stream& stream = *executor_.stream();
  if (Status s = stream.device().grow(b.hidden_on_device, b.n * d * static_cast<int64_t>(sizeof(float)),
                                      "the prompt's activations");
      !s.ok())
    return s;
  AlignedArray<float> rows(std::min(n, b.n) * d);
  if (!rows.ok()) return no_room();
  for (int64_t first = 0; first < b.n; first += n) {
    const int64_t m = std::min(n, b.n - first);
    const auto part = tokens.subspan(static_cast<size_t>(first), static_cast<size_t>(m));
    if (Status s = weights_.embed(part, rows.data()); !s.ok()) return s;
    stream.upload(b.hidden_on_device.data<float>() + first * d, rows.data(),
                  m * d * static_cast<int64_t>(sizeof(float)));
  }
  stream.wait();
  return stream.take_error();
}

Status Prefill::run_chunk_on_device(Run run, int64_t first) {
  LayerBuffers& b = *buffers_;
  b.mixer.begin_prompt(*hooks_.blocks, b.position(first), run.n,
                       [this](int64_t /*row*/, const LayerPlan& l) -> const kernels::RopeTable& {
                         return ropes_[static_cast<size_t>(l.mix.attention.rope)];
                       });
  if (hooks_.klt != nullptr) {
    b.mixer.see_rows([this](const LayerPlan&, const DeviceRows& rows, device::Stream& stream) {
      hooks_.klt->rows().take(rows.q, rows.k, rows.v, rows.ld, rows.n, stream);
    });
  } else if (hooks_.scratch != nullptr) {
    b.mixer.see_rows([this](const LayerPlan& l, const DeviceRows& rows, device::Stream& stream) {
      fetch_rows(l, rows, stream);
    });
  }
  DeviceChunkMixer mixer(b.mixer);
  run.x_on_device = b.hidden_on_device.data<float>() + first * weights_.spec().n_embd;
  run.mixer = &mixer;
  Status status = executor_.run(run);
  if (hooks_.klt != nullptr) return status.ok() ? check_rows() : status;
  if (status.ok() && hooks_.scratch != nullptr && hooks_.queries)
    hooks_.queries(b.layer, b.q_raw.data(), run.n);
  return status;
}

/// Of a cache that sees no rows on the host.
Status Prefill::check_rows() const {
  const int64_t bad = hooks_.scratch->bad_token();
  if (bad < 0) return {};
  const Status status = non_finite_token(bad);
  return {status.code(), fmt::format("layer {}: {}", buffers_->layer, status.message())};
}

void Prefill::wait() const {
  if (hooks_.klt != nullptr) hooks_.klt->wait();
}

/// What the hooks get of a chunk that is read on a device: keys and values, and the queries that they look
/// at.
void Prefill::fetch_rows(const LayerPlan& layer, const DeviceRows& rows, device::Stream& stream) {
  LayerBuffers& b = *buffers_;
  const AttentionSpec& a = layer.mix.attention;
  const int64_t bytes = a.width_kv() * int64_t{sizeof(float)}, bytes_q = a.width_q() * int64_t{sizeof(float)};
  const int64_t ld = rows.ld * int64_t{sizeof(float)}, to = b.next * a.width_kv();
  stream.download_rows(b.k_raw.data() + to, bytes, rows.k, ld, bytes, rows.n);
  stream.download_rows(b.v.data() + to, bytes, rows.v, ld, bytes, rows.n);
  if (!hooks_.queries) return;
  const int64_t stride = hooks_.query_stride ? hooks_.query_stride(b.layer) : 1;
  const int64_t position = b.position(b.next), first = ceil_div(position, stride) * stride - position;
  if (first >= rows.n) return;
  float* q = b.q_raw.data();
  stream.download_rows(q + first * a.width_q(), stride * bytes_q, rows.q + first * rows.ld, stride * ld,
                       bytes_q, ceil_div(rows.n - first, stride));
  for (int64_t r = first; a.temperature != 0 && r < rows.n; r += stride) {
    for (int64_t i = 0; i < a.width_q(); ++i) q[r * a.width_q() + i] *= a.query_factor(position + r);
  }
}

/// Tokens [from, to) of the cache into the scratch blocks, whole ones but the last.
Status Prefill::send_past(int64_t from, int64_t to) {
  LayerBuffers& b = *buffers_;
  const int64_t width = attention().width_kv(), hd = attention().head_dim, n = device::kBlockTokens;
  const int64_t first = from / n, n_block = ceil_div(to, n) - first, halves = 2 * width * n;
  constexpr int64_t kAtOnce = 64;
  std::vector<kernels::f16_t> rows(static_cast<size_t>(std::min(kAtOnce, n_block) * halves));
  device::Stream& stream = *executor_.stream();
  BlockPool& pool = hooks_.blocks->pool();
  for (int64_t begin = 0; begin < n_block; begin += kAtOnce) {
    const int64_t some = std::min(kAtOnce, n_block - begin);
    executor_.for_each(some, [&](int64_t i) {
      const int64_t at = (first + begin + i) * n, m = std::min(n, to - at);
      std::vector<float> k(static_cast<size_t>(n * width)), v(k.size());
      hooks_.read_past(b.layer, at, m, k.data(), v.data());
      kernels::f16_t* block = rows.data() + i * halves;
      for (int64_t t = 0; t < m; ++t) {
        for (int64_t h = 0; h < width / hd; ++h) {
          kernels::f16_t* key = block + (h * n + t) * hd;
          kernels::ops().f32_to_f16(k.data() + t * width + h * hd, key, hd);
          kernels::ops().f32_to_f16(v.data() + t * width + h * hd, key + width * n, hd);
        }
      }
    });
    for (int64_t i = 0; i < some; ++i)
      stream.upload(pool.layer(0) + hooks_.blocks->block(first + begin + i) * pool.block_bytes(),
                    rows.data() + i * halves, halves * int64_t{sizeof(kernels::f16_t)});
    stream.wait();
    if (Status s = stream.take_error(); !s.ok()) return s;
  }
  return {};
}

}  // namespace narrows
