// The loop over layers and chunks, and the three custom ops of a chunk: `store` rotates and keeps keys,
// values and queries, `pack` makes tiles of them, `choose` and `attend` are PromptAttention.
#include "prefill/prefill.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "base/aligned.h"
#include "base/guarded.h"
#include "ggml-alloc.h"
#include "kernels/ops.h"
#include "prefill/attention.h"

namespace narrows {

namespace {

using kernels::kPrefillTile;

/// Rows of one chunk: enough that a weight read from memory is used 512 times, few enough that a chunk's
/// activations stay below some tens of MB. Whole tiles: a tile is packed when all of its keys are there.
constexpr int64_t kChunk = 512;
static_assert(kChunk % kPrefillTile == 0);
/// Shorter prompts are multiplied out of the packed weights: unpacking them would cost more than it saves
/// (docs/experiments.md).
constexpr int64_t kBf16Rows = 96;
/// Tensors in a chunk's graph: one layer (about 25) and the logits.
constexpr size_t kGraphTensors = 96;

AttentionSizes attention_sizes(const Hparams& hp) {
  return {hp.n_head, hp.n_head_kv, hp.head_dim, hp.attention_scale};
}

bool in_bf16(const ModelWeights& weights, PrefillProducts how, int64_t n) {
  if (how == PrefillProducts::int8 || !Bf16Products::applies(weights)) return false;
  return Bf16Products::supported() && (how == PrefillProducts::bf16 || n >= kBf16Rows);
}

}  // namespace

/// Everything that lives for one run. D = n_head_kv * head_dim. `tail`: tokens of the cache that share a tile
/// with the first new one.
struct Prefill::LayerBuffers {
  LayerBuffers(const Hparams& hp, const PromptOptions& options, int64_t n_new, int64_t past, int n_threads,
               bool wants_queries)
      : n(n_new),
        n_past(past),
        tail(past % kPrefillTile),
        hidden(n * hp.n_embd),
        k_raw(n * hp.n_head_kv * hp.head_dim),
        k_rotated((kPrefillTile + kChunk) * hp.n_head_kv * hp.head_dim),
        v((tail + n) * hp.n_head_kv * hp.head_dim),
        past_v(kPrefillTile * hp.n_head_kv * hp.head_dim),
        q(std::min(n, kChunk) * hp.n_head * hp.head_dim),
        q_raw(wants_queries ? q.size() : 0),
        attention(attention_kind(options.attention), attention_sizes(hp), n_past + n, n_threads,
                  options.mass) {}
  LayerBuffers(const LayerBuffers&) = delete;
  LayerBuffers& operator=(const LayerBuffers&) = delete;
  ~LayerBuffers() {
    if (allocator != nullptr) ggml_gallocr_free(allocator);
  }
  bool ok() const {
    return hidden.ok() && k_raw.ok() && k_rotated.ok() && v.ok() && past_v.ok() && q.ok() && q_raw.ok() &&
           attention.ok() && allocator != nullptr;
  }

  /// Memory for the graph's tensors; false, or an exception, if there is none.
  bool allocate(ggml_cgraph* graph) {
    try {
      return ggml_gallocr_alloc_graph(allocator, graph);
    } catch (...) {
      // It has freed its buffer and would do so again: it is C and expects no exception of the C++ that it
      // calls. What is left of it is a list.
      allocator = nullptr;
      throw;
    }
  }

  int64_t n;  ///< new tokens
  int64_t n_past;
  int64_t tail;
  AlignedArray<float> hidden;     ///< [n, n_embd] residual stream
  AlignedArray<float> k_raw;      ///< [n, D] before RoPE
  AlignedArray<float> k_rotated;  ///< [.., D] from the first token of the tile in which the chunk begins
  AlignedArray<float> v;          ///< [tail + n, D]
  AlignedArray<float> past_v;     ///< [kPrefillTile, D]
  AlignedArray<float> q;          ///< [kChunk, n_head * head_dim] rotated
  AlignedArray<float> q_raw;      ///< the same before RoPE, if somebody wants them
  PromptAttention attention;

  // Where the run stands.
  int64_t layer = 0;
  int64_t next = 0;           ///< first token of the next chunk
  int64_t segment_begin = 0;  ///< of the segment that it belongs to
  size_t segment = 0;
  int64_t segment_end(const PrefillHooks& hooks) const {
    return segment < hooks.segment_ends.size() ? hooks.segment_ends[segment] : n;
  }

  std::vector<uint8_t> graph_memory = std::vector<uint8_t>(ggml_tensor_overhead() * kGraphTensors +
                                                           ggml_graph_overhead_custom(kGraphTensors, false));
  ggml_gallocr_t allocator = ggml_gallocr_new(ggml_backend_cpu_buffer_type());
};

/// What the custom ops of one chunk need.
struct Prefill::ChunkOp {
  const Hparams* hp;
  const kernels::RopeTable* rope;
  LayerBuffers* b;
  int64_t first;        ///< index of the chunk's first token among the new ones
  int64_t n;            ///< tokens of the chunk
  int64_t attend_from;  ///< first row of the chunk that needs attention
  std::atomic<int64_t> next_task{0};
  FirstError error;  ///< of its ops: nothing may be thrown on ggml's threads

  int64_t width() const { return hp->n_head_kv * hp->head_dim; }
  int64_t position() const { return b->n_past + first; }

  void store_row(const Qkv& t, int64_t r, float* angle) const {
    const auto row = [r](const ggml_tensor* x) {
      return reinterpret_cast<const float*>(static_cast<const char*>(x->data) +
                                            static_cast<size_t>(r) * x->nb[2]);
    };
    const kernels::Ops& op = kernels::ops();
    const int64_t half = hp->rope.n_rot / 2;
    const auto bytes = static_cast<size_t>(width()) * sizeof(float);
    rope->at(position() + r, angle, angle + half);
    std::memcpy(b->k_raw.data() + (first + r) * width(), row(t.k), bytes);
    std::memcpy(b->v.data() + (b->tail + first + r) * width(), row(t.v), bytes);
    op.rope_rows(row(t.k), hp->n_head_kv, hp->head_dim, hp->rope.n_rot, angle, angle + half, 0, false,
                 b->k_rotated.data() + (position() % kPrefillTile + r) * width());
    op.rope_rows(row(t.q), hp->n_head, hp->head_dim, hp->rope.n_rot, angle, angle + half, 0, false,
                 b->q.data() + r * hp->n_head * hp->head_dim);
    if (b->q_raw.size() > 0) {
      const int64_t width_q = hp->n_head * hp->head_dim;
      std::memcpy(b->q_raw.data() + r * width_q, row(t.q), static_cast<size_t>(width_q) * sizeof(float));
    }
  }

  static void store(ggml_tensor* dst, int ith, int nth, void* userdata) {
    ChunkOp& op = *static_cast<ChunkOp*>(userdata);
    op.error.run("a chunk of the prompt", [&] {
      const Qkv t{dst->src[0], dst->src[1], dst->src[2]};
      std::vector<float> angle(static_cast<size_t>(op.hp->rope.n_rot));
      const int64_t from = op.n * ith / nth, to = op.n * (ith + 1) / nth;
      for (int64_t r = from; r < to; ++r) op.store_row(t, r, angle.data());
    });
  }

  /// Tiles of the chunk, the one in which it begins included: tasks of one tile of one KV head.
  static void pack(ggml_tensor* /*dst*/, int /*ith*/, int /*nth*/, void* userdata) {
    ChunkOp& op = *static_cast<ChunkOp*>(userdata);
    op.error.run("a chunk of the prompt", [&op] { op.pack_tiles(); });
  }
  void pack_tiles() {
    const int64_t begin = position() / kPrefillTile * kPrefillTile, end = position() + n;
    const int64_t tasks = PromptAttention::tiles(end - begin) * hp->n_head_kv;
    for (int64_t task = next_task++; task < tasks; task = next_task++) {
      const int64_t at = task / hp->n_head_kv * kPrefillTile;
      b->attention.pack(task % hp->n_head_kv, (begin + at) / kPrefillTile, b->k_rotated.data() + at * width(),
                        b->v.data() + (begin + at - b->n_past + b->tail) * width(),
                        std::min(kPrefillTile, end - begin - at));
    }
  }

  /// A sparse prompt: which tiles are read.
  static void choose(ggml_tensor* /*dst*/, int ith, int /*nth*/, void* userdata) {
    ChunkOp& op = *static_cast<ChunkOp*>(userdata);
    op.error.run("a chunk of the prompt", [&] { op.b->attention.choose(ith); });
  }

  /// dst [n_head * head_dim, n - attend_from].
  static void attend(ggml_tensor* /*dst*/, int ith, int /*nth*/, void* userdata) {
    ChunkOp& op = *static_cast<ChunkOp*>(userdata);
    op.error.run("a chunk of the prompt", [&] { op.b->attention.run(ith); });
  }
};

Prefill::Prefill(const ModelWeights& weights, const kernels::RopeTable& rope, GraphRunner& runner,
                 const PromptOptions& options)
    : weights_(weights), rope_(rope), runner_(runner), options_(options), packed_(weights) {}

Prefill::~Prefill() = default;

int64_t Prefill::bytes_needed(const ModelWeights& weights, int64_t n, int64_t n_past, int n_threads,
                              const PromptOptions& options) {
  const Hparams& hp = weights.hparams();
  const int64_t width = hp.n_head_kv * hp.head_dim, chunk = std::min(n, kChunk);
  const int64_t floats = n * (hp.n_embd + 2 * width) + (2 * kPrefillTile + kChunk) * width +
                         chunk * (4 * hp.n_embd + 3 * hp.n_ff + 5 * hp.n_head * hp.head_dim) + hp.n_vocab;
  const int64_t more = in_bf16(weights, options.products, n) ? Bf16Products::bytes_needed(weights, n_threads)
                                                             : PackedProducts::bytes_needed(weights, chunk);
  return floats * static_cast<int64_t>(sizeof(float)) + more +
         PromptAttention::bytes_needed(attention_kind(options.attention), attention_sizes(hp), n_past + n,
                                       n_threads, options.mass);
}

namespace {

/// First of n rows [width] of keys and values with a number that half precision cannot hold; -1 if none has.
int64_t first_bad_row(const float* k, const float* v, int64_t n, int64_t width) {
  constexpr float kLargest = 65504;  // false for NaN too
  const auto good = [](float x) { return std::fabs(x) <= kLargest; };
  for (int64_t r = 0; r < n; ++r) {
    if (!std::all_of(k + r * width, k + (r + 1) * width, good) ||
        !std::all_of(v + r * width, v + (r + 1) * width, good))
      return r;
  }
  return -1;
}

Status not_finite(int64_t layer, int64_t token, PrefillAttention how) {
  const bool narrow =
      how == PrefillAttention::fp16 || how == PrefillAttention::pasa || how == PrefillAttention::fp16_shift;
  return {
      StatusCode::non_finite,
      narrow ? fmt::format(
                   "layer {}: attention in {} overflows half precision; take --attention bf16-shift or f32",
                   layer, attention_name(how))
      : token >= 0
          ? fmt::format(
                "layer {}, token {}: a key or value is not finite or beyond 65504, which a cache cannot hold",
                layer, token)
          : fmt::format("layer {}: attention gives numbers that are not finite; keys, queries or values of "
                        "this model overflow",
                        layer)};
}

/// A tensor over memory that we own.
ggml_tensor* tensor_over(ggml_context* ctx, float* data, int64_t n_row, int64_t n) {
  ggml_tensor* t = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_row, n);
  t->data = data;
  return t;
}

}  // namespace

Status Prefill::run_chunk(int64_t layer, int64_t first, int64_t n, bool last_row_only) {
  const Hparams& hp = weights_.hparams();
  LayerBuffers& b = *buffers_;
  const bool final_chunk = first + n == b.n;
  const ggml_init_params params = {b.graph_memory.size(), b.graph_memory.data(), true};
  const std::unique_ptr<ggml_context, void (*)(ggml_context*)> owner(ggml_init(params), ggml_free);
  ggml_context* const ctx = owner.get();
  ggml_cgraph* graph = ggml_new_graph_custom(ctx, kGraphTensors, false);

  ChunkOp op;
  op.hp = &hp;
  op.rope = &rope_;
  op.b = &b;
  op.first = first;
  op.n = n;
  op.attend_from = last_row_only ? n - 1 : 0;

  packed_.begin();
  Products* products = bf16_ ? static_cast<Products*>(bf16_.get()) : &packed_;
  const LayerWeights& w = weights_.layer(layer);
  float* hidden = b.hidden.data() + first * hp.n_embd;
  Qkv qkv = build_qkv(ctx, hp, w, tensor_over(ctx, hidden, hp.n_embd, n), products);
  ggml_tensor* args[3] = {qkv.q, qkv.k, qkv.v};
  ggml_tensor* stored =
      ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, args, 3, &ChunkOp::store, GGML_N_TASKS_MAX, &op);
  ggml_tensor* packed =
      ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, &stored, 1, &ChunkOp::pack, GGML_N_TASKS_MAX, &op);
  ggml_tensor* result = packed;
  ggml_tensor* attention = nullptr;
  const int64_t rows = n - op.attend_from;
  const bool attends = !last_row_only || final_chunk;
  if (attends) {
    ggml_tensor* before = packed;
    if (b.attention.is_sparse(rows, op.position() + op.attend_from))
      before =
          ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, &packed, 1, &ChunkOp::choose, GGML_N_TASKS_MAX, &op);
    attention = ggml_custom_4d(ctx, GGML_TYPE_F32, hp.n_head * hp.head_dim, rows, 1, 1, &before, 1,
                               &ChunkOp::attend, GGML_N_TASKS_MAX, &op);
    ggml_tensor* x = tensor_over(ctx, hidden + op.attend_from * hp.n_embd, hp.n_embd, rows);
    result = build_rest(ctx, hp, w, x, attention, products);
    if (last_row_only) result = build_logits(ctx, weights_, result, &packed_);
  }
  ggml_set_output(result);
  ggml_build_forward_expand(graph, result);
  Status status;
  if (bf16_) status = bf16_->status();
  if (!status.ok()) return status;
  if (!packed_.ok() || !b.allocate(graph)) {
    status = Status(StatusCode::out_of_memory, "no memory for the activations of a chunk of the prompt");
  } else {
    if (attends) {
      b.attention.start(b.q.data() + op.attend_from * hp.n_head * hp.head_dim, rows,
                        op.position() + op.attend_from, static_cast<float*>(attention->data));
    }
    status = runner_.run(graph);
    if (status.ok()) status = op.error.take();
    if (status.ok() && bf16_) status = bf16_->status();
    if (status.ok() && attends && !b.attention.finite()) {
      // From the first new token on: in the last layer only the last row attends.
      const float* v = b.v.data() + b.tail * op.width();
      const int64_t bad = first_bad_row(b.k_raw.data(), v, first + n, op.width());
      status = not_finite(layer, bad < 0 ? bad : b.n_past + bad, options_.attention);
    }
  }
  if (status.ok() && hooks_.queries) hooks_.queries(layer, b.q_raw.data(), n);
  if (status.ok() && attends) {
    float* to = last_row_only ? logits_ : hidden;
    const int64_t count = last_row_only ? hp.n_vocab : n * hp.n_embd;
    std::memcpy(to, result->data, static_cast<size_t>(count) * sizeof(float));
  }
  return status;
}

/// Tokens [from, to) of the cache into tiles: whole ones are packed; what is left waits for the next chunk.
void Prefill::pack_past(int64_t from, int64_t to) {
  LayerBuffers& b = *buffers_;
  const int64_t width = weights_.hparams().n_head_kv * weights_.hparams().head_dim;
  for (int64_t at = from / kPrefillTile * kPrefillTile; at < to; at += kPrefillTile) {
    const int64_t n = std::min(kPrefillTile, to - at);
    if (n < kPrefillTile)
      return hooks_.read_past(b.layer, at, n, b.k_rotated.data(),
                              b.v.data() + (at - b.n_past + b.tail) * width);
    hooks_.read_past(b.layer, at, n, b.k_rotated.data(), b.past_v.data());
    for (int64_t h = 0; h < weights_.hparams().n_head_kv; ++h)
      b.attention.pack(h, at / kPrefillTile, b.k_rotated.data(), b.past_v.data(), n);
  }
}

Status Prefill::begin(std::span<const Token> tokens, int64_t n_past, PrefillHooks hooks, float* logits) {
  const auto n = static_cast<int64_t>(tokens.size());
  hooks_ = std::move(hooks);
  logits_ = logits;
  auto buffers = std::make_unique<LayerBuffers>(weights_.hparams(), options_, n, n_past, runner_.n_threads(),
                                                static_cast<bool>(hooks_.queries));
  if (!buffers->ok()) {
    const int64_t bytes = bytes_needed(weights_, n, n_past, runner_.n_threads(), options_);
    return {StatusCode::out_of_memory,
            fmt::format("a prompt of {} tokens needs {:.1f} GB beside the weights; shorten it", n,
                        static_cast<double>(bytes) / 1e9)};
  }
  if (!in_bf16(weights_, options_.products, n)) bf16_.reset();
  if (bf16_ == nullptr && in_bf16(weights_, options_.products, n)) {
    Result<std::unique_ptr<Bf16Products>> made = Bf16Products::create(weights_, runner_, packed_);
    if (!made.ok()) return made.status();
    bf16_ = std::move(*made);
  }
  if (Status s = weights_.embed(tokens, buffers->hidden.data()); !s.ok()) return s;
  buffers_ = std::move(buffers);
  return {};
}

double Prefill::progress() const {
  if (done()) return 1.0;
  return (static_cast<double>(buffers_->layer) +
          static_cast<double>(buffers_->next) / static_cast<double>(buffers_->n)) /
         static_cast<double>(weights_.hparams().n_layer);
}

Status Prefill::open_layer() {
  if (bf16_) {
    if (Status s = bf16_->load(buffers_->layer); !s.ok()) return s;
  }
  pack_past(0, buffers_->n_past);
  return {};
}

Status Prefill::close_segment() {
  LayerBuffers& b = *buffers_;
  const int64_t width = weights_.hparams().n_head_kv * weights_.hparams().head_dim;
  Status status =
      hooks_.layer_done(b.layer, b.k_raw.data() + b.segment_begin * width,
                        b.v.data() + (b.tail + b.segment_begin) * width, b.next - b.segment_begin);
  const bool ends = b.next == b.n;
  if (status.ok() && hooks_.seal && (!ends || hooks_.goes_on)) {
    // The segment itself is always read back: what the cache holds of it is rounded at the least.
    const int64_t begin = b.n_past + b.segment_begin;
    int64_t changed_from = begin;
    status = hooks_.seal(b.layer, &changed_from);
    if (status.ok() && !ends) pack_past(std::min(changed_from, begin), b.n_past + b.next);
  }
  if (!status.ok()) return {status.code(), fmt::format("layer {}: {}", b.layer, status.message())};
  b.segment_begin = b.next;
  ++b.segment;
  if (b.next < b.n) return {};
  b.next = b.segment_begin = 0;
  b.segment = 0;
  if (++b.layer == weights_.hparams().n_layer) {
    tiles_seen_ += b.attention.tiles_seen();
    tiles_read_ += b.attention.tiles_read();
    buffers_.reset();
    if (!hooks_.goes_on) bf16_.reset();
  }
  return {};
}

Status Prefill::step() {
  LayerBuffers& b = *buffers_;
  if (b.next == 0) {
    if (Status s = open_layer(); !s.ok()) return s;
  }
  const int64_t end = b.segment_end(hooks_);
  const int64_t n = std::min(kChunk - (b.n_past + b.next) % kPrefillTile, end - b.next);
  if (Status s = run_chunk(b.layer, b.next, n, b.layer + 1 == weights_.hparams().n_layer); !s.ok()) return s;
  b.next += n;
  return b.next == end ? close_segment() : Status();
}

Status Prefill::run(std::span<const Token> tokens, int64_t n_past, PrefillHooks hooks,
                    const ProgressFn& progress, float* logits) {
  Status status = begin(tokens, n_past, std::move(hooks), logits);
  while (status.ok() && !done()) {
    if (progress && !progress(this->progress()))
      status = Status(StatusCode::cancelled, "the prompt was cancelled");
    if (status.ok()) status = step();
  }
  buffers_.reset();
  bf16_.reset();
  if (status.ok() && progress) progress(1.0);
  return status;
}

}  // namespace narrows
