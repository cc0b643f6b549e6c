// What a slot does with its turns: from the prompt to the last token of the answer.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/guarded.h"
#include "server/scheduler.h"

namespace narrows::server {

namespace {

constexpr double kProgressEvery_s = 0.1;

Event event_of(Event::Kind kind, int choice) {
  Event event;
  event.kind = kind;
  event.choice = choice;
  return event;
}

std::vector<float> of_length_1(const std::vector<double>& x) {
  const double length = std::sqrt(std::inner_product(x.begin(), x.end(), x.begin(), 0.0));
  std::vector<float> out;
  for (const double v : x) out.push_back(static_cast<float>(length > 0 ? v / length : v));
  return out;
}

}  // namespace

/// What the slot wants of its prompt's tokens, which `waiting` has.
PromptRows Scheduler::rows_wanted(Slot& slot, const Waiting& waiting) const {
  PromptRows rows;
  slot.pooled.clear();
  slot.prompt_logprobs.clear();
  if (waiting.job->embeds) {
    slot.pooled.assign(static_cast<size_t>(model_->info().n_embd), 0);
    const bool adds = *waiting.job->embeds == Pooling::mean;
    rows.hidden = [&sum = slot.pooled, adds](int64_t /*index*/, std::span<const float> hidden) {
      for (size_t i = 0; i < sum.size(); ++i) sum[i] = double{hidden[i]} + (adds ? sum[i] : 0);
    };
  }
  const GenerationRequest& request = waiting.job->request;
  if (request.echo && request.logprobs) {
    const std::vector<Token>& prompt = waiting.job->prompt_of(waiting.choice);
    slot.prompt_logprobs.resize(prompt.size());
    slot.prompt_logprobs[0].piece = model_->tokenizer().piece(prompt[0], true);
    slot.prompt_logprobs[0].is_first = true;
    rows.logits = [this, &all = slot.prompt_logprobs, &prompt, n_top = *request.logprobs](
                      int64_t index, std::span<const float> logits) {
      const auto next = static_cast<size_t>(index) + 1;
      if (next < prompt.size()) all[next] = logprob_of(model_->tokenizer(), prompt[next], logits, n_top);
    };
  }
  return rows;
}

/// The session of the slot holds n_cached tokens of the prompt. A failure leaves the slot idle.
Status Scheduler::begin(Slot& slot, const Waiting& waiting, int64_t n_cached) {
  const GenerationRequest& request = waiting.job->request;
  SamplerOptions sampling = request.sampling;
  // Choices of one prompt differ by their seeds; the last seed of all is libllama's "draw one".
  sampling.seed = static_cast<uint32_t>(
      (uint64_t{sampling.seed} + static_cast<uint64_t>(waiting.choice % request.n)) % 0xFFFFFFFF);
  sampling.grammar = request.grammar;
  Result<std::unique_ptr<Sampler>> sampler = Sampler::create(sampling, &model_->tokenizer());
  if (!sampler.ok()) return sampler.status();
  const std::vector<Token>& prompt = waiting.job->prompt_of(waiting.choice);
  if (Status s = slot.held.session->begin_prefill(std::span(prompt).subspan(static_cast<size_t>(n_cached)),
                                                  rows_wanted(slot, waiting));
      !s.ok())
    return s;

  slot.job = waiting.job;
  slot.choice = waiting.choice;
  slot.sampler = std::move(*sampler);
  slot.writer = std::make_unique<Writer>(model_->tokenizer(), *slot.job);
  slot.result = {};
  slot.result.slot = slot.id;
  slot.result.n_prompt = static_cast<int64_t>(prompt.size());
  slot.result.n_cached = n_cached;
  slot.result.queue_s = seconds_since(waiting.job->arrived);
  slot.result.kv = waiting.job->profile.name;
  slot.begun = slot.last_progress = Clock::now();
  slot.state = SlotState::reading;
  slot.n_put_off = 0;
  metrics_->prompt_tokens += static_cast<uint64_t>(slot.result.n_prompt);
  metrics_->cached_tokens += static_cast<uint64_t>(n_cached);
  return {};
}

void Scheduler::report_progress(Slot& slot) {
  if (!slot.job->request.return_progress || seconds_since(slot.last_progress) < kProgressEvery_s) return;
  slot.last_progress = Clock::now();
  Event event = event_of(Event::Kind::progress, slot.choice);
  event.n_prompt = slot.result.n_prompt;
  event.n_cached = slot.result.n_cached;
  event.done = slot.held.session->prefill_done();
  event.seconds = seconds_since(slot.begun);
  slot.job->channel.push(std::move(event));
}

void Scheduler::prompt_is_read(Slot& slot) {
  slot.last_progress = {};
  report_progress(slot);
  slot.held.tokens = slot.prompt();
  slot.result.prefill_s = seconds_since(slot.begun);
  slot.begun = Clock::now();
  slot.state = SlotState::writing;
  for (const Token token : slot.prompt()) slot.sampler->accept_prompt(token);
  if (!slot.prompt_logprobs.empty()) {
    Event event = event_of(Event::Kind::text, slot.choice);
    event.logprobs = std::move(slot.prompt_logprobs);
    slot.job->channel.push(std::move(event));
  }
  if (slot.job->request.max_tokens == 0) {
    finish(slot, "length");
  } else {
    pass_on(slot, draw(slot, nullptr));
  }
}

/// The next token from the session's logits and its text. Touches nothing but the slot: several slots draw at
/// a time, whose grammars share the steps; null: it needs no others'.
Scheduler::Drawn Scheduler::draw(Slot& slot, std::atomic<int64_t>* grammar_steps) const {
  Drawn drawn;
  const std::span<const float> logits = slot.held.session->logits();
  if (grammar_steps == nullptr) {
    drawn.token = slot.sampler->sample(logits);
  } else {
    const Result<std::optional<Token>> token = slot.sampler->sample(logits, *grammar_steps);
    drawn.later = token.ok() && !token->has_value();
    if (drawn.later) return drawn;
    drawn.token = token.ok() ? Result<Token>(**token) : token.status();
  }
  if (!drawn.token.ok()) return drawn;
  const GenerationRequest& request = slot.job->request;
  const bool may_stop = slot.result.n_generated >= request.sampling.min_tokens;
  drawn.is_end = (model_->tokenizer().is_end(*drawn.token) && !request.ignore_eos) ||
                 (may_stop && std::find(request.stop_tokens.begin(), request.stop_tokens.end(),
                                        *drawn.token) != request.stop_tokens.end());
  if (drawn.is_end) return drawn;
  slot.sampler->accept(*drawn.token);
  drawn.event = event_of(Event::Kind::text, slot.choice);
  drawn.goes_on = slot.writer->add(*drawn.token, logits, drawn.event);
  return drawn;
}

/// What comes of it.
void Scheduler::pass_on(Slot& slot, Drawn drawn) {
  slot.n_put_off = drawn.later ? slot.n_put_off + 1 : 0;
  if (drawn.later) return;
  if (!drawn.token.ok()) {
    fail(slot, drawn.token.status());
    return;
  }
  if (drawn.is_end) {
    finish(slot, "stop");
    return;
  }
  slot.next = *drawn.token;
  ++slot.result.n_generated;
  ++metrics_->generated_tokens;
  if (!drawn.event.text.empty() || !drawn.event.logprobs.empty())
    slot.job->channel.push(std::move(drawn.event));
  if (!drawn.goes_on) {
    finish(slot, "stop");
  } else if (slot.job->request.max_tokens == slot.result.n_generated ||
             slot.held.session->n_past() >= n_ctx_) {
    finish(slot, "length");
  }
}

void Scheduler::finish(Slot& slot, const char* reason) {
  Event rest = event_of(Event::Kind::text, slot.choice);
  slot.writer->flush(rest);
  if (slot.writer->stopped()) reason = "stop";  // a stop string that ended with the last token
  if (!rest.text.empty() || !rest.logprobs.empty()) slot.job->channel.push(std::move(rest));

  Event event = event_of(Event::Kind::finished, slot.choice);
  const Session& session = *slot.held.session;
  slot.result.finish_reason = reason;
  slot.result.stop = slot.writer->stop();
  slot.result.decode_s = seconds_since(slot.begun);
  slot.result.cache = session.cache_stats();
  const KvProfile& kv = session.profile();
  const int64_t n = session.n_past();
  const bool sparse = kv.is_sparse() && slot.result.cache.bytes_pages > 0;
  slot.result.budget = sparse ? kv.budget_at(n) : KvProfile::kBudgetAll;
  slot.result.n_read = sparse && kv.budget != KvProfile::kBudgetAll
                           ? std::min(n, kv.n_sink + kv.budget_at(n) + kv.n_recent)
                           : n;
  if (slot.job->embeds) slot.result.embedding = of_length_1(slot.pooled);
  event.result = slot.result;
  const std::shared_ptr<Job> job = slot.job;
  leave(slot, !job->embeds);  // a text that was embedded is no beginning of anything
  show();                     // before the client knows
  const Status told = guarded("the end", [&] { job->channel.push(std::move(event)); });
  if (!told.ok()) job->channel.break_off();  // the slot is no longer the job's
}

void Scheduler::fail(const Waiting& waiting, const ApiError& error) {
  Event event = event_of(Event::Kind::failed, waiting.choice);
  event.error = error;
  ++metrics_->failed;
  waiting.job->channel.push(std::move(event));
}

void Scheduler::fail(const Waiting& waiting, const Status& status) noexcept {
  // Without memory for the event the reader is told by other means.
  const Status told = guarded("the error", [&] { fail(waiting, to_api_error(status)); });
  if (!told.ok()) waiting.job->channel.break_off();
}

void Scheduler::fail(Slot& slot, const Status& status) noexcept {
  const Waiting failed{slot.job, slot.choice};
  const bool anywhere = status.code() == StatusCode::out_of_memory || status.code() == StatusCode::internal;
  anywhere ? abandon(slot) : leave(slot, true);
  show();  // before the client knows
  fail(failed, status);
}

void Scheduler::abandon(Slot& slot) noexcept {
  slot.held = {};
  slot.state = SlotState::idle;
  leave(slot, true);
}

/// The slot is idle. Its session stays, to be saved or to serve a prompt that begins as this one: whole, or
/// as much of it as is in all layers.
void Scheduler::leave(Slot& slot, bool keeps) noexcept {
  if (!keeps) {
    slot.held.tokens.clear();
    if (!guarded("the slot", [&] { slot.held.session->reset(); }).ok()) slot.held = {};
  } else if (slot.state == SlotState::reading) {
    const Status kept = guarded("the slot", [&] {
      const int64_t n = slot.held.session->go_back(slot.result.n_prompt);
      slot.held.tokens.assign(slot.prompt().begin(), slot.prompt().begin() + n);
    });
    if (!kept.ok()) slot.held = {};
  }
  slot.state = SlotState::idle;
  slot.job.reset();
  slot.sampler.reset();
  slot.writer.reset();
  slot.reserved_bytes = 0;
  slot.last_used = Clock::now();
}

}  // namespace narrows::server
