// Which choice gets which slot: the cache that can give most of the prompt, a slot whose own cache is missed
// least, and memory for what the choice may come to.
#include <fmt/format.h>

#include <algorithm>

#include "base/guarded.h"
#include "server/scheduler.h"

namespace narrows::server {

namespace {

/// Tokens of an answer that memory is set aside for where the request names no limit.
constexpr int64_t kExpectedAnswer = 1024;

double megabytes(int64_t bytes) { return static_cast<double>(bytes) / 1e6; }

}  // namespace

int64_t Scheduler::bytes_needed(const Job& job, int choice) const {
  const auto n_prompt = static_cast<int64_t>(job.prompt_of(choice).size());
  const int64_t n_answer = job.request.max_tokens.value_or(kExpectedAnswer);
  return cache_bytes_estimate(*model_, job.profile, std::min(n_ctx_, n_prompt + n_answer),
                              /*segments=*/true);
}

std::optional<ApiError> Scheduler::refusal(const Job& job) const {
  for (int c = 0; c < job.n_choice(); c += job.request.n) {
    const auto n = static_cast<int64_t>(job.prompt_of(c).size());
    if (n == 0)
      return bad_request("the prompt has no tokens; give some text",
                         job.request.chat ? "messages" : "prompt");
    if (n > n_ctx_) return context_exceeded(n, n_ctx_);
    const int64_t need = bytes_needed(job, c);
    if (need > memory_limit_) {
      return to_api_error({StatusCode::out_of_memory,
                           fmt::format("{} tokens and {} of an answer need {:.0f} MB of cache with {} and "
                                       "the server may use {:.0f} MB; "
                                       "shorten the prompt, lower max_tokens or choose a smaller profile",
                                       n, job.request.max_tokens.value_or(kExpectedAnswer), megabytes(need),
                                       job.profile.name, megabytes(memory_limit_))});
    }
  }
  return std::nullopt;
}

Result<std::unique_ptr<Session>> Scheduler::fresh_session(const KvProfile& profile) {
  SessionOptions options = options_.session;
  options.kv = profile;
  if (!profile.takes_basis()) options.basis_path.clear();
  return Session::create(model_, options);
}

/// True if what busy slots may come to, all else that is held, and `bytes` more stay within the limit; lets
/// kept prefixes and then caches of idle slots go for it.
bool Scheduler::make_room(int64_t bytes) {
  const auto used = [this] {
    int64_t n = store_.bytes();
    for (const Slot& slot : slots_) {
      const int64_t held = slot.held.session != nullptr ? slot.held.session->cache_stats().bytes : 0;
      n += slot.state != SlotState::idle ? std::max(held, slot.reserved_bytes) : held;
    }
    return n;
  };
  const int64_t over = used() + bytes - memory_limit_;
  if (over <= 0) return true;
  if (store_.evict(over) >= over) return true;
  std::vector<Slot*> idle;
  for (Slot& slot : slots_) {
    if (slot.state == SlotState::idle && slot.held.session != nullptr) idle.push_back(&slot);
  }
  std::sort(idle.begin(), idle.end(),
            [](const Slot* a, const Slot* b) { return a->last_used < b->last_used; });
  for (Slot* slot : idle) {
    if (used() + bytes <= memory_limit_) break;
    slot->held = {};
  }
  return used() + bytes <= memory_limit_;
}

std::optional<ApiError> Scheduler::reserve(int id, int64_t bytes) {
  std::optional<ApiError> error;
  on_engine([&] {
    int64_t at_work = 0;
    for (const Slot& slot : slots_) {
      if (slot.id == id || slot.state == SlotState::idle) continue;
      const int64_t held = slot.held.session != nullptr ? slot.held.session->cache_stats().bytes : 0;
      at_work += std::max(held, slot.reserved_bytes);
    }
    Slot& slot = slots_[static_cast<size_t>(id)];
    const int64_t before = slot.reserved_bytes;
    slot.reserved_bytes = 0;
    if (at_work + bytes <= memory_limit_ && make_room(bytes)) {
      slot.reserved_bytes = bytes;
      return;
    }
    slot.reserved_bytes = before;
    error = to_api_error(
        {StatusCode::out_of_memory,
         fmt::format(
             "the session takes {:.1f} MB and the server may use {:.1f} MB for caches, {:.1f} MB of it "
             "for requests at work; raise --cache-mb, or try again when they are done",
             megabytes(bytes), megabytes(memory_limit_), megabytes(at_work))});
  });
  return error;
}

/// True if a slot is just reading what this choice could share more of than of anything that is there now.
bool Scheduler::will_be_read(const Waiting& w, int64_t n_now) const {
  if (!w.job->request.cache_prompt) return false;
  const std::vector<Token>& prompt = w.job->prompt_of(w.choice);
  const int64_t most = Session::segment_end(w.job->profile, static_cast<int64_t>(prompt.size()));
  return std::any_of(slots_.begin(), slots_.end(), [&](const Slot& slot) {
    if (slot.state != SlotState::reading || slot.job->profile.name != w.job->profile.name) return false;
    const int64_t end = Session::segment_end(slot.job->profile, static_cast<int64_t>(slot.prompt().size()));
    return std::min({most, end, common_prefix(prompt, slot.prompt())}) >= n_now + kSegmentTokens;
  });
}

Scheduler::Placing Scheduler::place(const Waiting& w) {
  const std::vector<Token>& prompt = w.job->prompt_of(w.choice);
  const KvProfile& profile = w.job->profile;
  int64_t n = 0;
  const Held* source = nullptr;
  Slot* source_slot = nullptr;
  if (w.job->request.cache_prompt) {
    source = store_.best(prompt, profile, n);
    for (Slot& slot : slots_) {
      if (slot.state == SlotState::reading || slot.state == SlotState::held) continue;
      const int64_t usable = slot.held.usable(prompt, profile);
      if (usable <= n) continue;
      n = usable;
      source = &slot.held;
      source_slot = &slot;
    }
  }
  if (will_be_read(w, n)) return Placing::later;

  // The slot whose cache is the source, if it loses nothing by going on; else an empty one; else the oldest.
  Slot* target = nullptr;
  for (Slot& slot : slots_) {
    if (slot.state != SlotState::idle) continue;
    if (w.job->request.id_slot >= 0 && w.job->request.id_slot != slot.id) continue;
    const auto rank = [&](const Slot& s) {
      const bool goes_on = &s == source_slot && s.held.session->kept_prefix(s.held.session->n_past()) == n;
      return goes_on ? 2 : s.held.session == nullptr || s.held.session->n_past() == 0 ? 1 : 0;
    };
    const bool better = target == nullptr || rank(slot) > rank(*target) ||
                        (rank(slot) == rank(*target) && slot.last_used < target->last_used);
    if (better) target = &slot;
  }
  if (target == nullptr) return Placing::later;
  target_ = target;
  const int64_t need = bytes_needed(*w.job, w.choice);

  if (target == source_slot && target->held.session->kept_prefix(target->held.session->n_past()) == n) {
    target->held.session->keep_prefix(n);
  } else {
    Held next;
    const bool reusable = target->held.session != nullptr && target->held.session->n_past() == 0 &&
                          target->held.session->profile().name == profile.name;
    if (reusable) {
      next.session = std::move(target->held.session);
    } else {
      Result<std::unique_ptr<Session>> made = fresh_session(profile);
      if (!made.ok()) {
        fail(w, made.status());
        return Placing::placed;
      }
      next.session = std::move(*made);
    }
    if (n > 0 && !next.session->share_prefix(*source->session, n).ok()) n = 0;
    store_.put(std::move(target->held));
    target->held = std::move(next);
  }
  target->held.tokens.assign(prompt.begin(), prompt.begin() + n);
  target->state = SlotState::held;  // so that make_room() lets it be
  const bool fits = make_room(need - target->held.session->cache_stats().bytes);
  target->state = SlotState::idle;
  target->last_used = Clock::now();
  if (!fits) return Placing::no_memory;
  target->reserved_bytes = need;
  if (Status s = begin(*target, w, n); !s.ok()) fail(w, s);
  return Placing::placed;
}

Scheduler::Placing Scheduler::place_or_fail(const Waiting& w) noexcept {
  target_ = nullptr;
  Placing placing = Placing::placed;
  const Status s = guarded("a place for the request", [&] { placing = place(w); });
  if (s.ok()) return placing;
  fail(w, s);
  if (target_ != nullptr) abandon(*target_);
  return Placing::placed;
}

void Scheduler::place_waiting() {
  for (auto it = waiting_.begin(); it != waiting_.end();) {
    const bool free =
        std::any_of(slots_.begin(), slots_.end(), [](const Slot& s) { return s.state == SlotState::idle; });
    if (!free) return;
    const Placing placing = place_or_fail(*it);
    // What waits for another's prompt lets others pass; what waits for memory does not, or it would wait for
    // ever.
    if (placing == Placing::no_memory) return;
    it = placing == Placing::placed ? waiting_.erase(it) : it + 1;
  }
}

}  // namespace narrows::server
