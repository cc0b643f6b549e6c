// Chat or plain text.
#include "eval/task/item.h"

namespace narrows {

Result<std::vector<Token>> item_prompt(const Tokenizer& tokenizer, const TaskItem& item, bool raw) {
  if (!raw && tokenizer.has_chat_template()) {
    Result<ChatPrompt> prompt = tokenizer.apply_chat_template(item.messages, true);
    if (!prompt.ok()) return prompt.status();
    prompt->text += item.lead_in;
    return tokenizer.encode(*prompt);
  }
  std::string text;
  for (const ChatMessage& message : item.messages) {
    text += message.content;
    if (&message != &item.messages.back()) text += message.role == "assistant" ? "\n\n" : "\n";
  }
  if (!item.lead_in.empty()) text += "\n" + item.lead_in;
  return tokenizer.encode(text, true, false);
}

}  // namespace narrows
