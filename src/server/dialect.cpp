#include "server/dialect.h"

#include <chrono>

namespace narrows::server {

namespace {

/// Of the ids of tool calls: the job's without its kind.
std::string id_of_choice(const Job& job, size_t index) {
  const size_t dash = job.id.find_last_of("-_");
  return (dash == std::string::npos ? job.id : job.id.substr(dash + 1)) +
         (index > 0 ? "_" + std::to_string(index) : "");
}

}  // namespace

Replies::Choice::Choice(const Job& job, size_t index) : answer(job.format, id_of_choice(job, index)) {}

Replies::Replies(const Job& job, ReplyContext context)
    : job_(job),
      context_(std::move(context)),
      created_(std::chrono::duration_cast<std::chrono::seconds>(
                   std::chrono::system_clock::now().time_since_epoch())
                   .count()) {
  for (size_t i = 0; i < static_cast<size_t>(job.n_choice()); ++i) choices_.emplace_back(job, i);
}

AnswerDelta Replies::take(const Event& event) {
  Choice& c = choice_of(event);
  if (event.kind == Event::Kind::text) return c.answer.add(event.text);
  if (event.kind != Event::Kind::finished) return {};
  c.result = event.result;
  return c.answer.finish();
}

void Replies::add(const Event& event) {
  (void)take(event);
  if (event.kind != Event::Kind::text) return;
  Choice& c = choice_of(event);
  c.logprobs.insert(c.logprobs.end(), event.logprobs.begin(), event.logprobs.end());
}

Replies::Usage Replies::usage() const {
  Usage all;
  for (size_t i = 0; i < choices_.size(); ++i) {
    const ChoiceResult& r = choices_[i].result;
    all.generated += r.n_generated;
    if (i % static_cast<size_t>(job_.request.n) != 0) continue;  // further choices of the same prompt
    all.prompt += r.n_prompt;
    all.cached += r.n_cached;
  }
  return all;
}

}  // namespace narrows::server
