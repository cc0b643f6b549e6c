#include "server/slot.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace narrows::server {

int64_t common_prefix(std::span<const Token> a, std::span<const Token> b) {
  const size_t n = std::min(a.size(), b.size());
  return std::mismatch(a.begin(), a.begin() + static_cast<std::ptrdiff_t>(n), b.begin()).first - a.begin();
}

int64_t Held::usable(std::span<const Token> prompt, const KvProfile& profile) const {
  if (session == nullptr || session->profile().name != profile.name) return 0;
  const int64_t most = Session::segment_end(profile, static_cast<int64_t>(prompt.size()));
  if (most == 0) return 0;
  return session->kept_prefix(std::min(most, common_prefix(tokens, prompt)));
}

TokenLogprob logprob_of(const Tokenizer& tokenizer, Token token, std::span<const float> logits, int n_top) {
  const double top = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float x : logits) sum += std::exp(static_cast<double>(x) - top);
  const double log_sum = top + std::log(sum);
  const auto logprob = [&](int32_t t) {
    return static_cast<double>(logits[static_cast<size_t>(t)]) - log_sum;
  };
  TokenLogprob result{tokenizer.piece(token, true), logprob(token), {}, false};
  if (n_top == 0) return result;
  std::vector<int32_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  const auto n = std::min<std::ptrdiff_t>(n_top, static_cast<std::ptrdiff_t>(ids.size()));
  std::partial_sort(ids.begin(), ids.begin() + n, ids.end(), [&](int32_t a, int32_t b) {
    const float x = logits[static_cast<size_t>(a)], y = logits[static_cast<size_t>(b)];
    return x != y ? x > y : a < b;
  });
  for (std::ptrdiff_t i = 0; i < n; ++i) {
    const int32_t id = ids[static_cast<size_t>(i)];
    result.top.push_back({tokenizer.piece(id, true), logprob(id)});
  }
  return result;
}

Writer::Writer(const Tokenizer& tokenizer, const Job& job)
    : tokenizer_(tokenizer), job_(job), n_logprobs_(job.request.logprobs), stops_(job.request.stops) {}

/// Control tokens are no text, but for those that tell thinking and calls apart.
bool Writer::is_shown(Token token) const {
  if (job_.request.show_special) return true;
  return job_.format != nullptr &&
         std::find(job_.format->shown.begin(), job_.format->shown.end(), token) != job_.format->shown.end();
}

void Writer::show(std::string text, Event& event) {
  event.kind = Event::Kind::text;
  n_shown_ += text.size();
  event.text += std::move(text);
  // A token comes with the first of its bytes that is shown; one without bytes with the next that has some.
  size_t n = 0;
  while (n < waiting_.size() && waiting_[n].begin < n_shown_)
    event.logprobs.push_back(std::move(waiting_[n++].logprob));
  waiting_.erase(waiting_.begin(), waiting_.begin() + static_cast<std::ptrdiff_t>(n));
}

bool Writer::add(Token token, std::span<const float> logits, Event& event) {
  const std::string piece = tokenizer_.piece(token, is_shown(token));
  if (n_logprobs_) waiting_.push_back({n_read_, logprob_of(tokenizer_, token, logits, *n_logprobs_)});
  n_read_ += piece.size();
  show(stops_.push(characters_.push(piece)), event);
  return !stops_.stopped();
}

void Writer::flush(Event& event) {
  if (stops_.stopped()) return;
  std::string rest = stops_.push(characters_.flush());
  if (!stops_.stopped()) rest += stops_.flush();
  show(std::move(rest), event);
  if (!stops_.stopped()) {
    for (Waiting& w : waiting_) event.logprobs.push_back(std::move(w.logprob));
    waiting_.clear();
  }
}

}  // namespace narrows::server
