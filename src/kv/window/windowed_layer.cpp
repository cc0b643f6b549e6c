// Moves tokens window -> pages and keeps every failure without effect: all that can fail is done first, in
// room that nobody reads yet (new pages, unused slots), and only then the counts change.
#include "kv/window/windowed_layer.h"

#include <new>

#include "kv/step/step_scratch.h"

namespace narrows {

Status WindowedLayer::append(const float* k, const float* v, int64_t n) {
  if (n <= 0) return {};
  if (Status s = check_tokens(shape(), rope(), n_tokens(), k, v, n); !s.ok()) {
    retract(n_tokens());
    return s;
  }
  return append_checked({k, v, n});
}

WindowedLayer::Rows WindowedLayer::rows_of(const Incoming& incoming, int64_t first, int64_t n) const {
  const int64_t width = shape().width();
  if (incoming.rows == nullptr) return {incoming.k + first * width, incoming.v + first * width};
  Rows rows;
  rows.own_k.resize(static_cast<size_t>(n * width));
  rows.own_v.resize(rows.own_k.size());
  if (n > 0) incoming.rows->read(first, n, rows.own_k.data(), rows.own_v.data());
  rows.k = rows.own_k.data();
  rows.v = rows.own_v.data();
  return rows;
}

Status WindowedLayer::append_checked(const Incoming& incoming) {
  const bool had_codec = has_codec();
  const int64_t n_sink_before = sinks_.size();
  const int64_t n_window_before = window_.size();
  sinks_.expect_nothing();
  window_.expect_nothing();
  Status status;
  try {
    status = append_unguarded(incoming);
  } catch (const std::bad_alloc&) {
    status = no_memory_for_tokens(n_tokens() + incoming.n);
  }
  if (!status.ok()) {
    sinks_.truncate(n_sink_before);  // gives reserved blocks back
    window_.truncate(n_window_before);
    pages_.shrink_to(n_page());
    retract(n_tokens());
    if (!had_codec) drop_codec();
  }
  return status;
}

Status WindowedLayer::append_unguarded(const Incoming& incoming) {
  const int64_t n_held = n_tokens();
  const int64_t n_after = n_held + incoming.n;
  const bool encodes = !plan_.segmented || n_in_pages_ > 0;
  if (encodes) {
    if (Status s = make_codec(incoming); !s.ok()) return s;
  }
  const int64_t target =
      encodes && has_codec() ? std::max(n_in_pages_, plan_.in_pages(n_after)) : n_in_pages_;

  // Of the new tokens, [0, n_to_sinks) go to the sinks, those between straight into pages, the rest to the
  // window.
  const int64_t n_to_sinks = std::clamp<int64_t>(plan_.n_sink - n_held, 0, incoming.n);
  const int64_t window_begin = std::min(n_after, std::max(n_held + n_to_sinks, plan_.n_sink + target));
  const int64_t n_to_window = n_after - window_begin;
  Kept kept;
  if (Status s = encode_up_to(target, incoming, kept); !s.ok()) return s;
  // Old blocks leave only when nothing can fail any more, so the new ones are made beside them.
  const int64_t n_leaving = std::min(window_.size(), target - n_in_pages_);
  const int64_t n_block_leaving = ceil_div(n_leaving, kWindowBlock);
  const int64_t n_window_after = window_.size() - n_leaving + n_to_window;
  if (!sinks_.reserve(n_to_sinks + static_cast<int64_t>(to_keep_.size())) ||
      !window_.reserve_blocks(n_block_leaving + ceil_div(n_window_after, kWindowBlock))) {
    return no_memory_for_tokens(n_after);
  }
  const Rows to_sinks = rows_of(incoming, 0, n_to_sinks),
             to_window = rows_of(incoming, window_begin - n_held, n_to_window);
  if (incoming.rows != nullptr) {
    if (Status s = incoming.rows->status(); !s.ok()) return s;
  }
  window_.pop_blocks(n_block_leaving);
  sinks_.push(n_held, to_sinks.k, to_sinks.v, n_to_sinks);
  commit_pages(target, kept);
  window_.push(window_begin, to_window.k, to_window.v, n_to_window);
  return {};
}

Status WindowedLayer::encode_up_to(int64_t target, const Incoming& incoming, Kept& kept) {
  to_keep_.clear();
  if (target == n_in_pages_) return {};
  const bool begun = n_in_pages_ % kPageTokens != 0;  // a page that others may share
  if (!pages_.grow_to(ceil_div(target, kPageTokens)) || (begun && !pages_.own(n_in_pages_ / kPageTokens)))
    return no_memory_for_tokens(n_tokens() + incoming.n);
  if (Status s = encode(n_in_pages_, target, incoming); !s.ok()) return s;
  const int64_t width = shape().width();
  kept.k.resize(to_keep_.size() * static_cast<size_t>(width));
  kept.v.resize(kept.k.size());
  for (size_t i = 0; i < to_keep_.size(); ++i) {
    const size_t row = i * static_cast<size_t>(width);
    gather(to_keep_[i], 1, incoming, KeyForm::plain, kept.k.data() + row, kept.v.data() + row);
  }
  return {};
}

void WindowedLayer::commit_pages(int64_t target, const Kept& kept) {
  const int64_t width = shape().width();
  for (size_t i = 0; i < to_keep_.size(); ++i) {
    const size_t row = i * static_cast<size_t>(width);
    sinks_.push(plan_.n_sink + to_keep_[i], kept.k.data() + row, kept.v.data() + row, 1);
  }
  n_kept_ += static_cast<int64_t>(to_keep_.size());
  n_in_pages_ = target;
  to_keep_.clear();
  settle(plan_.n_sink + n_in_pages_);
}

bool WindowedLayer::encodes_next(bool may_convert) const {
  const bool encodes = (has_codec() || may_convert) &&
                       (!plan_.segmented || n_in_pages_ > 0 || n_tokens() >= plan_.n_exact_step);
  return encodes && (has_codec() ? plan_.in_pages(n_tokens() + 1) > n_in_pages_ : can_make_codec());
}

Status WindowedLayer::make_room(bool may_convert) {
  if (!step_is_finite_) return non_finite_token(n_tokens() - 1);
  const bool had_codec = has_codec();
  Status status;
  try {
    const bool encodes = (had_codec || may_convert) &&
                         (!plan_.segmented || n_in_pages_ > 0 || n_tokens() >= plan_.n_exact_step);
    if (encodes) status = make_codec({});
    if (status.ok() && encodes && has_codec()) {
      const int64_t target = std::max(n_in_pages_, plan_.in_pages(n_tokens() + 1));
      Kept kept;
      status = encode_up_to(target, {}, kept);
      if (status.ok() && !sinks_.reserve(static_cast<int64_t>(to_keep_.size())))
        status = no_memory_for_tokens(n_tokens() + 1);
      if (status.ok()) {
        // Only whole units of held tokens leave in a step.
        window_.pop_blocks((target - n_in_pages_) / kWindowBlock);
        commit_pages(target, kept);
      }
    }
  } catch (const std::bad_alloc&) {
    status = no_memory_for_tokens(n_tokens() + 1);
  }
  if (status.ok()) {
    const bool to_sinks = sinks_.size() < plan_.n_sink;
    ExactStore& goes_to = to_sinks ? sinks_ : window_;
    if (goes_to.expect_step()) return {};
    status = no_memory_for_tokens(n_tokens() + 1);
  }
  sinks_.truncate(sinks_.size());
  pages_.shrink_to(n_page());
  if (!had_codec && n_in_pages_ == 0) drop_codec();
  return status;
}

Status WindowedLayer::make_room_in_turn(StepScratch& scratch) {
  const bool had_codec = has_codec();
  Status status = make_room(scratch.may_convert);
  if (!had_codec && has_codec()) scratch.may_convert = false;
  return status;
}

Status WindowedLayer::seal(int64_t* changed_from) {
  *changed_from = n_tokens();
  if (!plan_.segmented || n_tokens() < plan_.n_exact) return {};
  const bool had_codec = has_codec();
  const int64_t before = n_in_pages_;
  Status status;
  try {
    status = seal_unguarded();
  } catch (const std::bad_alloc&) {
    status = no_memory_for_tokens(n_tokens());
  }
  if (status.ok()) {
    *changed_from = std::min(*changed_from, plan_.n_sink + before);
  } else {
    sinks_.truncate(sinks_.size());  // gives reserved blocks back
    pages_.shrink_to(n_page());
    if (!had_codec) drop_codec();
  }
  return status;
}

Status WindowedLayer::seal_unguarded() {
  if (Status s = make_codec({}); !s.ok()) return s;
  if (!has_codec()) return {};
  const int64_t target = std::max(n_in_pages_, (n_tokens() - plan_.n_sink) / plan_.unit * plan_.unit);
  Kept kept;
  if (Status s = encode_up_to(target, {}, kept); !s.ok()) return s;
  if (!sinks_.reserve(static_cast<int64_t>(to_keep_.size()))) return no_memory_for_tokens(n_tokens());
  window_.pop_blocks((target - n_in_pages_) / kWindowBlock);
  commit_pages(target, kept);
  return {};
}

bool WindowedLayer::can_keep(int64_t n) const {
  if (n < 0 || n > n_tokens()) return false;
  if (n_in_pages_ == 0 || n >= plan_.n_sink + n_in_pages_) return true;
  // Within pages, at the end of a unit; a segmented cache that has encoded can't go back to when it had not.
  return n >= std::max(plan_.n_sink, plan_.segmented ? plan_.n_exact : 0) &&
         (n - plan_.n_sink) % plan_.unit == 0;
}

void WindowedLayer::keep(int64_t n) {
  sinks_.expect_nothing();
  window_.expect_nothing();
  window_.truncate(std::max<int64_t>(0, n - plan_.n_sink - n_in_pages_));
  n_in_pages_ = std::clamp<int64_t>(n - plan_.n_sink, 0, n_in_pages_);
  n_kept_ = count_kept(n_page());
  sinks_.truncate(std::min(n, plan_.n_sink) + n_kept_);
  pages_.shrink_to(n_page());
  step_is_finite_ = true;
  retract(n);
  forget_from(n);
}

Status WindowedLayer::share(const KvLayer& other, int64_t n) {
  const auto& from = static_cast<const WindowedLayer&>(other);
  try {
    clear();
    const int64_t in_pages = std::clamp<int64_t>(n - plan_.n_sink, 0, from.n_in_pages_);
    share_codec(from, n);
    const int64_t kept = from.count_kept(ceil_div(in_pages, kPageTokens));
    sinks_.share(from.sinks_, std::min(n, plan_.n_sink) + kept);
    pages_.share(from.pages_, ceil_div(in_pages, kPageTokens));
    window_.share(from.window_, std::max<int64_t>(0, n - plan_.n_sink - in_pages));
    n_in_pages_ = in_pages;
    n_kept_ = kept;
    return {};
  } catch (const std::bad_alloc&) {
    clear();
    return no_memory_for_tokens(n);
  }
}

void WindowedLayer::save(SnapshotWriter& out) const {
  save_codec(out);
  out.number(n_in_pages_);
  out.number(n_kept_);
  sinks_.save(out);
  window_.save(out);
  pages_.save(out);
}

Status WindowedLayer::load(SnapshotReader& in) {
  clear();
  try {
    load_codec(in);
    const int64_t in_pages = in.count(0, rope().n_ctx());
    const int64_t kept = in.count(0, in_pages);
    const bool good = in_pages % plan_.unit == 0 && (in_pages == 0 || has_codec());
    if (!good) in.fail();
    const bool exact = in.ok() && sinks_.load(in, plan_.n_sink + kept) && window_.load(in, rope().n_ctx());
    // Tokens fill the sinks before anything else.
    const int64_t n_sink = sinks_.size() - kept;
    if (exact && (n_sink < 0 || (n_sink < plan_.n_sink && in_pages + window_.size() > 0))) in.fail();
    if (exact && n_sink + in_pages + window_.size() > rope().n_ctx()) in.fail();
    if (exact && in.ok() && pages_.load(in, ceil_div(in_pages, kPageTokens))) {
      n_in_pages_ = in_pages;
      n_kept_ = kept;
      if (count_kept(n_page()) == kept) {
        retract(n_tokens());  // whatever the bytes say, the next query is that of the next token
        return {};
      }
      in.fail();
    }
  } catch (const std::bad_alloc&) {
    clear();
    return {StatusCode::out_of_memory, "no memory for the saved key/value cache"};
  }
  const Status status = not_a_layer(in);
  clear();
  return status;
}

void WindowedLayer::store_step(const float* k, const float* v) {
  ExactStore& goes_to = sinks_.size() < plan_.n_sink ? sinks_ : window_;
  step_is_finite_ = goes_to.store_step(n_tokens(), k, v);
}

void WindowedLayer::count_step() {
  sinks_.count_step();
  window_.count_step();
}

void WindowedLayer::gather(int64_t first, int64_t n, const Incoming& incoming, KeyForm form, float* k,
                           float* v) const {
  const int64_t width = shape().width();
  const int64_t pos = plan_.n_sink + first;
  const int64_t n_held = std::clamp<int64_t>(n_tokens() - pos, 0, n);
  if (n_held > 0) {
    window_.read(first - n_in_pages_, n_held, k, v);
    if (form == KeyForm::plain) rotate_keys(shape(), rope(), pos, n_held, /*inverse=*/true, k, k);
  }
  const int64_t n_new = n - n_held;
  if (n_new == 0) return;
  const Rows come = rows_of(incoming, pos + n_held - n_tokens(), n_new);
  std::copy(come.v, come.v + n_new * width, v + n_held * width);
  if (form == KeyForm::plain) {
    std::copy(come.k, come.k + n_new * width, k + n_held * width);
  } else {
    rotate_keys(shape(), rope(), pos + n_held, n_new, /*inverse=*/false, come.k, k + n_held * width);
  }
}

void WindowedLayer::read(int64_t first, int64_t n, float* k, float* v) const {
  const int64_t width = shape().width();
  const int64_t n_sink_held = sinks_.size() - n_kept_;
  const int64_t ends[] = {n_sink_held, n_sink_held + n_in_pages_, n_tokens()};
  int64_t begin = 0;
  for (int part = 0; part < 3; ++part) {
    const int64_t from = std::max(first, begin);
    const int64_t count = std::min(first + n, ends[part]) - from;
    if (count > 0) {
      float* to_k = k + (from - first) * width;
      float* to_v = v + (from - first) * width;
      if (part == 0) sinks_.read(from, count, to_k, to_v);
      if (part == 1) decode(from - begin, count, to_k, to_v);
      if (part == 2) window_.read(from - begin, count, to_k, to_v);
    }
    begin = ends[part];
  }
}

LayerBytes WindowedLayer::bytes() const {
  const int64_t kept =
      sinks_.bytes() - ceil_div(sinks_.size() - n_kept_, kWindowBlock) * sinks_.layout().bytes();
  const int64_t in_pages = n_kept_ > 0 ? kept : 0;
  return {.pages = pages_.bytes() + in_pages,
          .exact = sinks_.bytes() - in_pages + window_.bytes(),
          .basis = codec_bytes(),
          .hot = hot_bytes(),
          .n_tokens_in_pages = n_in_pages_};
}

void WindowedLayer::clear() {
  sinks_.clear();
  window_.clear();
  pages_.clear();
  n_in_pages_ = 0;
  n_kept_ = 0;
  step_is_finite_ = true;
  retract(0);
  drop_codec();
}

}  // namespace narrows
