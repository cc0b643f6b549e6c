// The loop over layers and chunks, and the two custom ops of a chunk: `store` puts rotated keys and values
// where attention reads them, `attend` runs (head, block of rows) tasks that threads take from a counter.
#include "prefill/prefill.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "base/aligned.h"
#include "ggml-alloc.h"
#include "kernels/ops.h"

namespace narrows {

namespace {

using kernels::kTile;

/// Rows of one chunk: enough that a weight read from memory is used 512 times, few enough that a chunk's
/// activations stay below some tens of MB.
constexpr int64_t kChunk = 512;
/// Query rows of one attention task.
constexpr int64_t kRows = 64;
/// Shorter prompts leave their products to ggml: unpacking the weights would cost more than it saves
/// (docs/experiments.md).
constexpr int64_t kBf16Rows = 96;
/// Tensors in a chunk's graph: one layer (about 25) and the logits.
constexpr size_t kGraphTensors = 96;

int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }

bool in_bf16(const ModelWeights& weights, PrefillProducts how, int64_t n) {
  if (how == PrefillProducts::ggml || !Bf16Products::applies(weights)) return false;
  return Bf16Products::supported() && (how == PrefillProducts::bf16 || n >= kBf16Rows);
}

}  // namespace

/// Everything that lives for one run. D = n_head_kv * head_dim.
struct Prefill::LayerBuffers {
  int64_t n = 0;  ///< new tokens
  int64_t n_past = 0;
  AlignedArray<float> hidden;                ///< [n, n_embd] residual stream
  AlignedArray<float> k_raw;                 ///< [n, D] before RoPE
  AlignedArray<float> k_tile;                ///< [n_head_kv, tiles(n_past + n), head_dim, kTile] rotated
  AlignedArray<float> v;                     ///< [n_past + n, D]
  AlignedArray<float> q;                     ///< [kChunk, n_head * head_dim] rotated
  std::vector<AlignedArray<float>> scratch;  ///< one a thread
  std::vector<uint8_t> graph_memory;
  ggml_gallocr_t allocator = nullptr;

  ~LayerBuffers() {
    if (allocator != nullptr) ggml_gallocr_free(allocator);
  }
};

/// What the custom ops of one chunk need.
struct Prefill::ChunkOp {
  const Hparams* hp;
  const kernels::RopeTable* rope;
  LayerBuffers* b;
  int64_t first;        ///< index of the chunk's first token among the new ones
  int64_t n;            ///< tokens of the chunk
  int64_t attend_from;  ///< first row of the chunk that needs attention
  int64_t layer = 0;
  const std::function<void(int64_t, const float*, int64_t)>* queries = nullptr;
  std::atomic<int64_t> next_task{0};

  int64_t tile_stride() const { return hp->head_dim * kTile; }
  float* tile(int64_t head, int64_t t) const {
    return b->k_tile.data() + (head * tiles(b->n_past + b->n) + t) * tile_stride();
  }

  /// One rotated key [D] into the tiles of its heads, as column pos % kTile.
  void put_key(int64_t pos, const float* k) const {
    for (int64_t h = 0; h < hp->n_head_kv; ++h) {
      float* column = tile(h, pos / kTile) + pos % kTile;
      for (int64_t d = 0; d < hp->head_dim; ++d) column[d * kTile] = k[h * hp->head_dim + d];
    }
  }

  void store_row(const Qkv& t, int64_t r, float* angle, float* key) const {
    const auto row = [r](const ggml_tensor* x) {
      return reinterpret_cast<const float*>(static_cast<const char*>(x->data) +
                                            static_cast<size_t>(r) * x->nb[2]);
    };
    const kernels::Ops& op = kernels::ops();
    const int64_t width = hp->n_head_kv * hp->head_dim, pos = b->n_past + first + r,
                  half = hp->rope.n_rot / 2;
    rope->at(pos, angle, angle + half);
    std::memcpy(b->k_raw.data() + (first + r) * width, row(t.k), static_cast<size_t>(width) * sizeof(float));
    op.rope_rows(row(t.k), hp->n_head_kv, hp->head_dim, hp->rope.n_rot, angle, angle + half, 0, false, key);
    std::memcpy(b->v.data() + pos * width, row(t.v), static_cast<size_t>(width) * sizeof(float));
    put_key(pos, key);
    op.rope_rows(row(t.q), hp->n_head, hp->head_dim, hp->rope.n_rot, angle, angle + half, 0, false,
                 b->q.data() + r * hp->n_head * hp->head_dim);
  }

  /// One thread; rows of a joined product have the keys and values between them.
  void pass_queries(const ggml_tensor* q) const {
    const int64_t width = hp->n_head * hp->head_dim;
    std::vector<float> rows(static_cast<size_t>(n * width));
    for (int64_t r = 0; r < n; ++r) {
      std::memcpy(rows.data() + r * width,
                  static_cast<const char*>(q->data) + static_cast<size_t>(r) * q->nb[2],
                  static_cast<size_t>(width) * sizeof(float));
    }
    (*queries)(layer, rows.data(), n);
  }

  static void store(ggml_tensor* dst, int ith, int nth, void* userdata) {
    const ChunkOp& op = *static_cast<const ChunkOp*>(userdata);
    const Qkv t{dst->src[0], dst->src[1], dst->src[2]};
    std::vector<float> angle(static_cast<size_t>(op.hp->rope.n_rot));
    std::vector<float> key(static_cast<size_t>(op.hp->n_head_kv * op.hp->head_dim));
    const int64_t from = op.n * ith / nth, to = op.n * (ith + 1) / nth;
    for (int64_t r = from; r < to; ++r) op.store_row(t, r, angle.data(), key.data());
    if (ith == nth - 1 && op.queries != nullptr) op.pass_queries(t.q);
  }

  /// dst [n_head * head_dim, n - attend_from]. Tasks of one head follow each other, so that its keys stay in
  /// cache.
  static void attend(ggml_tensor* dst, int ith, int /*nth*/, void* userdata) {
    ChunkOp& op = *static_cast<ChunkOp*>(userdata);
    const Hparams& hp = *op.hp;
    const int64_t rows = op.n - op.attend_from, blocks = (rows + kRows - 1) / kRows;
    const int64_t group = hp.n_head / hp.n_head_kv, width = hp.n_head_kv * hp.head_dim,
                  ld = hp.n_head * hp.head_dim;
    auto* out = static_cast<float*>(dst->data);
    for (int64_t task = op.next_task++; task < hp.n_head * blocks; task = op.next_task++) {
      const int64_t h = task / blocks, r = task % blocks * kRows, n = std::min(kRows, rows - r);
      kernels::ops().prefill_attend(
          op.b->q.data() + (op.attend_from + r) * ld + h * hp.head_dim, ld, n, hp.head_dim,
          op.tile(h / group, 0), op.tile_stride(), op.b->v.data() + h / group * hp.head_dim, width,
          op.b->n_past + op.first + op.attend_from + r, 0, hp.attention_scale, out + r * ld + h * hp.head_dim,
          ld, op.b->scratch[static_cast<size_t>(ith)].data());
    }
  }
};

Prefill::Prefill(const ModelWeights& weights, const kernels::RopeTable& rope, GraphRunner& runner,
                 PrefillProducts products)
    : weights_(weights), rope_(rope), runner_(runner), how_(products) {}

Prefill::~Prefill() = default;

int64_t Prefill::bytes_needed(const ModelWeights& weights, int64_t n, int64_t n_past, int n_threads,
                              PrefillProducts products) {
  const Hparams& hp = weights.hparams();
  const int64_t width = hp.n_head_kv * hp.head_dim, chunk = std::min(n, kChunk);
  const int64_t floats = n * hp.n_embd + n * width + 2 * (tiles(n_past + n) * kTile) * width +
                         chunk * (4 * hp.n_embd + 3 * hp.n_ff + 4 * hp.n_head * hp.head_dim) + hp.n_vocab;
  const int64_t unpacked = in_bf16(weights, products, n) ? Bf16Products::bytes_needed(weights, n_threads) : 0;
  return floats * static_cast<int64_t>(sizeof(float)) + unpacked;
}

namespace {

/// A tensor over memory that we own.
ggml_tensor* tensor_over(ggml_context* ctx, float* data, int64_t n_row, int64_t n) {
  ggml_tensor* t = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_row, n);
  t->data = data;
  return t;
}

}  // namespace

Status Prefill::run_chunk(int64_t layer, int64_t first, int64_t n, bool last_row_only,
                          const PrefillHooks& hooks, float* logits) {
  const Hparams& hp = weights_.hparams();
  LayerBuffers& b = *buffers_;
  const bool final_chunk = first + n == b.n;
  const ggml_init_params params = {b.graph_memory.size(), b.graph_memory.data(), true};
  ggml_context* ctx = ggml_init(params);
  ggml_cgraph* graph = ggml_new_graph_custom(ctx, kGraphTensors, false);

  ChunkOp op;
  op.queries = hooks.queries ? &hooks.queries : nullptr;
  op.layer = layer;
  op.hp = &hp;
  op.rope = &rope_;
  op.b = &b;
  op.first = first;
  op.n = n;
  op.attend_from = last_row_only ? n - 1 : 0;

  const LayerWeights& w = weights_.layer(layer);
  float* hidden = b.hidden.data() + first * hp.n_embd;
  Qkv qkv = build_qkv(ctx, hp, w, tensor_over(ctx, hidden, hp.n_embd, n), products_.get());
  ggml_tensor* args[3] = {qkv.q, qkv.k, qkv.v};
  ggml_tensor* stored =
      ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, args, 3, &ChunkOp::store, GGML_N_TASKS_MAX, &op);
  ggml_tensor* result = stored;
  const bool attends = !last_row_only || final_chunk;
  if (attends) {
    const int64_t rows = n - op.attend_from;
    ggml_tensor* attention = ggml_custom_4d(ctx, GGML_TYPE_F32, hp.n_head * hp.head_dim, rows, 1, 1, &stored,
                                            1, &ChunkOp::attend, GGML_N_TASKS_MAX, &op);
    ggml_tensor* x = tensor_over(ctx, hidden + op.attend_from * hp.n_embd, hp.n_embd, rows);
    result = build_rest(ctx, hp, w, x, attention, products_.get());
    if (last_row_only) result = build_logits(ctx, weights_, result);
  }
  ggml_set_output(result);
  ggml_build_forward_expand(graph, result);
  Status status;
  if (!ggml_gallocr_alloc_graph(b.allocator, graph)) {
    status = Status(StatusCode::out_of_memory, "no memory for the activations of a chunk of the prompt");
  } else {
    status = runner_.run(graph);
    if (status.ok() && products_) status = products_->status();
  }
  if (status.ok() && attends) {
    float* to = last_row_only ? logits : hidden;
    const int64_t count = last_row_only ? hp.n_vocab : n * hp.n_embd;
    std::memcpy(to, result->data, static_cast<size_t>(count) * sizeof(float));
  }
  ggml_free(ctx);
  return status;
}

Status Prefill::run(std::span<const Token> tokens, int64_t n_past, const PrefillHooks& hooks,
                    const ProgressFn& progress, float* logits) {
  const Hparams& hp = weights_.hparams();
  const auto n = static_cast<int64_t>(tokens.size());
  const int64_t width = hp.n_head_kv * hp.head_dim;
  buffers_ = std::make_unique<LayerBuffers>();
  LayerBuffers& b = *buffers_;
  b.n = n;
  b.n_past = n_past;
  b.hidden = AlignedArray<float>(n * hp.n_embd);
  b.k_raw = AlignedArray<float>(n * width);
  b.k_tile = AlignedArray<float>(tiles(n_past + n) * kTile * width);
  b.v = AlignedArray<float>((n_past + n) * width);
  b.q = AlignedArray<float>(std::min(n, kChunk) * hp.n_head * hp.head_dim);
  bool ok = b.hidden.ok() && b.k_raw.ok() && b.k_tile.ok() && b.v.ok() && b.q.ok();
  for (int i = 0; i < runner_.n_threads(); ++i) {
    b.scratch.emplace_back(kernels::prefill_scratch_floats(kRows, hp.head_dim));
    ok = ok && b.scratch.back().ok();
  }
  b.graph_memory.resize(ggml_tensor_overhead() * kGraphTensors +
                        ggml_graph_overhead_custom(kGraphTensors, false));
  b.allocator = ggml_gallocr_new(ggml_backend_cpu_buffer_type());
  if (!ok || b.allocator == nullptr) {
    return {
        StatusCode::out_of_memory,
        fmt::format("a prompt of {} tokens needs {:.1f} GB beside the weights; shorten it", n,
                    static_cast<double>(bytes_needed(weights_, n, n_past, runner_.n_threads(), how_)) / 1e9)};
  }

  products_.reset();
  if (in_bf16(weights_, how_, n)) {
    Result<std::unique_ptr<Bf16Products>> made = Bf16Products::create(weights_, runner_);
    if (!made.ok()) return made.status();
    products_ = std::move(*made);
  }
  Status status = weights_.embed(tokens, b.hidden.data());
  AlignedArray<float> past(kTile * width);
  for (int64_t layer = 0; layer < hp.n_layer && status.ok(); ++layer) {
    if (products_) status = products_->load(layer);
    if (!status.ok()) break;
    ChunkOp past_op;
    past_op.hp = &hp;
    past_op.b = &b;
    for (int64_t at = 0; at < n_past; at += kTile) {
      const int64_t count = std::min(kTile, n_past - at);
      hooks.read_past(layer, at, count, past.data(), b.v.data() + at * width);
      for (int64_t i = 0; i < count; ++i) past_op.put_key(at + i, past.data() + i * width);
    }
    const bool last_layer = layer + 1 == hp.n_layer;
    for (int64_t first = 0; first < n && status.ok(); first += kChunk) {
      if (progress) {
        const double done =
            (static_cast<double>(layer) + static_cast<double>(first) / static_cast<double>(n)) /
            static_cast<double>(hp.n_layer);
        if (!progress(done)) status = Status(StatusCode::cancelled, "the prompt was cancelled");
      }
      if (status.ok())
        status = run_chunk(layer, first, std::min(kChunk, n - first), last_layer, hooks, logits);
    }
    if (!status.ok()) break;
    status = hooks.layer_done(layer, b.k_raw.data(), b.v.data() + n_past * width, n);
    if (!status.ok()) status = Status(status.code(), fmt::format("layer {}: {}", layer, status.message()));
  }
  buffers_.reset();
  products_.reset();
  if (status.ok() && progress) progress(1.0);
  return status;
}

}  // namespace narrows
