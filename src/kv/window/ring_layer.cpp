#include "kv/window/ring_layer.h"

#include <algorithm>
#include <new>

#include "kv/profiles.h"
#include "kv/step/stages.h"

namespace narrows {

namespace {

/// Tokens held behind the window: a segment that was read is read back, and a few steps can be taken back.
constexpr int64_t kSlack = 512;
static_assert(kSlack >= 2 * kSegmentTokens);
/// Tokens go in units that prompts pack (kernels::kPrefillTile).
constexpr int64_t kUnit = 128;
static_assert(kUnit % kDenseBlock == 0);
/// Of marks closer to each other than this only the last stays.
constexpr int64_t kMarkTokens = 4096;
constexpr uint64_t kMostMarks = 1 << 20;

int64_t whole_units(int64_t n) { return n / kUnit * kUnit; }

}  // namespace

int64_t RingLayer::first_held(int64_t n, int64_t window) {
  return whole_units(std::max<int64_t>(0, n + 1 - window - kSlack));
}

Status RingLayer::append(const float* k, const float* v, int64_t n) {
  if (n <= 0) return {};
  const int64_t before = n_tokens(), after = before + n, from = first_held(after, window_);
  if (Status s = check_tokens(shape(), rope(), before, k, v, n); !s.ok()) return s;
  store_.expect_nothing();
  if (from < before) {
    if (!store_.reserve(n)) return no_memory_for_tokens(after);
    store_.push(before, k, v, n);
    drop_unseen(after);
    return {};
  }
  // Nothing that was there is seen any more.
  ExactStore fresh(shape(), &rope(), kDenseBlock);
  if (!fresh.reserve(after - from)) return no_memory_for_tokens(after);
  const int64_t skip = (from - before) * shape().width();
  fresh.push(from, k + skip, v + skip, after - from);
  store_ = std::move(fresh);
  first_ = from;
  return {};
}

/// Of n tokens; cannot fail.
void RingLayer::drop_unseen(int64_t n) {
  const int64_t from = first_held(n, window_);
  if (from <= first_) return;
  store_.pop_blocks((from - first_) / kDenseBlock);
  first_ = from;
}

Status RingLayer::make_room(bool /*may_convert*/) {
  if (!step_is_finite_) return non_finite_token(n_tokens() - 1);
  drop_unseen(n_tokens());
  if (!store_.expect_step()) return no_memory_for_tokens(n_tokens() + 1);
  return {};
}

void RingLayer::read(int64_t first, int64_t n, float* k, float* v) const {
  const int64_t width = shape().width(), gone = std::clamp<int64_t>(first_ - first, 0, n);
  std::fill_n(k, gone * width, 0.0F);
  std::fill_n(v, gone * width, 0.0F);
  if (gone < n) store_.read(first + gone - first_, n - gone, k + gone * width, v + gone * width);
}

RingLayer::Mark RingLayer::mark_of(int64_t n) const {
  const int64_t first = std::max(first_, whole_units(seen_from(n)));
  Mark mark{n, first, ExactStore(shape(), &rope(), kDenseBlock)};
  mark.store.share(store_, n - first_);
  mark.store.pop_blocks((first - first_) / kDenseBlock);
  return mark;
}

Status RingLayer::seal(int64_t* changed_from) {
  *changed_from = n_tokens();
  try {
    Mark mark = mark_of(n_tokens());
    const int64_t kept = marks_.size() > 1 ? marks_[marks_.size() - 2].n : 0;
    if (!marks_.empty() && (marks_.back().n >= mark.n || mark.n - kept <= kMarkTokens)) marks_.pop_back();
    marks_.push_back(std::move(mark));
    return {};
  } catch (const std::bad_alloc&) {
    return no_memory_for_tokens(n_tokens());
  }
}

const RingLayer::Mark* RingLayer::mark_at(int64_t n) const {
  const auto found = std::find_if(marks_.begin(), marks_.end(), [n](const Mark& m) { return m.n == n; });
  return found != marks_.end() ? &*found : nullptr;
}

bool RingLayer::can_keep(int64_t n) const { return n >= 0 && (holds(n) || mark_at(n) != nullptr); }

void RingLayer::keep(int64_t n) {
  store_.expect_nothing();
  step_is_finite_ = true;
  if (n == 0) return clear();
  if (holds(n)) {
    store_.truncate(n - first_);
  } else {
    Mark& mark = marks_[static_cast<size_t>(mark_at(n) - marks_.data())];
    first_ = mark.first;
    std::swap(store_, mark.store);  // marks from here on go
    marks_.erase(marks_.begin() + (&mark - marks_.data()), marks_.end());
  }
  while (!marks_.empty() && marks_.back().n > n) marks_.pop_back();
}

Status RingLayer::share(const KvLayer& other, int64_t n) {
  const auto& from = static_cast<const RingLayer&>(other);
  try {
    clear();
    if (const Mark* mark = from.mark_at(n); mark != nullptr && !from.holds(n)) {
      store_.share(mark->store, n - mark->first);
      first_ = mark->first;
    } else if (n > 0) {
      store_.share(from.store_, n - from.first_);
      first_ = from.first_;
    }
    for (const Mark& mark : from.marks_) {
      if (mark.n > n) break;
      Mark copy{mark.n, mark.first, ExactStore(shape(), &rope(), kDenseBlock)};
      copy.store.share(mark.store, mark.n - mark.first);
      marks_.push_back(std::move(copy));
    }
    return {};
  } catch (const std::bad_alloc&) {
    clear();
    return no_memory_for_tokens(n);
  }
}

void RingLayer::save(SnapshotWriter& out) const {
  out.number(first_);
  store_.save(out);
  out.number(static_cast<int64_t>(marks_.size()));
  for (const Mark& mark : marks_) {
    out.number(mark.n);
    out.number(mark.first);
    mark.store.save(out);
  }
}

Status RingLayer::load(SnapshotReader& in) {
  clear();
  try {
    const int64_t n_ctx = rope().n_ctx();
    first_ = in.count(0, n_ctx);
    bool good = in.ok() && first_ % kUnit == 0 && store_.load(in, n_ctx - first_);
    good = good && seen_from(n_tokens()) >= first_;
    const auto n_mark = static_cast<uint64_t>(good ? in.count(0, static_cast<int64_t>(kMostMarks)) : 0);
    for (uint64_t i = 0; good && in.ok() && i < n_mark; ++i) {
      Mark mark{in.count(1, n_tokens()), 0, ExactStore(shape(), &rope(), kDenseBlock)};
      mark.first = in.count(0, mark.n);
      good = in.ok() && mark.first % kUnit == 0 && seen_from(mark.n) >= mark.first &&
             mark.store.load(in, mark.n - mark.first) && mark.store.size() == mark.n - mark.first &&
             (marks_.empty() || marks_.back().n < mark.n);
      if (good) marks_.push_back(std::move(mark));
    }
    if (good && in.ok()) return {};
    if (in.ok() && !good) in.fail();
  } catch (const std::bad_alloc&) {
    clear();
    return {StatusCode::out_of_memory, "no memory for the saved key/value cache"};
  }
  const Status status = not_a_layer(in);
  clear();
  return status;
}

LayerBytes RingLayer::bytes() const {
  LayerBytes bytes{.exact = store_.bytes()};
  for (const Mark& mark : marks_) bytes.exact += mark.store.bytes();
  return bytes;
}

void RingLayer::clear() {
  store_.clear();
  marks_.clear();
  first_ = 0;
  step_is_finite_ = true;
}

Status RingLayer::begin_step(StepScratch& scratch) {
  if (!scratch.ok()) return no_memory_for_tokens(n_tokens() + 1);
  return make_room(false);
}

void RingLayer::run_phase(int phase, const DecodeStep& step, StepScratch& scratch, int ith, int n_threads) {
  scratch.thread(ith).clock.enter(AttentionStage::attend);
  if (phase == 0) {
    begin_attention(*this, {&store_, nullptr, seen_from(n_tokens()) - first_}, step, scratch, 0, ith,
                    n_threads);
  } else {
    merge_heads(shape(), scratch, kSlices, part_of(shape().n_head, ith, n_threads), step);
  }
}

int64_t RingLayer::bytes_for(const AttentionShape& shape, int64_t window, int64_t n, bool segmented) {
  int64_t bytes = exact_bytes(n - first_held(n, window), shape, kDenseBlock);
  if (!segmented) return bytes;
  const int64_t n_mark = std::min(ceil_div(n, kMarkTokens), n / kSegmentTokens);
  return bytes + n_mark * exact_bytes(std::min(n, window + kUnit), shape, kDenseBlock);
}

const KvFamily ring_family = {
    .kind = KvKind::f16,
    .unit = 0,
    .tokens_for_codec = nullptr,
    .make = [](const KvOrder& order) -> Result<std::unique_ptr<KvLayer>> {
      return std::unique_ptr<KvLayer>(
          std::make_unique<RingLayer>(order.spec.shape, order.spec.rope, order.spec.window));
    },
    .bytes =
        [](const KvProfile&, const KvLayerSpec& layer, const KvCounts& counts) {
          return RingLayer::bytes_for(layer.shape, layer.window, counts.n, counts.segmented);
        },
};

}  // namespace narrows
