// A conversation with all that a chat template and llama.cpp's common chat library take beside messages:
// tools, a choice among them, thinking. What comes of it is a prompt, and how the answer to it is read.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "narrows/text.h"
#include "text/answer_format.h"

namespace narrows {

/// A function that the model may call.
struct ChatTool {
  std::string name;
  std::string description = {};
  std::string parameters = {};  ///< a JSON schema, as the model is shown it
  /// The same as llama.cpp's converter can take it (sample/grammar.h, tool_parameters()).
  std::string plain_parameters = {};
};

enum class ToolChoice { automatic, none, required };

struct ChatRequest {
  std::vector<ChatMessage> messages;
  std::vector<ChatTool> tools = {};
  ToolChoice tool_choice = ToolChoice::automatic;
  std::string forced_tool = {};                  ///< of required: this one; "": any
  std::optional<bool> parallel_tool_calls = {};  ///< nothing: if the template knows several calls
  bool split_reasoning = true;                   ///< thinking is no part of the content
  std::optional<bool> enable_thinking = {};      ///< nothing: as the template likes it
  bool add_generation_prompt = true;
  bool continue_final = false;                        ///< the answer goes on with the last message
  std::map<std::string, std::string> arguments = {};  ///< of the template: JSON texts by name
};

struct PreparedChat {
  ChatPrompt prompt;
  std::shared_ptr<const AnswerFormat> format;  ///< null: all of the answer is its content
  bool knows_effort = false;                   ///< the template reads reasoning_effort
};

/// Deepest nesting of arguments, schemas and the template's arguments: what reads them recurses.
inline constexpr int kMaxChatJsonDepth = 100;

/// Brackets within each other outside of strings, at the deepest place.
int json_depth(std::string_view json);

/// Whether the model's template can show tools.
bool knows_tools(const Tokenizer& tokenizer);

/// As Tokenizer::apply_chat_template(). invalid_argument with a sentence if the template refuses the
/// conversation or knows no tools. Control tokens of all that clients write are text; only an assistant's own
/// content and thinking keep those that the template looks for.
Result<PreparedChat> prepare_chat(const Tokenizer& tokenizer, const ChatRequest& request);

}  // namespace narrows
