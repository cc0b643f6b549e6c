// Texts are put together from whole sentences; a fact goes between two of them.
#include "eval/needle.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <random>

namespace narrows {

namespace {

/// Most tokens of an answer: a sentence around five digits.
constexpr int64_t kAnswerTokens = 24;

constexpr const char* kPlaces[] = {"Lisbon", "Oslo",   "Cairo",   "Lima",   "Quito",  "Hanoi",  "Dublin",
                                   "Athens", "Prague", "Nairobi", "Vienna", "Boston", "Sydney", "Madrid"};
constexpr const char* kPeople[] = {"Anna", "Boris", "Clara", "David", "Elena", "Frank", "Grace"};
constexpr const char* kColours[] = {"red", "blue", "green", "yellow", "white", "black", "orange"};
constexpr size_t kSeveral = 10;

std::string secret(const std::string& place, const std::string& number) {
  return fmt::format("The secret number of {} is {}.", place, number);
}

/// Sentences of the filler with their lengths in tokens.
struct Filler {
  std::vector<std::string> sentences;
  std::vector<int64_t> tokens;
};

Result<Filler> measure(const Tokenizer& tokenizer, const std::string& text) {
  Filler filler;
  for (std::string& sentence : split_sentences(text)) {
    const auto tokens = tokenizer.encode(sentence, false, false);
    if (!tokens.ok()) return tokens.status();
    if (tokens->empty()) continue;
    filler.sentences.push_back(std::move(sentence));
    filler.tokens.push_back(static_cast<int64_t>(tokens->size()));
  }
  if (filler.sentences.empty())
    return Status(StatusCode::invalid_argument, "the filler text has no sentence");
  return filler;
}

/// The prompt with n sentences of filler from sentence `first` on.
Result<std::vector<Token>> prompt_of(const Tokenizer& tokenizer, const Filler& filler, size_t first, size_t n,
                                     const NeedleTrial& trial) {
  std::string text = "Here is a text. A question about it follows.\n\n";
  for (size_t i = 0; i <= n; ++i) {
    for (size_t f = 0; f < trial.facts.size(); ++f) {
      if (static_cast<size_t>(std::llround(trial.depths[f] * static_cast<double>(n))) == i)
        text += trial.facts[f] + " ";
    }
    if (i < n) text += filler.sentences[(first + i) % filler.sentences.size()];
  }
  text += "\n\n" + trial.question;
  const ChatMessage message{"user", text};
  const Result<ChatPrompt> rendered = tokenizer.apply_chat_template({&message, 1}, true);
  if (!rendered.ok()) return rendered.status();
  return tokenizer.encode(*rendered);
}

/// The longest prompt that leaves room for the answer.
Result<std::vector<Token>> fit_prompt(const Tokenizer& tokenizer, const Filler& filler, size_t first,
                                      const NeedleTrial& trial, int64_t context) {
  const int64_t room = context - kAnswerTokens;
  Result<std::vector<Token>> prompt = prompt_of(tokenizer, filler, first, 0, trial);
  if (!prompt.ok()) return prompt;
  const auto bare = static_cast<int64_t>(prompt->size());
  if (bare > room) {
    return Status(
        StatusCode::invalid_argument,
        fmt::format(
            "the facts and the question have {} tokens and the answer up to {}, but the context is {}; "
            "raise --context",
            bare, kAnswerTokens, context));
  }
  size_t n = 0;
  for (int64_t sum = bare; sum <= room; ++n) sum += filler.tokens[(first + n) % filler.tokens.size()];
  // Sentences joined may have other tokens at their ends than alone.
  do {
    prompt = prompt_of(tokenizer, filler, first, n, trial);
    if (!prompt.ok()) return prompt;
  } while (static_cast<int64_t>(prompt->size()) > room && n-- > 0);
  return prompt;
}

/// What the session says next, always taking the likeliest token.
Result<std::string> answer(Session& session) {
  const Tokenizer& tokenizer = session.model().tokenizer();
  std::vector<Token> reply;
  while (static_cast<int64_t>(reply.size()) < kAnswerTokens) {
    const auto logits = session.logits();
    const auto token = static_cast<Token>(std::max_element(logits.begin(), logits.end()) - logits.begin());
    if (tokenizer.is_end(token)) break;
    reply.push_back(token);
    if (session.n_past() >= session.n_ctx()) break;
    if (Status s = session.decode(token); !s.ok()) return s;
  }
  return tokenizer.decode(reply);
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }

}  // namespace

std::vector<std::string> split_sentences(std::string_view text) {
  std::vector<std::string> sentences;
  size_t begin = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const bool stop = (text[i] == '.' || text[i] == '!' || text[i] == '?') && i + 1 < text.size() &&
                      (text[i + 1] == ' ' || text[i + 1] == '\n');
    const bool paragraph = text[i] == '\n' && i + 1 < text.size() && text[i + 1] == '\n';
    if (!stop && !paragraph) continue;
    while (i + 1 < text.size() && (text[i + 1] == ' ' || text[i + 1] == '\n')) ++i;
    sentences.emplace_back(text.substr(begin, i + 1 - begin));
    begin = i + 1;
  }
  if (begin < text.size()) sentences.emplace_back(std::string(text.substr(begin)) + "\n");
  return sentences;
}

NeedleTrial make_needle_trial(NeedleKind kind, double depth, uint32_t seed) {
  std::mt19937 random(seed);  // its numbers are the same everywhere; a distribution's would not be
  const auto number = [&] { return std::to_string(10000 + random() % 90000); };
  const auto shuffled = [&](auto& names) {
    std::vector<std::string> list(std::begin(names), std::end(names));
    for (size_t i = list.size() - 1; i > 0; --i) std::swap(list[i], list[random() % (i + 1)]);
    return list;
  };
  NeedleTrial trial;
  trial.answer = number();
  if (kind == NeedleKind::two_facts) {
    const std::string person = shuffled(kPeople)[0], colour = shuffled(kColours)[0];
    trial.facts = {fmt::format("{}'s box stands in the {} room.", person, colour),
                   fmt::format("The code of the {} room is {}.", colour, trial.answer)};
    trial.depths = {depth, std::fmod(depth + 0.5, 1.0)};
    trial.question =
        fmt::format("What is the code of the room where {}'s box stands? Answer with the number.", person);
    return trial;
  }
  const std::vector<std::string> places = shuffled(kPlaces);
  trial.facts = {secret(places[0], trial.answer)};
  trial.depths = {depth};
  trial.question = fmt::format("What is the secret number of {}? Answer with the number.", places[0]);
  if (kind == NeedleKind::several) {
    for (size_t i = 1; i < kSeveral; ++i) {
      trial.facts.push_back(secret(places[i], number()));
      trial.depths.push_back(static_cast<double>(i) / static_cast<double>(kSeveral));
    }
  }
  return trial;
}

bool names_number(std::string_view reply, std::string_view digits) {
  for (size_t at = reply.find(digits); at != std::string_view::npos; at = reply.find(digits, at + 1)) {
    const size_t end = at + digits.size();
    if ((at == 0 || !is_digit(reply[at - 1])) && (end == reply.size() || !is_digit(reply[end]))) return true;
  }
  return false;
}

Interval wilson_interval(int64_t successes, int64_t trials) {
  if (trials <= 0) return {};
  constexpr double z = 1.959963984540054;
  const auto n = static_cast<double>(trials);
  const double p = static_cast<double>(successes) / n;
  const double middle = (p + z * z / (2 * n)) / (1 + z * z / n);
  const double reach = z / (1 + z * z / n) * std::sqrt(p * (1 - p) / n + z * z / (4 * n * n));
  return {std::max(0.0, middle - reach), std::min(1.0, middle + reach)};
}

Result<std::vector<NeedleRow>> find_needles(std::shared_ptr<const Model> model, const NeedleOptions& options,
                                            const ProgressFn& progress) {
  if (options.contexts.empty() || options.profiles.empty() || options.n_depth < 1 || options.trials < 1)
    return Status(StatusCode::invalid_argument,
                  "needles need a context, a profile, a depth and a trial at least");
  Result<Filler> filler = measure(model->tokenizer(), options.filler);
  if (!filler.ok()) return filler.status();

  const auto n_context = static_cast<int64_t>(options.contexts.size());
  const int64_t n_text = options.n_depth * options.trials;
  std::vector<NeedleRow> rows;
  for (const KvProfile& profile : options.profiles) {
    for (const int64_t context : options.contexts) {
      for (int64_t d = 0; d < options.n_depth; ++d) {
        const double depth =
            options.n_depth == 1 ? 0.5 : static_cast<double>(d) / static_cast<double>(options.n_depth - 1);
        rows.push_back({profile.name, context, depth, 0, 0});
      }
    }
  }
  for (int64_t c = 0; c < n_context; ++c) {
    const int64_t context = options.contexts[static_cast<size_t>(c)];
    std::vector<std::unique_ptr<Session>> sessions;
    std::vector<Session*> pointers;
    for (const KvProfile& profile : options.profiles) {
      SessionOptions so;
      so.kv = profile;
      so.n_ctx = context;
      so.n_threads = options.n_threads;
      so.prompt = options.prompt;
      if (profile.takes_basis()) so.basis_path = options.basis_path;
      Result<std::unique_ptr<Session>> made = Session::create(model, so);
      if (!made.ok()) return made.status();
      sessions.push_back(std::move(*made));
      pointers.push_back(sessions.back().get());
    }
    for (int64_t text = 0; text < n_text; ++text) {
      const int64_t d = text / options.trials;
      const auto seed = static_cast<uint32_t>(c * n_text + text + 1);
      const NeedleTrial trial = make_needle_trial(options.kind, rows[static_cast<size_t>(d)].depth, seed);
      // Every text begins elsewhere in the filler: needles meet other neighbours.
      const size_t first = static_cast<size_t>(text) * 7919 % filler->sentences.size();
      const Result<std::vector<Token>> prompt =
          fit_prompt(model->tokenizer(), *filler, first, trial, context);
      if (!prompt.ok()) return prompt.status();
      for (Session* s : pointers) s->reset();
      const auto part = [&](double done) {
        const double whole =
            (static_cast<double>(c) + (static_cast<double>(text) + done) / static_cast<double>(n_text)) /
            static_cast<double>(n_context);
        return !progress || progress(whole);
      };
      if (Status s = Session::prefill_together(pointers, *prompt, part); !s.ok()) return s;
      for (size_t p = 0; p < pointers.size(); ++p) {
        const Result<std::string> reply = answer(*pointers[p]);
        if (!reply.ok()) return reply.status();
        NeedleRow& row = rows[(p * static_cast<size_t>(n_context) + static_cast<size_t>(c)) *
                                  static_cast<size_t>(options.n_depth) +
                              static_cast<size_t>(d)];
        ++row.trials;
        row.found += names_number(*reply, trial.answer) ? 1 : 0;
      }
    }
  }
  return rows;
}

}  // namespace narrows
