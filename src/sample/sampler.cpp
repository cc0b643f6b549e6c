// Sampler: a chain of libllama's samplers over plain logits, without a llama_context. The order is that of
// llama.cpp's default: biases, penalties, top-k, top-p, min-p, temperature, then the draw. A grammar stands
// beside the chain: it looks at the drawn token alone, and only if it refuses that at all of them, because
// looking at the whole vocabulary at every step would cost more than the step.
#include <fmt/format.h>
#include <llama.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <exception>
#include <limits>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "narrows/sampling.h"
#include "sample/grammar.h"
#include "sample/grammar_trigger.h"
#include "sample/sampler_chain.h"
#include "text/llama_log.h"
#include "text/vocabulary.h"

namespace narrows {
namespace {

constexpr int32_t kNoIndex = -1;

/// Index of the largest logit, the first of equals; nothing if a logit is NaN or +infinity, or all are
/// -infinity.
std::optional<size_t> largest(std::span<const float> logits) {
  // In chains side by side, which compilers turn into vectors.
  constexpr size_t kChains = 16;
  std::array<float, kChains> top;
  std::array<uint32_t, kChains> not_a_number{};
  top.fill(-std::numeric_limits<float>::infinity());
  size_t i = 0;
  for (; i + kChains <= logits.size(); i += kChains) {
    for (size_t c = 0; c < kChains; ++c) {
      const float x = logits[i + c];
      top[c] = x > top[c] ? x : top[c];
      not_a_number[c] |= std::isnan(x) ? 1U : 0U;
    }
  }
  float best = *std::max_element(top.begin(), top.end());
  bool bad = std::any_of(not_a_number.begin(), not_a_number.end(), [](uint32_t n) { return n != 0; });
  for (; i < logits.size(); ++i) {
    best = std::max(best, logits[i]);
    bad = bad || std::isnan(logits[i]);
  }
  if (bad || !std::isfinite(best)) return std::nullopt;
  return static_cast<size_t>(std::find(logits.begin(), logits.end(), best) - logits.begin());
}

}  // namespace

/// Steps of the grammar are taken from others' too while it lives.
class Sharing {
 public:
  Sharing(GrammarMatcher& grammar, std::atomic<int64_t>* steps) : grammar_(grammar) {
    if (steps != nullptr) grammar_.begin_sharing(*steps);
    if (steps == nullptr) grammar_.end_sharing();
  }
  ~Sharing() { grammar_.end_sharing(); }
  Sharing(const Sharing&) = delete;
  Sharing& operator=(const Sharing&) = delete;

 private:
  GrammarMatcher& grammar_;
};

struct Sampler::Impl {
  SamplerChain chain;
  std::unique_ptr<GrammarMatcher> grammar;  ///< null: free text
  std::optional<GrammarTrigger> trigger;    ///< of a grammar that holds from some place on
  bool holds = false;                       ///< the grammar
  std::string gbnf;                         ///< of a grammar with a trigger
  const Tokenizer* tokenizer = nullptr;
  bool plain_greedy = false;  ///< neither bias, penalty nor temperature: the largest logit is the answer
  int32_t min_tokens = 0;     ///< that are to come before the answer may end
  std::vector<Token> ends;
  std::vector<float> without_ends;
  std::vector<llama_token_data> candidates;
  Status failed;                ///< of a grammar that could not take a token
  std::optional<Token> chosen;  ///< without regard to the grammar, of a draw that has not come to its end

  llama_token_data_array all_candidates(std::span<const float> logits);
  void await(Token token);
  Result<bool> grammar_allows(Token token);
  Status forbid_what_the_grammar_does(llama_token_data_array& array);
  Result<Token> choose(std::span<const float> logits, bool by_grammar);
};

llama_token_data_array Sampler::Impl::all_candidates(std::span<const float> logits) {
  candidates.resize(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) candidates[i] = {static_cast<llama_token>(i), logits[i], 0.0F};
  return {candidates.data(), candidates.size(), kNoIndex, false};
}

/// The grammar does not hold yet.
void Sampler::Impl::await(Token token) {
  if (tokenizer->is_end(token)) return;
  const std::optional<std::string> begun = trigger->push(tokenizer->piece(token, true));
  if (!begun) return;
  grammar->begin_draw();
  if (grammar->accept(*begun).ok()) {
    holds = true;
    return;
  }
  // What came with the word in one token is not what the grammar wants there: it was text after all.
  Result<std::unique_ptr<GrammarMatcher>> anew = make_grammar(gbnf);
  if (anew.ok()) {
    grammar = std::move(*anew);
  } else {
    failed = anew.status();
  }
}

Result<bool> Sampler::Impl::grammar_allows(Token token) {
  if (tokenizer->is_end(token)) return grammar->may_end();
  return grammar->allows(tokenizer->piece(token, true));
}

/// Of the whole vocabulary in its own order.
Status Sampler::Impl::forbid_what_the_grammar_does(llama_token_data_array& array) {
  std::vector<bool> allowed(array.size);
  const auto allow = [&](Token token) {
    if (static_cast<size_t>(token) < array.size) allowed[static_cast<size_t>(token)] = true;
  };
  if (Status s = grammar->each_allowed(sorted_pieces(*tokenizer), allow); !s.ok()) return s;
  const bool may_end = grammar->may_end();
  for (size_t i = 0; i < array.size; ++i) {
    if (!allowed[i] && !(may_end && tokenizer->is_end(static_cast<Token>(i))))
      array.data[i].logit = -std::numeric_limits<float>::infinity();
  }
  return {};
}

Result<Token> Sampler::Impl::choose(std::span<const float> logits, bool by_grammar) {
  llama_token_data_array array = all_candidates(logits);
  if (by_grammar) {
    if (Status s = forbid_what_the_grammar_does(array); !s.ok()) return s;
    const bool any = std::any_of(array.data, array.data + array.size,
                                 [](const llama_token_data& c) { return std::isfinite(c.logit); });
    if (!any) {
      return {StatusCode::invalid_argument, "the grammar allows no token of the vocabulary to come next"};
    }
  }
  llama_sampler_apply(chain.get(), &array);
  if (array.selected < 0 || static_cast<size_t>(array.selected) >= array.size) {
    return {StatusCode::internal, "the sampler chain chose no token (sample/sampler.cpp)"};
  }
  return static_cast<Token>(array.data[array.selected].id);
}

Sampler::Sampler(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Sampler::~Sampler() = default;

Result<std::unique_ptr<Sampler>> Sampler::create(const SamplerOptions& options, const Tokenizer* tokenizer) {
  if (Status status = check_sampling(options); !status.ok()) return status;
  auto impl = std::make_unique<Impl>();
  if (!options.grammar.empty()) {
    if (tokenizer == nullptr) return {StatusCode::invalid_argument, "a grammar needs the model's tokenizer"};
    Result<std::unique_ptr<GrammarMatcher>> grammar = make_grammar(options.grammar);
    if (!grammar.ok()) return grammar.status();
    impl->grammar = std::move(*grammar);
    impl->tokenizer = tokenizer;
    impl->holds = options.grammar_words.empty() && options.grammar_patterns.empty();
    if (!impl->holds) {
      Result<GrammarTrigger> trigger = GrammarTrigger::create(options);
      if (!trigger.ok()) return trigger.status();
      impl->trigger = std::move(*trigger);
      impl->gbnf = options.grammar;
    } else if (!options.grammar_prefix.empty()) {
      impl->grammar->begin_draw();
      if (Status s = impl->grammar->accept(options.grammar_prefix); !s.ok()) return s;
    }
  }
  Result<SamplerChain> chain = make_sampler_chain(options, tokenizer);
  if (!chain.ok()) return chain.status();
  impl->chain = std::move(*chain);
  impl->plain_greedy = options.temperature == 0.0F && options.mirostat == 0 && !has_penalties(options) &&
                       options.logit_bias.empty();
  impl->min_tokens = options.min_tokens;
  if (options.min_tokens > 0) {
    if (tokenizer == nullptr) return {StatusCode::invalid_argument, "min tokens need the model's tokenizer"};
    for (Token token = 0; token < tokenizer->n_vocab(); ++token)
      if (tokenizer->is_end(token)) impl->ends.push_back(token);
  }
  return std::unique_ptr<Sampler>(new Sampler(std::move(impl)));
}

Result<Token> Sampler::sample(std::span<const float> logits) {
  const Result<std::optional<Token>> token = draw(logits, nullptr);
  if (!token.ok()) return token.status();
  return **token;
}

Result<std::optional<Token>> Sampler::sample(std::span<const float> logits, std::atomic<int64_t>& steps) {
  return draw(logits, &steps);
}

/// With steps of its own, null, it always comes to an end.
Result<std::optional<Token>> Sampler::draw(std::span<const float> logits, std::atomic<int64_t>* steps) {
  if (!impl_->failed.ok()) return impl_->failed;
  if (impl_->min_tokens > 0) {
    impl_->without_ends.assign(logits.begin(), logits.end());
    for (const Token end : impl_->ends) {
      if (static_cast<size_t>(end) < logits.size())
        impl_->without_ends[static_cast<size_t>(end)] = -std::numeric_limits<float>::infinity();
    }
    logits = impl_->without_ends;
  }
  const std::optional<size_t> best = largest(logits);
  if (!best) {
    return {StatusCode::non_finite,
            fmt::format(
                "none of the {} logits can be chosen: there is NaN or +infinity among them, or nothing but "
                "-infinity",
                logits.size())};
  }
  const LlamaAbortGuard guard;
  try {
    const bool goes_on = impl_->chosen.has_value();
    if (!goes_on) {
      const Result<Token> token =
          impl_->plain_greedy ? Result<Token>(static_cast<Token>(*best)) : impl_->choose(logits, false);
      if (!token.ok()) return token.status();
      if (!impl_->holds) return std::optional<Token>(*token);
      impl_->chosen = *token;
      impl_->grammar->begin_draw();
    }
    const Sharing sharing(*impl_->grammar, steps);
    Result<Token> token = *impl_->chosen;
    const Result<bool> allowed = impl_->grammar_allows(*impl_->chosen);
    if (!allowed.ok()) {
      token = allowed.status();
    } else if (!*allowed) {
      token = impl_->choose(logits, true);
    }
    if (impl_->grammar->paused()) return std::optional<Token>();
    impl_->chosen.reset();
    if (!token.ok()) return token.status();
    return std::optional<Token>(*token);
  } catch (const std::bad_alloc&) {
    return {StatusCode::out_of_memory, fmt::format("no memory to sample from {} logits", logits.size())};
  } catch (const std::exception& error) {
    return {StatusCode::internal,
            fmt::format("the sampler chain failed (sample/sampler.cpp): {}", error.what())};
  }
}

void Sampler::accept(Token token) {
  accept_prompt(token);
  if (impl_->min_tokens > 0) --impl_->min_tokens;
  if (!impl_->grammar || !impl_->failed.ok()) return;
  try {
    if (!impl_->holds) {
      impl_->await(token);
    } else if (!impl_->tokenizer->is_end(token)) {
      impl_->failed = impl_->grammar->accept(impl_->tokenizer->piece(token, true));
    } else if (!impl_->grammar->may_end()) {
      impl_->failed =
          Status(StatusCode::invalid_argument, "the grammar does not allow the answer to end here");
    }
  } catch (const std::bad_alloc&) {
    impl_->failed = Status(StatusCode::out_of_memory, "no memory for the state of the grammar");
  }
}

void Sampler::accept_prompt(Token token) { llama_sampler_accept(impl_->chain.get(), token); }

}  // namespace narrows
