// The text of a choice as it comes, taken apart into thinking, content and tool calls: what every dialect
// writes its events from.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "narrows/text.h"
#include "text/answer_format.h"

namespace narrows::server {

/// What is new of an answer.
struct AnswerDelta {
  struct Call {
    size_t index = 0;
    bool begins = false;  ///< id and name are set, and nothing of this call came before
    std::string id;
    std::string name;
    std::string arguments;  ///< what comes behind those before
  };
  std::string reasoning;
  std::string content;
  std::vector<Call> calls;

  bool empty() const { return reasoning.empty() && content.empty() && calls.empty(); }
};

class Answer {
 public:
  /// Null format: all is content. `id` goes into the ids of calls that the model gives none.
  Answer(std::shared_ptr<const AnswerFormat> format, std::string id)
      : format_(std::move(format)), id_(std::move(id)) {}

  /// Text behind what came before. What can be told apart now.
  AnswerDelta add(const std::string& text);
  /// The rest, when no text will come any more. Text that does not follow the format is content.
  AnswerDelta finish();

  /// All that add() and finish() have given.
  const ChatMessage& message() const { return shown_; }

 private:
  AnswerDelta advance(const ChatMessage& now, bool last);

  std::shared_ptr<const AnswerFormat> format_;
  std::string id_;
  std::string text_;
  size_t n_read_ = 0;  ///< bytes of text_ at the last reading
  ChatMessage shown_{"assistant", ""};
};

}  // namespace narrows::server
