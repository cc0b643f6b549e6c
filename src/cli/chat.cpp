// The conversation is rendered by the model's template as a whole each turn; if what the cache holds is its
// beginning, only the rest is tokenized and run. Templates may rewrite history (some drop the model's
// thoughts): then the cache goes back to the last token that both have in common.
#include "cli/chat.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/utf8.h"
#include "cli/engine_flags.h"
#include "cli/interrupt.h"
#include "cli/output.h"

namespace narrows::cli {
namespace {

constexpr const char* kHelp =
    "/stats   speed, cache and seed so far\n"
    "/reset   forget the conversation (files are put before the next question again)\n"
    "/exit    leave, as Ctrl-D does; Ctrl-C stops an answer\n"
    "/help    this list";

/// "/stats" is a command, "/etc/passwd" and "/ is what?" are questions.
bool is_command(const std::string& line) {
  return line.size() > 1 && line[0] == '/' &&
         std::all_of(line.begin() + 1, line.end(), [](char c) { return c >= 'a' && c <= 'z'; });
}

std::string trimmed(const std::string& line) {
  const size_t first = line.find_first_not_of(" \t");
  return first == std::string::npos ? "" : line.substr(first, line.find_last_not_of(" \t") - first + 1);
}

}  // namespace

Chat::Chat(Session& session, Sampler& sampler, ChatOptions options)
    : session_(session), sampler_(sampler), options_(std::move(options)), interactive_(stdin_is_terminal()) {
  forget();
}

void Chat::forget() {
  session_.reset();
  messages_.clear();
  cached_tokens_.clear();
  cached_text_.clear();
  if (!options_.system.empty()) messages_.push_back({"system", options_.system});
}

void Chat::go_back(int64_t n) {
  const int64_t left = session_.go_back(n);
  if (left == static_cast<int64_t>(cached_tokens_.size())) return;
  cached_tokens_.resize(static_cast<size_t>(left));
  cached_text_.clear();
}

void Chat::add_to_totals(const Answer& answer) {
  totals_.prompt_tokens += answer.prompt_tokens;
  totals_.generated_tokens += answer.generated_tokens;
  totals_.decode_steps += answer.decode_steps;
  totals_.prefill_s += answer.prefill_s;
  totals_.decode_s += answer.decode_s;
  totals_.stop = answer.stop;
}

RunReport Chat::report() const { return make_report(session_, totals_, options_.sampling.seed); }

Result<std::vector<Token>> Chat::missing_tokens(const ChatPrompt& conversation) {
  const Tokenizer& tokenizer = session_.model().tokenizer();
  const auto [in_cache, in_text] = std::mismatch(cached_text_.begin(), cached_text_.end(),
                                                 conversation.text.begin(), conversation.text.end());
  // Many templates trim an answer's end: white space that only the cache has does no harm.
  const bool same = std::all_of(in_cache, cached_text_.end(), [](char c) { return c == ' ' || c == '\n'; });
  if (!cached_text_.empty() && same && in_text != conversation.text.end()) {
    return tokenizer.encode(conversation, static_cast<size_t>(in_text - conversation.text.begin()));
  }
  Result<std::vector<Token>> tokens = tokenizer.encode(conversation);
  if (!tokens.ok() || tokens->empty()) return tokens;
  // One token at least is run, for its logits.
  const auto end =
      tokens->begin() + static_cast<std::ptrdiff_t>(std::min(cached_tokens_.size(), tokens->size() - 1));
  const auto common = std::mismatch(tokens->begin(), end, cached_tokens_.begin()).first - tokens->begin();
  if (!cached_text_.empty())
    note("[the model's template has rewritten the conversation: going back to where it differs]");
  go_back(common);
  tokens->erase(tokens->begin(), tokens->begin() + static_cast<std::ptrdiff_t>(cached_tokens_.size()));
  return tokens;
}

Outcome Chat::ask(const std::string& question) {
  const bool first = messages_.empty() || messages_.back().role == "system";
  messages_.push_back({"user", first ? join_parts({options_.documents, question}) : question});
  const Result<ChatPrompt> conversation = session_.model().tokenizer().apply_chat_template(messages_, true);
  const Result<std::vector<Token>> tokens =
      conversation.ok() ? missing_tokens(*conversation) : Result<std::vector<Token>>(conversation.status());
  if (!tokens.ok()) {
    messages_.pop_back();
    return tokens.status();
  }

  GenerateOptions generation;
  generation.max_tokens = options_.max_tokens;
  generation.show = write_stdout;
  Answer answer;
  Outcome outcome = generate(session_, sampler_, *tokens, generation, answer);
  if (!outcome.status.ok()) {
    messages_.pop_back();  // as if the question had not been asked
    if (outcome.phase == Phase::at_work) go_back(static_cast<int64_t>(cached_tokens_.size()));
    return outcome;
  }
  cached_text_ = conversation->text + answer.cached_text;
  cached_tokens_.insert(cached_tokens_.end(), tokens->begin(), tokens->end());
  cached_tokens_.insert(cached_tokens_.end(), answer.tokens_in_cache.begin(), answer.tokens_in_cache.end());
  // Text that is not UTF-8 cannot go through the template; it then differs from the cache, which is noticed.
  const bool whole = find_invalid_utf8(answer.all_text) == std::string::npos;
  messages_.push_back({"assistant", whole ? answer.all_text : answer.text});
  add_to_totals(answer);
  if (Status status = write_stdout("\n"); !status.ok()) return {status, Phase::at_work};
  if (answer.stop != StopReason::end_of_text) {
    RunReport turn = report();
    turn.answer.generated_tokens = answer.generated_tokens;
    note(fmt::format("[{}]", stop_sentence(turn)));
  }
  return {};
}

Outcome Chat::handle(const std::string& line) {
  if (is_command(line)) {
    if (line == "/exit") {
      leave_ = true;
    } else if (line == "/reset") {
      forget();
      note("[the conversation is forgotten]");
    } else if (line == "/stats") {
      note(summary(report()));
    } else if (line == "/help") {
      note(kHelp);
    } else {
      note(fmt::format("[there is no command {}; /help lists them]", line));
    }
    return {};
  }
  if (const size_t bad = find_invalid_utf8(line); bad != std::string::npos) {
    return Status(StatusCode::invalid_argument,
                  fmt::format("the question is not valid UTF-8 at byte {}", bad));
  }
  ++n_questions_;
  return ask(line);
}

Outcome Chat::run() {
  if (interactive_) note(fmt::format("[{} tokens of context; /help lists the commands]", session_.n_ctx()));
  int interrupts = 0;
  Outcome outcome;
  while (!leave_) {
    clear_interrupt();
    if (interactive_) (void)std::fputs("> ", stderr);
    std::string line;
    const LineReader::Event event = reader_.next(line);
    if (event == LineReader::Event::end) {
      if (interactive_) note("");
      break;
    }
    if (event == LineReader::Event::failure) {
      outcome = {Status(StatusCode::io_error, "cannot read standard input: " + line), Phase::at_work};
      break;
    }
    if (told_to_end()) {
      outcome = {Status(StatusCode::cancelled, "ended by a signal"), Phase::at_work};
      break;
    }
    if (event == LineReader::Event::interrupt) {
      if (!interrupted()) continue;  // some other signal, such as a resized window
      if (++interrupts > 1 || !interactive_) break;
      note("\n[Ctrl-C once more, or /exit, leaves]");
      continue;
    }
    interrupts = 0;
    line = trimmed(line);
    if (line.empty()) continue;
    outcome = handle(line);
    if (told_to_end()) {
      if (outcome.status.ok())
        outcome = {Status(StatusCode::cancelled, "ended by a signal: the answer is cut off"), Phase::at_work};
      break;
    }
    if (outcome.status.ok() && interrupted() && !interactive_) {
      outcome = {Status(StatusCode::cancelled, "interrupted: further questions are not read"),
                 Phase::at_work};
    }
    if (outcome.status.ok()) continue;
    // At a terminal the user may ask again; a pipe would go on with questions that rest on this one.
    if (!interactive_ || outcome.status.code() == StatusCode::io_error) break;
    print_error(outcome.status);
    outcome = {};
  }
  if (n_questions_ > 0) note(summary(report()));
  if (n_questions_ == 0 && !interactive_ && !leave_ && outcome.status.ok()) {
    return Status(StatusCode::invalid_argument,
                  "there is no question: give one with -p TEXT, or one a line on standard input");
  }
  return outcome;
}

}  // namespace narrows::cli
