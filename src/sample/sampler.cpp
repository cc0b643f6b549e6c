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
#include "text/llama_log.h"
#include "text/vocabulary.h"

namespace narrows {
namespace {

constexpr int32_t kMaxLastN = 1 << 20;  ///< the penalties keep a ring of this many tokens
/// Below, logits of 1e5 divided by the temperature would leave float's range, and the draw would be from NaN.
constexpr double kMinTemperature = 0.001;
constexpr double kMaxTemperature = 100;
constexpr double kMinPenalty = 0.01;
constexpr double kMaxPenalty = 100;
constexpr double kMaxBias = 1e6;
constexpr double kMaxPresence = 100;  ///< of presence and frequency, both ways
constexpr int32_t kNoIndex = -1;

struct ChainFree {
  void operator()(llama_sampler* chain) const { llama_sampler_free(chain); }
};
using Chain = std::unique_ptr<llama_sampler, ChainFree>;

/// NaN is out of every range.
Status check_range(std::string_view name, double value, double low, double high) {
  if (value >= low && value <= high) return {};
  return {StatusCode::invalid_argument,
          fmt::format("{} is {}, which is not from {} to {}", name, value, low, high)};
}

Status check(const SamplerOptions& o) {
  if (o.temperature != 0.0F) {
    if (Status status = check_range("temperature", o.temperature, kMinTemperature, kMaxTemperature);
        !status.ok()) {
      return {status.code(), status.message() + "; 0 is greedy"};
    }
  }
  // libllama takes the largest seed for "choose one yourself", and a chosen seed would not be the printed
  // one.
  const Status checks[] = {
      check_range("top-k", o.top_k, 0, std::numeric_limits<int32_t>::max()),
      check_range("top-p", o.top_p, 0, 1),
      check_range("min-p", o.min_p, 0, 1),
      check_range("repeat penalty", o.repeat_penalty, kMinPenalty, kMaxPenalty),
      check_range("presence penalty", o.presence_penalty, -kMaxPresence, kMaxPresence),
      check_range("frequency penalty", o.frequency_penalty, -kMaxPresence, kMaxPresence),
      check_range("repeat last n", o.repeat_last_n, 0, kMaxLastN),
      check_range("seed", o.seed, 0, LLAMA_DEFAULT_SEED - 1),
  };
  for (const Status& status : checks) {
    if (!status.ok()) return status;
  }
  return {};
}

void add(const Chain& chain, llama_sampler* sampler) { llama_sampler_chain_add(chain.get(), sampler); }

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
  Chain chain;
  std::unique_ptr<GrammarMatcher> grammar;  ///< null: free text
  const Tokenizer* tokenizer = nullptr;
  bool has_penalties = false;
  bool plain_greedy = false;  ///< neither bias, penalty nor temperature: the largest logit is the answer
  std::vector<llama_token_data> candidates;
  Status failed;                ///< of a grammar that could not take a token
  std::optional<Token> chosen;  ///< without regard to the grammar, of a draw that has not come to its end

  llama_token_data_array all_candidates(std::span<const float> logits);
  Result<bool> grammar_allows(Token token);
  Status forbid_what_the_grammar_does(llama_token_data_array& array);
  Result<Token> choose(std::span<const float> logits, bool by_grammar);
};

llama_token_data_array Sampler::Impl::all_candidates(std::span<const float> logits) {
  candidates.resize(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) candidates[i] = {static_cast<llama_token>(i), logits[i], 0.0F};
  return {candidates.data(), candidates.size(), kNoIndex, false};
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
  if (Status status = check(options); !status.ok()) return status;
  auto impl = std::make_unique<Impl>();
  if (!options.grammar.empty()) {
    if (tokenizer == nullptr) return {StatusCode::invalid_argument, "a grammar needs the model's tokenizer"};
    Result<std::unique_ptr<GrammarMatcher>> grammar = make_grammar(options.grammar);
    if (!grammar.ok()) return grammar.status();
    impl->grammar = std::move(*grammar);
    impl->tokenizer = tokenizer;
  }
  llama_sampler_chain_params params = llama_sampler_chain_default_params();
  params.no_perf = true;
  impl->chain.reset(llama_sampler_chain_init(params));
  impl->has_penalties =
      options.repeat_last_n > 0 && (options.repeat_penalty != 1.0F || options.presence_penalty != 0.0F ||
                                    options.frequency_penalty != 0.0F);
  impl->plain_greedy = options.temperature == 0.0F && !impl->has_penalties && options.logit_bias.empty();

  if (!options.logit_bias.empty()) {
    const int64_t n_vocab = tokenizer != nullptr ? tokenizer->n_vocab() : 0;
    std::vector<llama_logit_bias> biases;
    for (const LogitBias& b : options.logit_bias) {
      if (b.token < 0 || b.token >= n_vocab || std::isnan(b.bias) || b.bias > kMaxBias) {
        return {StatusCode::invalid_argument,
                fmt::format("a bias of {} on token {} is out of range, the vocabulary has {} tokens", b.bias,
                            b.token, n_vocab)};
      }
      biases.push_back({b.token, b.bias});
    }
    add(impl->chain, llama_sampler_init_logit_bias(static_cast<int32_t>(n_vocab),
                                                   static_cast<int32_t>(biases.size()), biases.data()));
  }
  if (impl->has_penalties) {
    // The vocabulary's size is asked for the sake of samplers that run in the graph; this chain runs on plain
    // logits.
    constexpr int32_t kVocabNotUsed = 0;
    add(impl->chain,
        llama_sampler_init_penalties(kVocabNotUsed, options.repeat_last_n, options.repeat_penalty,
                                     options.frequency_penalty, options.presence_penalty));
  }
  if (options.temperature == 0.0F) {
    add(impl->chain, llama_sampler_init_greedy());
  } else {
    constexpr size_t kMinKeep = 1;  // a filter never leaves nothing
    if (options.top_k > 0) add(impl->chain, llama_sampler_init_top_k(options.top_k));
    add(impl->chain, llama_sampler_init_top_p(options.top_p, kMinKeep));
    add(impl->chain, llama_sampler_init_min_p(options.min_p, kMinKeep));
    add(impl->chain, llama_sampler_init_temp(options.temperature));
    add(impl->chain, llama_sampler_init_dist(options.seed));
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
      if (!impl_->grammar) return std::optional<Token>(*token);
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
  if (!impl_->grammar || !impl_->failed.ok()) return;
  try {
    if (!impl_->tokenizer->is_end(token))
      impl_->failed = impl_->grammar->accept(impl_->tokenizer->piece(token, true));
    else if (!impl_->grammar->may_end())
      impl_->failed =
          Status(StatusCode::invalid_argument, "the grammar does not allow the answer to end here");
  } catch (const std::bad_alloc&) {
    impl_->failed = Status(StatusCode::out_of_memory, "no memory for the state of the grammar");
  }
}

void Sampler::accept_prompt(Token token) { llama_sampler_accept(impl_->chain.get(), token); }

}  // namespace narrows
