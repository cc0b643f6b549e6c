// The loop over layers and chunks, and the mix stage of a chunk: keys, values and queries are rotated and
// kept, made into tiles, and PromptAttention attends to them.
#include "prompt/prefill.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <optional>

#include "base/guarded.h"
#include "base/part.h"
#include "exec/cpu/cpu_executor.h"
#include "exec/cuda/block_mixer.h"
#include "kernels/ops.h"
#include "kv/klt/cuda/klt_prompt.h"
#include "kv/layout.h"
#include "prompt/attention.h"
#include "prompt/prefill_buffers.h"

namespace narrows {

namespace {

using kernels::kPrefillTile;

/// Shorter prompts are multiplied out of the packed weights: unpacking them would cost more than it saves
/// (docs/experiments.md).
constexpr int64_t kBf16Rows = 96;

AttentionSizes sizes_of(const AttentionSpec& a) { return {a.n_head, a.n_head_kv, a.head_dim, a.scale}; }

/// True if a prompt of n tokens multiplies by layers that are loaded for it, where they can be.
bool long_enough(PrefillProducts how, int64_t n) {
  return how == PrefillProducts::bf16 || (how != PrefillProducts::int8 && n >= kBf16Rows);
}

/// Rows whose logits are computed in one pass over the weights, where those of all tokens are wanted.
constexpr int64_t kRowsAtOnce = 16;

/// What a thread of a recurrent layer works in.
int64_t recurrent_floats(const Plan& plan) {
  int64_t most = 0;
  for (const LayerPlan& l : plan.layers) {
    if (l.mix.is_recurrent()) most = std::max(most, RecurrentRows::work_floats(l.mix.delta_net.shape));
  }
  return most;
}

}  // namespace

/// Attention of one chunk. Tasks are rows, then tiles of a KV head, then heads, then blocks of rows of a
/// head.
class Prefill::ChunkMixer final : public Mixer {
 public:
  /// first: index of the chunk's first token among the new ones; n: its tokens; attend_from: first row of the
  /// chunk that needs attention, n if none does.
  ChunkMixer(LayerBuffers& b, const kernels::RopeTable& rope, int64_t first, int64_t n, int64_t attend_from)
      : b_(b), rope_(rope), first_(first), n_(n), attend_from_(attend_from) {}

  void mix(const LayerPlan& layer, const MixRows& rows, Team& team) override {
    const AttentionSpec& a = layer.mix.attention;
    const auto stage = [&](auto&& work) {
      error_.run("a chunk of the prompt", work);
      team.barrier();
    };
    stage([&] { store(layer.mix, rows, part_of(n_, team.ith(), team.n_threads())); });
    stage([&] { pack_tiles(a); });
    if (attend_from_ == n_) return;
    PromptAttention& attention = *b_.attention;
    const int64_t attending = n_ - attend_from_, position = b_.position(first_ + attend_from_);
    if (team.ith() == 0)
      attention.start(b_.q.data() + attend_from_ * a.width_q(), attending, position, a.window,
                      rows.out + attend_from_ * rows.ldo, layer.mix.sinks);
    team.barrier();
    if (attention.is_sparse(attending, position, a.window)) stage([&] { attention.choose(team.ith()); });
    stage([&] { attention.run(team.ith()); });
  }

  Status take_error() { return error_.take(); }

 private:
  void store(const MixStage& mix, const MixRows& rows, Part mine) {
    const AttentionSpec& a = mix.attention;
    const kernels::Ops& op = kernels::ops();
    const int64_t half = rope_.n_rot() / 2, width = a.width_kv(), width_q = a.width_q();
    const int64_t position = b_.position(first_);
    std::vector<float> angle(static_cast<size_t>(2 * half));
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      float* q = rows.q + r * rows.ld;
      float* k = rows.k + r * rows.ld;
      norm_heads(mix.q_norm, 0, mix.q_norm.n, q);
      norm_heads(mix.k_norm, 0, mix.k_norm.n, k);
      if (a.temperature != 0) {
        const float factor = a.query_factor(position + r);
        for (int64_t i = 0; i < width_q; ++i) q[i] *= factor;
      }
      rope_.at(position + r, angle.data(), angle.data() + half);
      std::copy_n(k, width, b_.k_raw.data() + (first_ + r) * width);
      std::copy_n(rows.v + r * rows.ld, width, b_.v.data() + (b_.tail + first_ + r) * width);
      op.rope_rows(k, a.n_head_kv, a.head_dim, 2 * half, angle.data(), angle.data() + half, 0, false,
                   b_.k_rotated.data() + (position % kPrefillTile + r) * width);
      op.rope_rows(q, a.n_head, a.head_dim, 2 * half, angle.data(), angle.data() + half, 0, false,
                   b_.q.data() + r * width_q);
      if (b_.q_raw.size() > 0) std::copy_n(q, width_q, b_.q_raw.data() + r * width_q);
    }
  }

  /// Tiles of the chunk, the one in which it begins included: tasks of one tile of one KV head.
  void pack_tiles(const AttentionSpec& a) {
    const int64_t position = b_.position(first_), width = a.width_kv();
    const int64_t begin = position / kPrefillTile * kPrefillTile, end = position + n_;
    const int64_t tasks = PromptAttention::tiles(end - begin) * a.n_head_kv;
    for (int64_t task = next_task_++; task < tasks; task = next_task_++) {
      const int64_t at = task / a.n_head_kv * kPrefillTile;
      b_.attention->pack(task % a.n_head_kv, (begin + at) / kPrefillTile, b_.k_rotated.data() + at * width,
                         b_.v.data() + (begin + at - b_.n_past + b_.tail) * width,
                         std::min(kPrefillTile, end - begin - at));
    }
  }

  LayerBuffers& b_;
  const kernels::RopeTable& rope_;
  const int64_t first_, n_, attend_from_;
  std::atomic<int64_t> next_task_{0};
  FirstError error_;
};

/// The rows of one chunk through the state of a recurrent layer.
class Prefill::RecurrentMixer final : public Mixer {
 public:
  RecurrentMixer(const PrefillHooks& hooks, float* work) : hooks_(hooks), work_(work) {}

  void mix(const LayerPlan& layer, const MixRows& rows, Team& team) override {
    const RecurrentRows mine{&layer.mix.delta_net, rows.q, rows.ld, rows.out, rows.ldo, rows.n, work_};
    for (int phase = 0; phase < RecurrentRows::kPhases; ++phase) {
      hooks_.run_rows(layer.index, phase, mine, team.ith(), team.n_threads());
      team.barrier();
    }
  }

 private:
  const PrefillHooks& hooks_;
  float* work_;
};

Prefill::Prefill(const ModelWeights& weights, const Plan& plan, std::span<const kernels::RopeTable> ropes,
                 Executor& executor, const PromptOptions& options)
    : weights_(weights), plan_(plan), ropes_(ropes), executor_(executor), options_(options) {}

Prefill::~Prefill() { executor_.shrink(); }

int64_t Prefill::bytes_needed(const ModelSpec& spec, const Plan& plan, int64_t n, int64_t n_past,
                              int n_threads, const PromptOptions& options) {
  const int64_t width = spec.most_width_kv(), chunk = std::min(n, kChunk);
  const int64_t floats = n * (spec.n_embd + 2 * width) + (2 * kPrefillTile + kChunk) * width +
                         chunk * 2 * spec.most_width_q() + spec.n_vocab;
  const bool loaded = long_enough(options.products, n) &&
                      std::any_of(plan.layers.begin(), plan.layers.end(), LoadedLayer::supports);
  int64_t attention = 0;
  for (const LayerPlan& l : plan.layers) {
    if (l.mix.is_recurrent()) continue;
    attention = std::max(
        attention, PromptAttention::bytes_needed(attention_kind(options.attention), sizes_of(l.mix.attention),
                                                 n_past + n, n_threads, options.mass));
  }
  return (floats + n_threads * recurrent_floats(plan)) * static_cast<int64_t>(sizeof(float)) + attention +
         CpuExecutor::bytes_needed(spec, plan, chunk, loaded, n_threads);
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

}  // namespace

const AttentionSpec& Prefill::attention() const {
  return plan_.layers[static_cast<size_t>(buffers_->layer)].mix.attention;
}

bool Prefill::is_recurrent() const {
  return plan_.layers[static_cast<size_t>(buffers_->layer)].mix.is_recurrent();
}

bool Prefill::loads(int64_t layer) const {
  return long_enough(options_.products, buffers_->n) &&
         executor_.can_load(plan_.layers[static_cast<size_t>(layer)]);
}

Status Prefill::run_chunk(int64_t first, int64_t n) {
  LayerBuffers& b = *buffers_;
  const LayerPlan& layer = plan_.layers[static_cast<size_t>(b.layer)];
  const AttentionSpec& a = layer.mix.attention;
  // Of the last layer only the last row is wanted, and keys and values; but where all rows are asked for.
  const bool last_layer = &layer == &plan_.layers.back(), all_rows = last_layer && wants_rows();
  const bool gives_logits = last_layer && !all_rows && first + n == b.n;
  const int64_t from = all_rows ? 0 : gives_logits ? n - 1 : last_layer ? n : 0;
  Run run;
  run.layers = {&layer, 1};
  run.n = n;
  run.from = from;
  run.loaded = loads(b.layer);
  if (gives_logits) {
    run.output = &plan_.output;
    run.logits = logits_;
  }
  if (hooks_.blocks != nullptr) return run_chunk_on_device(run, first);
  run.x = b.hidden.data() + first * weights_.spec().n_embd;
  if (is_recurrent()) {
    RecurrentMixer mixer(hooks_, b.recurrent.data());
    run.mixer = &mixer;
    Status status = hooks_.begin_rows(b.layer, n);
    if (status.ok()) status = executor_.run(run);
    return status.ok() && all_rows ? give_rows(first, n) : status;
  }
  ChunkMixer mixer(b, ropes_[static_cast<size_t>(a.rope)], first, n, from);
  run.mixer = &mixer;
  Status status = executor_.run(run);
  if (Status s = mixer.take_error(); status.ok()) status = std::move(s);
  if (status.ok() && from < n && !b.attention->finite()) {
    // From the first new token on: in the last layer only the last row attends.
    const int64_t width = a.width_kv();
    const int64_t bad = first_bad_row(b.k_raw.data(), b.v.data() + b.tail * width, first + n, width);
    status = not_finite(b.layer, bad < 0 ? bad : b.n_past + bad, options_.attention);
  }
  if (status.ok() && hooks_.queries) hooks_.queries(b.layer, b.q_raw.data(), n);
  return status.ok() && all_rows ? give_rows(first, n) : status;
}

/// Rows of the residual stream that have been through all layers: what is asked of them, and the logits after
/// the last one.
Status Prefill::give_rows(int64_t first, int64_t n) {
  LayerBuffers& b = *buffers_;
  const int64_t d = weights_.spec().n_embd, n_vocab = weights_.spec().n_vocab;
  float* const x = b.hidden.data() + first * d;
  if (hooks_.hidden) {
    std::vector<float> row(static_cast<size_t>(d));
    for (int64_t r = 0; r < n; ++r) {
      norm_row(plan_.output.norm, x + r * d, d, row.data());
      hooks_.hidden(first + r, row);
    }
  }
  if (Status s = executor_.reserve(kRowsAtOnce, false); !s.ok()) return s;
  const auto multiply = [&](int64_t begin, int64_t rows, float* logits) {
    Run run;
    run.x = x + begin * d;
    run.n = rows;
    run.output = &plan_.output;
    run.logits = logits;
    return executor_.run(run);
  };
  for (int64_t begin = 0; hooks_.logits && begin < n; begin += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, n - begin);
    if (Status s = multiply(begin, rows, row_logits_.data()); !s.ok()) return s;
    executor_.for_each(rows, [&](int64_t r) {
      hooks_.logits(first + begin + r,
                    std::span(row_logits_.data() + r * n_vocab, static_cast<size_t>(n_vocab)));
    });
  }
  return first + n == b.n ? multiply(n - 1, 1, logits_) : Status();
}

int64_t Prefill::row_bytes(const ModelSpec& spec) {
  return kRowsAtOnce * spec.n_vocab * static_cast<int64_t>(sizeof(float));
}

int64_t Prefill::chunk_tokens() const { return hooks_.blocks != nullptr ? kDeviceChunk : kChunk; }

/// Tokens [from, to) of the cache, as far as a query at `to` or later sees them, into tiles: whole ones are
/// packed; what is left waits for the next chunk.
void Prefill::pack_past(int64_t from, int64_t to) {
  LayerBuffers& b = *buffers_;
  const int64_t width = attention().width_kv(), window = attention().window;
  if (window > 0) from = std::max(from, to + 1 - window);
  for (int64_t at = from / kPrefillTile * kPrefillTile; at < to; at += kPrefillTile) {
    const int64_t n = std::min(kPrefillTile, to - at);
    if (n < kPrefillTile)
      return hooks_.read_past(b.layer, at, n, b.k_rotated.data(),
                              b.v.data() + (at - b.n_past + b.tail) * width);
    hooks_.read_past(b.layer, at, n, b.k_rotated.data(), b.past_v.data());
    for (int64_t h = 0; h < attention().n_head_kv; ++h)
      b.attention->pack(h, at / kPrefillTile, b.k_rotated.data(), b.past_v.data(), n);
  }
}

Status Prefill::no_room() const {
  const int64_t bytes =
      bytes_needed(weights_.spec(), plan_, buffers_->n, buffers_->n_past, executor_.n_threads(), options_);
  return {StatusCode::out_of_memory,
          fmt::format("a prompt of {} tokens needs {:.1f} GB beside the weights; shorten it", buffers_->n,
                      static_cast<double>(bytes) / 1e9)};
}

Status Prefill::begin(std::span<const Token> tokens, int64_t n_past, PrefillHooks hooks, float* logits) {
  const auto n = static_cast<int64_t>(tokens.size());
  hooks_ = std::move(hooks);
  logits_ = logits;
  Status status;
  if (wants_rows() && hooks_.blocks != nullptr)
    return {StatusCode::internal, "rows of a prompt that is read on a device"};
  if (hooks_.logits) row_logits_ = AlignedArray<float>(kRowsAtOnce * weights_.spec().n_vocab);
  if (recurrent_floats(plan_) > 0 && (!hooks_.begin_rows || !hooks_.run_rows))
    return {StatusCode::internal, "a prompt of recurrent layers without their states"};
  if (hooks_.blocks != nullptr) {
    const bool scratch = hooks_.scratch != nullptr && hooks_.klt == nullptr;
    buffers_ = std::make_unique<LayerBuffers>(n, n_past, scratch ? weights_.spec().most_width_kv() : 0,
                                              scratch && hooks_.queries ? weights_.spec().most_width_q() : 0);
    status = buffers_->rows_ok() ? begin_on_device(tokens) : no_room();
  } else {
    buffers_ = std::make_unique<LayerBuffers>(weights_.spec(), n, n_past, static_cast<bool>(hooks_.queries));
    const int64_t work = recurrent_floats(plan_) * executor_.n_threads();
    if (work > 0) buffers_->recurrent = AlignedArray<float>(work);
    const bool ok =
        buffers_->ok() && (work == 0 || buffers_->recurrent.ok()) && (!hooks_.logits || row_logits_.ok());
    status = ok ? make_attention() : no_room();
    if (status.ok()) status = weights_.embed(tokens, buffers_->hidden.data());
  }
  if (!status.ok()) buffers_.reset();
  return status;
}

double Prefill::progress() const {
  if (done()) return 1.0;
  return (static_cast<double>(buffers_->layer) +
          static_cast<double>(buffers_->next) / static_cast<double>(buffers_->n)) /
         static_cast<double>(plan_.layers.size());
}

/// Tiles for the layer's heads; those of the layer before serve again where they have its sizes.
Status Prefill::make_attention() {
  LayerBuffers& b = *buffers_;
  if (is_recurrent()) return {};
  const AttentionSizes sizes = sizes_of(attention());
  if (b.attention && b.sizes == sizes) return {};
  count_tiles();
  b.attention.reset();
  b.attention.emplace(attention_kind(options_.attention), sizes, b.n_past + b.n, executor_.n_threads(),
                      options_.mass);
  b.sizes = sizes;
  return b.attention->ok() ? Status() : no_room();
}

void Prefill::count_tiles() {
  if (!buffers_->attention) return;
  tiles_seen_ += buffers_->attention->tiles_seen();
  tiles_read_ += buffers_->attention->tiles_read();
}

Status Prefill::open_layer() {
  const LayerPlan& layer = plan_.layers[static_cast<size_t>(buffers_->layer)];
  const bool on_host = hooks_.blocks == nullptr;
  if (on_host) {
    if (Status s = make_attention(); !s.ok()) return s;
  }
  const bool loaded = loads(layer.index);
  if (Status s = executor_.reserve(std::min(buffers_->n, chunk_tokens()), loaded); !s.ok()) return s;
  if (loaded) {
    if (Status s = executor_.load_layer(layer); !s.ok()) return s;
  }
  if (on_host && !is_recurrent()) pack_past(0, buffers_->n_past);
  if (hooks_.klt != nullptr) {
    const Status s =
        hooks_.klt->begin_layer(layer.index, buffers_->n, loaded ? executor_.loaded_output() : nullptr,
                                weights_.spec().n_embd, *executor_.stream());
    if (!s.ok()) return s;
  }
  return hooks_.scratch != nullptr ? send_past(0, buffers_->n_past) : Status();
}

Status Prefill::close_segment() {
  LayerBuffers& b = *buffers_;
  if (hooks_.klt != nullptr) {
    const Status s = hooks_.klt->end_layer();
    return s.ok() ? close_layer() : s;
  }
  const int64_t width = attention().width_kv();
  const bool on_host = hooks_.blocks == nullptr && !is_recurrent(),
             has_rows = on_host || hooks_.scratch != nullptr;
  Status status = hooks_.layer_done(b.layer, has_rows ? b.k_raw.data() + b.segment_begin * width : nullptr,
                                    has_rows ? b.v.data() + (b.tail + b.segment_begin) * width : nullptr,
                                    b.next - b.segment_begin);
  const bool ends = b.next == b.n;
  if (status.ok() && hooks_.seal && (!ends || hooks_.goes_on)) {
    // The segment itself is always read back: what the cache holds of it is rounded at the least.
    const int64_t begin = b.n_past + b.segment_begin;
    int64_t changed_from = begin;
    status = hooks_.seal(b.layer, &changed_from);
    if (status.ok() && !ends && on_host) pack_past(std::min(changed_from, begin), b.n_past + b.next);
    if (status.ok() && !ends && hooks_.scratch != nullptr)
      status = send_past(std::min(changed_from, begin), b.n_past + b.next);
  }
  if (!status.ok()) return {status.code(), fmt::format("layer {}: {}", b.layer, status.message())};
  b.segment_begin = b.next;
  ++b.segment;
  return b.next < b.n ? Status() : close_layer();
}

Status Prefill::close_layer() {
  LayerBuffers& b = *buffers_;
  b.next = b.segment_begin = 0;
  b.segment = 0;
  if (++b.layer == static_cast<int64_t>(plan_.layers.size())) {
    if (hooks_.klt != nullptr) {
      if (Status s = hooks_.klt->finish(); !s.ok()) return s;
    }
    count_tiles();
    buffers_.reset();
    if (!hooks_.goes_on) executor_.shrink();
  }
  return {};
}

Status Prefill::step() {
  LayerBuffers& b = *buffers_;
  if (b.next == 0) {
    if (Status s = open_layer(); !s.ok()) return s;
  }
  const int64_t end = b.segment_end(hooks_);
  const int64_t n = std::min(chunk_tokens() - (b.n_past + b.next) % kPrefillTile, end - b.next);
  if (Status s = run_chunk(b.next, n); !s.ok()) return s;
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
  wait();
  buffers_.reset();
  executor_.shrink();
  if (status.ok() && progress) progress(1.0);
  return status;
}

}  // namespace narrows
