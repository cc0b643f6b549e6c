#include "kv/recurrent/recurrent_layer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#include "base/part.h"
#include "kernels/ops.h"
#include "kv/profiles.h"
#include "kv/step/step_scratch.h"
#include "kv/window/exact_store.h"

namespace narrows {

namespace {

int64_t ring_floats(const kernels::DeltaNetShape& net) { return net.n_conv * net.n_channel(); }

int64_t state_bytes(const kernels::DeltaNetShape& net) {
  return (ring_floats(net) + net.n_head_v * net.head_dim * net.head_dim) * int64_t{sizeof(float)};
}

float softplus(float x) { return x > 20 ? x : std::log1p(std::exp(x)); }

/// Of fewer rows a tile's products with the state are no gain.
constexpr int64_t kFewRows = 4;
/// Tokens that go through a head at once: measured 0.95 microseconds each for heads of 128 (with 64: 1.15,
/// one by one: 2.8).
constexpr int64_t kTileRows = 32;
// RecurrentRows::work_floats() has room for three matrices of a whole tile; four of these take less.
static_assert(4 * kTileRows <= 3 * kernels::kDeltaTile);

}  // namespace

RecurrentLayer::RecurrentLayer(const kernels::DeltaNetShape& net, const kernels::RopeTable* rope,
                               int64_t n_sink, bool segmented)
    : KvLayer({}, rope),
      net_(net),
      n_sink_(n_sink),
      segmented_(segmented),
      state_(state_bytes(net)),
      marks_(state_bytes(net), segmented) {}

int64_t RecurrentLayer::bytes_for(const kernels::DeltaNetShape& net, int64_t n) {
  if (n == 0) return 0;
  return state_bytes(net) * (1 + std::min(RecurrentMarks::kMost, n / kSegmentTokens));
}

bool RecurrentLayer::is_place(int64_t n) const {
  return n >= n_sink_ + kSegmentTokens && (n - n_sink_) % kSegmentTokens == 0;
}

int64_t RecurrentLayer::ring_slot(int64_t position) const {
  return ((position + net_.n_conv) % net_.n_conv) * net_.n_channel();
}

float* RecurrentLayer::head_of(float* state, int64_t head) const {
  return state + ring_floats(net_) + head * net_.head_dim * net_.head_dim;
}

/// A state of its own to write to.
Status RecurrentLayer::open_state() {
  const bool fresh = state_.n_page() == 0;
  if (!state_.grow_to(1) || !state_.own(0))
    return {StatusCode::out_of_memory, "no memory for the state of a recurrent layer"};
  if (fresh) std::memset(state_.page(0), 0, static_cast<size_t>(state_.page_bytes()));
  return {};
}

// --- prompts

Status RecurrentLayer::begin_rows(int64_t n) {
  if (in_step_) return {StatusCode::internal, "a prompt in the middle of a step"};
  base_ = n_tokens_ + n_coming_;
  try {
    if (begins_) marks_.begin_prompt();
    begins_ = false;
    if (Status s = open_state(); !s.ok()) return s;
    stops_.clear();
    std::vector<int64_t> places;
    for (int64_t p = base_ + 1; !segmented_ && p <= base_ + n; ++p) {
      if (is_place(p)) places.push_back(p);
    }
    // As many as stay.
    for (size_t i = places.size() > 2 ? places.size() - 2 : 0; i < places.size(); ++i) {
      PageStore& mark = marks_.add(places[i], RecurrentMarks::Kind::prompt, nullptr);
      stops_.push_back({places[i] - base_, reinterpret_cast<float*>(mark.page(0))});
    }
  } catch (const std::bad_alloc&) {
    n_coming_ += n;  // marks may be without a state
    marks_.clear();
    return {StatusCode::out_of_memory, "no memory for snapshots of a recurrent layer"};
  }
  n_coming_ += n;
  return {};
}

/// Channels [channel, channel + head_dim) of rows [first, first + n), convolved. part: 0, 1 or 2.
void RecurrentLayer::convolve(const RecurrentRows& rows, int64_t base, int64_t first, int64_t n, int64_t part,
                              int64_t channel, float* to, const Work& work) {
  const int64_t dim = net_.head_dim;
  float* const before = work.before + part * dim;
  for (int64_t j = 0; j < net_.n_conv - 1; ++j) {
    const int64_t row = first - (net_.n_conv - 1) + j;
    const float* from = row >= 0 ? rows.x + row * rows.ld : state() + ring_slot(base + row);
    std::copy_n(from + channel, dim, before + 3 * j * dim);
  }
  kernels::ops().conv_silu(rows.x + first * rows.ld + channel, rows.ld, before, 3 * dim,
                           rows.net->conv + channel, net_.n_channel(), net_.n_conv, n, dim, to, dim);
}

/// A key head's q and k are made once for all of its value heads.
void RecurrentLayer::run_heads(const RecurrentRows& rows, int64_t base, int64_t key, const Work& work) {
  const kernels::Ops& op = kernels::ops();
  const int64_t dim = net_.head_dim;
  const float scale = 1 / std::sqrt(static_cast<float>(dim));
  auto stop = stops_.begin();
  for (int64_t first = 0; first < rows.n;) {
    int64_t end = std::min(first + kTileRows, rows.n);
    if (stop != stops_.end()) end = std::min(end, stop->row);
    const int64_t n = end - first;
    float *const k = work.kq, *const q = work.kq + n * dim;
    convolve(rows, base, first, n, 0, key * dim, q, work);
    convolve(rows, base, first, n, 1, net_.width_k() + key * dim, k, work);
    for (int64_t t = 0; t < n; ++t) {
      op.l2_norm(k + t * dim, dim, rows.net->eps, 1, k + t * dim);
      op.l2_norm(q + t * dim, dim, rows.net->eps, scale, q + t * dim);
    }
    const bool stops = stop != stops_.end() && stop->row == end;
    for (int64_t head = 0; head < net_.n_head_v; ++head) {
      if (net_.key_head(head) != key) continue;
      convolve(rows, base, first, n, 2, 2 * net_.width_k() + head * dim, work.v, work);
      run_head(rows, first, n, head, work);
      if (stops) std::copy_n(head_of(state(), head), dim * dim, head_of(stop->state, head));
    }
    if (stops) ++stop;
    first = end;
  }
}

/// Rows [first, first + n), whose k, q and v are made, through a value head.
void RecurrentLayer::run_head(const RecurrentRows& rows, int64_t first, int64_t n, int64_t head,
                              const Work& work) {
  const kernels::Ops& op = kernels::ops();
  const kernels::DeltaNet& net = *rows.net;
  const int64_t dim = net_.head_dim;
  const auto gate_of = [&](int64_t t) {
    return rows.x + (first + t) * rows.ld + net_.at_gate() + head * dim;
  };
  for (int64_t t = 0; t < n; ++t) {
    // Gates are needed last: by then they have come from wherever they are.
    for (int64_t i = 0; i < dim; i += 16) __builtin_prefetch(gate_of(t) + i);
    const float* x = rows.x + (first + t) * rows.ld;
    work.beta[t] = 1 / (1 + std::exp(-x[net_.at_beta() + head]));
    work.log_decay[t] = net.rate[head] * softplus(x[net_.at_step() + head] + net.step_bias[head]);
  }
  float* const s = head_of(state(), head);
  // Here and not in rows.out, whose rows may lie a power of two apart: in few sets of a cache.
  float* const out = work.out;
  if (n < kFewRows || work.rule == nullptr) {
    for (int64_t t = 0; t < n; ++t) {
      op.delta_step(work.kq + (n + t) * dim, work.kq + t * dim, work.v + t * dim, std::exp(work.log_decay[t]),
                    work.beta[t], dim, s, out + t * dim);
    }
  } else {
    op.delta_rows(work.kq, work.v, work.log_decay, work.beta, n, dim, s, out, dim, work.rule);
  }
  for (int64_t t = 0; t < n; ++t) {
    float* y = out + t * dim;
    op.rms_norm(y, net.norm, dim, net.eps, y);
    op.swiglu(gate_of(t), y, dim, rows.out + (first + t) * rows.ldo + head * dim);
  }
}

/// Channels [begin, end) of the rows that the next tokens see, into the state and into snapshots.
void RecurrentLayer::run_ring(const RecurrentRows& rows, int64_t begin, int64_t end) {
  const auto put = [&](float* ring, int64_t n) {
    for (int64_t r = std::max<int64_t>(0, n - net_.n_conv); r < n; ++r)
      std::copy(rows.x + r * rows.ld + begin, rows.x + r * rows.ld + end,
                ring + ring_slot(base_ + r) + begin);
  };
  for (const Stop& stop : stops_) {
    for (int64_t slot = 0; slot < net_.n_conv; ++slot) {
      const int64_t at = slot * net_.n_channel();
      std::copy(state() + at + begin, state() + at + end, stop.state + at + begin);
    }
    put(stop.state, stop.row);
  }
  put(state(), rows.n);
}

void RecurrentLayer::run_rows(int phase, const RecurrentRows& rows, int ith, int n_threads) {
  if (phase == 1) {
    const Part mine = part_of(net_.n_channel(), ith, n_threads);
    return run_ring(rows, mine.begin, mine.end);
  }
  const int64_t dim = net_.head_dim, tile = kTileRows;
  Work work{};
  work.before = rows.work + ith * RecurrentRows::work_floats(net_);
  work.kq = work.before + 3 * net_.n_conv * dim;
  work.v = work.kq + 2 * tile * dim;
  work.out = work.v + tile * dim;
  work.log_decay = work.out + tile * dim;
  work.beta = work.log_decay + tile;
  work.rule = work.beta + tile;
  const Part mine = part_of(net_.n_head_k, ith, n_threads);
  for (int64_t key = mine.begin; key < mine.end; ++key) run_heads(rows, base_, key, work);
}

Status RecurrentLayer::append(const float* k, const float* /*v*/, int64_t n) {
  if (k != nullptr || n != n_coming_)
    return {StatusCode::internal, "other tokens than a recurrent layer has read"};
  n_tokens_ += n_coming_;
  n_coming_ = 0;
  stops_.clear();
  return {};
}

Status RecurrentLayer::seal(int64_t* changed_from) {
  *changed_from = n_tokens_;
  if (marks_.last() >= n_tokens_ || state_.n_page() == 0) return {};
  try {
    marks_.add(n_tokens_, RecurrentMarks::Kind::prompt, &state_);
    return {};
  } catch (const std::bad_alloc&) {
    return {StatusCode::out_of_memory, "no memory for a snapshot of a recurrent layer"};
  }
}

// --- steps

Status RecurrentLayer::make_room(bool /*may_convert*/) {
  try {
    if (!segmented_ && is_place(n_tokens_) && is_clean() && marks_.last() < n_tokens_)
      marks_.add(n_tokens_, RecurrentMarks::Kind::step, &state_);
  } catch (const std::bad_alloc&) {
    return {StatusCode::out_of_memory, "no memory for a snapshot of a recurrent layer"};
  }
  return open_state();
}

Status RecurrentLayer::begin_step(StepScratch& scratch) {
  if (!scratch.ok()) return {StatusCode::out_of_memory, "no memory for what a step works in"};
  return make_room(false);
}

void RecurrentLayer::run_phase(int /*phase*/, const DecodeStep& step, StepScratch& scratch, int ith,
                               int n_threads) {
  scratch.thread(ith).clock.enter(AttentionStage::attend);
  const RecurrentRows rows{step.delta_net, step.q, 0, step.out, 0, 1, nullptr};
  float before[3 * kernels::kMostConv * kernels::kMaxDeltaDim], kq[2 * kernels::kMaxDeltaDim],
      v[kernels::kMaxDeltaDim], out[kernels::kMaxDeltaDim], log_decay = 0, beta = 0;
  const Work work{before, kq, v, out, &log_decay, &beta, nullptr};
  const Part mine = part_of(net_.n_head_k, ith, n_threads);
  for (int64_t key = mine.begin; key < mine.end; ++key) run_heads(rows, n_tokens_, key, work);
  if (ith != 0) return;
  // The others read the tokens before it alone.
  in_step_ = true;
  std::copy_n(step.q, net_.n_channel(), state() + ring_slot(n_tokens_));
}

void RecurrentLayer::count_step() {
  ++n_tokens_;
  in_step_ = false;
  begins_ = true;
}

// --- prefixes

bool RecurrentLayer::can_keep(int64_t n) const {
  return n == 0 || (n == n_tokens_ && is_clean()) || marks_.at(n) != nullptr;
}

void RecurrentLayer::keep(int64_t n) {
  if (n == 0) return clear();
  begins_ = true;
  if (n == n_tokens_ && is_clean()) return;
  state_.share(marks_.at(n)->state, 1);
  marks_.keep(n);
  n_tokens_ = n;
  n_coming_ = 0;
  in_step_ = false;
}

Status RecurrentLayer::share(const KvLayer& other, int64_t n) {
  const auto& from = static_cast<const RecurrentLayer&>(other);
  clear();
  if (n == 0) return {};
  try {
    const RecurrentMarks::Mark* mark = from.marks_.at(n);
    state_.share(mark != nullptr ? mark->state : from.state_, 1);
    marks_.share(from.marks_, n);
    n_tokens_ = n;
    return {};
  } catch (const std::bad_alloc&) {
    clear();
    return {StatusCode::out_of_memory, "no memory for a shared beginning"};
  }
}

void RecurrentLayer::save(SnapshotWriter& out) const {
  out.number(n_tokens_);
  out.number(state_.n_page());
  state_.save(out);
  marks_.save(out);
}

Status RecurrentLayer::load(SnapshotReader& in) {
  clear();
  try {
    n_tokens_ = in.count(0, int64_t{1} << 40);
    const int64_t n_page = in.count(n_tokens_ > 0 ? 1 : 0, 1);
    if (in.ok() && state_.load(in, n_page) && marks_.load(in, n_tokens_)) return {};
  } catch (const std::bad_alloc&) {
  }
  const Status status = in.ok() ? Status(StatusCode::out_of_memory, "no memory for the saved key/value cache")
                                : not_a_layer(in);
  clear();
  return status;
}

void RecurrentLayer::clear() {
  state_.clear();
  marks_.clear();
  stops_.clear();
  n_tokens_ = n_coming_ = 0;
  in_step_ = false;
  begins_ = true;
}

const KvFamily recurrent_family = {
    .kind = KvKind::f16,
    .unit = 0,
    .tokens_for_codec = nullptr,
    .make = [](const KvOrder& order) -> Result<std::unique_ptr<KvLayer>> {
      return std::unique_ptr<KvLayer>(std::make_unique<RecurrentLayer>(
          order.spec.delta_net, order.spec.rope, order.plan.n_sink, order.plan.segmented));
    },
    .bytes = [](const KvProfile&, const KvLayerSpec& layer,
                const KvCounts& counts) { return RecurrentLayer::bytes_for(layer.delta_net, counts.n); },
};

}  // namespace narrows
