// The loop of generation.
#include "cli/generate.h"

#include <chrono>

#include "cli/interrupt.h"
#include "cli/progress.h"

namespace narrows::cli {
namespace {

class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
  }

 private:
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

Outcome read_prompt(Session& session, std::span<const Token> prompt, int64_t n_cached, Answer& answer) {
  const Stopwatch watch;
  const std::span<const Token> rest = prompt.subspan(static_cast<size_t>(n_cached));
  ProgressBar bar(static_cast<int64_t>(rest.size()));
  Status status = session.prefill(rest, bar.callback());
  answer.prefill_s = watch.seconds();
  answer.prompt_tokens = static_cast<int64_t>(prompt.size());
  answer.cached_tokens = n_cached;
  if (status.ok()) return {};
  if (status.code() == StatusCode::cancelled) {
    return {Status(StatusCode::cancelled, told_to_end() ? "ended by a signal while reading the prompt"
                                                        : "interrupted while reading the prompt"),
            Phase::at_work};
  }
  const bool refused =
      status.code() == StatusCode::context_full || status.code() == StatusCode::invalid_argument;
  return {std::move(status), refused ? Phase::before_work : Phase::at_work};
}

/// What ends the answer before another token is sampled.
std::optional<StopReason> reason_to_stop(const Answer& answer, const GenerateOptions& options) {
  if (told_to_end()) return StopReason::told_to_end;
  if (interrupted()) return StopReason::interrupted;
  if (options.max_tokens && answer.generated_tokens >= *options.max_tokens) return StopReason::token_limit;
  return std::nullopt;
}

}  // namespace

Outcome generate(Session& session, Sampler& sampler, std::span<const Token> prompt,
                 const GenerateOptions& options, Answer& answer) {
  answer = {};
  if (Outcome outcome = read_prompt(session, prompt, options.n_cached, answer); !outcome.status.ok())
    return outcome;
  options.prompt_read();
  for (const Token token : prompt) sampler.accept(token);

  const Tokenizer& tokenizer = session.model().tokenizer();
  Utf8Stream stream;
  const auto show = [&](const std::string& text) {
    answer.text += text;
    return text.empty() ? Status() : options.show(text);
  };
  while (true) {
    if (const auto reason = reason_to_stop(answer, options)) {
      answer.stop = *reason;
      break;
    }
    const Stopwatch sampling;
    const Result<Token> token = sampler.sample(session.logits());
    answer.decode_s += sampling.seconds();
    if (!token.ok()) return {token.status(), Phase::at_work};
    if (tokenizer.is_end(*token)) {
      answer.stop = StopReason::end_of_text;
      break;
    }
    sampler.accept(*token);
    ++answer.generated_tokens;
    const std::string special_piece = tokenizer.piece(*token, true);
    answer.all_text += special_piece;
    if (Status status = show(stream.push(tokenizer.piece(*token))); !status.ok())
      return {status, Phase::at_work};

    if (reason_to_stop(answer, options)) continue;  // the last token needs no logits after it
    const Stopwatch decoding;
    Status status = session.decode(*token);
    answer.decode_s += decoding.seconds();
    if (status.code() == StatusCode::context_full) {
      answer.stop = StopReason::context_full;
      break;
    }
    if (!status.ok()) return {std::move(status), Phase::at_work};
    ++answer.decode_steps;
    answer.cached_text += special_piece;
    answer.tokens_in_cache.push_back(*token);
  }
  if (Status status = show(stream.flush()); !status.ok()) return {status, Phase::at_work};
  return {};
}

}  // namespace narrows::cli
