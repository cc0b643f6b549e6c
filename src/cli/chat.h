// A conversation on one session: each turn feeds the cache only what is new.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cli/exit_code.h"
#include "cli/line_reader.h"
#include "cli/report.h"
#include "narrows/engine.h"
#include "narrows/sampling.h"

namespace narrows::cli {

struct ChatOptions {
  std::string system;     ///< empty: none
  std::string documents;  ///< put before the first question
  std::optional<int64_t> max_tokens;
  SamplerOptions sampling;
};

class Chat {
 public:
  Chat(Session& session, Sampler& sampler, ChatOptions options);

  /// Until /exit, the end of the input, or two Ctrl-C at the prompt; then prints the summary.
  Outcome run();

 private:
  /// A command such as /stats, or a question. Sets leave_.
  Outcome handle(const std::string& line);
  Outcome ask(const std::string& question);
  /// The tokens that the cache lacks of `conversation`; if it holds something else, the session goes back to
  /// what both begin with.
  Result<std::vector<Token>> missing_tokens(const ChatPrompt& conversation);
  void forget();
  /// The session goes back to the first n tokens that it holds, or a few less.
  void go_back(int64_t n);
  void add_to_totals(const Answer& answer);
  RunReport report() const;

  Session& session_;
  Sampler& sampler_;
  ChatOptions options_;
  LineReader reader_;
  std::vector<ChatMessage> messages_;
  std::vector<Token> cached_tokens_;  ///< what the cache holds
  std::string cached_text_;           ///< the same as text; empty if the cache was cut somewhere
  Answer totals_;
  int64_t n_questions_ = 0;
  bool interactive_;
  bool leave_ = false;
};

}  // namespace narrows::cli
