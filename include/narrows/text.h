// Text in, token ids out, and back. Vocabulary and rules come from the GGUF file through libllama.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "narrows/status.h"

namespace narrows {

using Token = int32_t;

/// A call of a function that an assistant asks for.
struct ToolCall {
  std::string id = {};
  std::string name = {};
  std::string arguments = {};  ///< JSON text
};

struct ChatMessage {
  std::string role;                       ///< "system", "user", "assistant" or "tool"
  std::string content;                    ///< UTF-8
  std::string reasoning = {};             ///< assistant: what it thought first
  std::vector<ToolCall> tool_calls = {};  ///< assistant
  std::string tool_call_id = {};          ///< tool: the call that this is the result of
  std::string tool_name = {};             ///< tool
};

/// A conversation as the model wants to read it.
struct ChatPrompt {
  std::string text;
  /// Sorted byte offsets in `text`. What looks like a control token and has one in it (begin <= b < end)
  /// comes from a message, not from the template, and is text to the model.
  std::vector<size_t> breaks;
};

/// In place of what the file says about chats.
struct ChatTemplateOptions {
  std::string source;  ///< Jinja, or "chatml"; empty: the file's
  /// What the template reads beside the messages, each as JSON: {"enable_thinking", "false"}.
  std::map<std::string, std::string> arguments = {};
};

class Tokenizer {
 public:
  /// Reads only the vocabulary of the GGUF file. invalid_file if libllama refuses it; invalid_argument if
  /// options give a template that does not parse.
  static Result<std::unique_ptr<Tokenizer>> load(const std::string& gguf_path,
                                                 const ChatTemplateOptions& options = {});
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  /// add_special: put the BOS token that the file asks for; the end token that some files ask for never,
  /// since what is encoded is there to be continued. parse_special: read "<|im_start|>" as one token.
  /// invalid_argument on invalid UTF-8 (names the byte offset).
  Result<std::vector<Token>> encode(std::string_view text, bool add_special, bool parse_special) const;

  /// A conversation, control tokens read where the template wrote them and nowhere else. From byte `from` on;
  /// from its start with the BOS token that the file asks for.
  Result<std::vector<Token>> encode(const ChatPrompt& prompt, size_t from = 0) const;

  /// Bytes of one token; may be a part of a UTF-8 sequence. Control tokens give "" unless special is set.
  std::string piece(Token token, bool special = false) const;
  std::string decode(std::span<const Token> tokens, bool special = false) const;

  /// True for every end-of-generation token (EOS, EOT, <|im_end|>, ...).
  bool is_end(Token token) const;
  /// The end token that the file wants behind whole texts, where they are to be embedded; encode() writes
  /// none.
  std::optional<Token> end_behind_texts() const;
  int64_t n_vocab() const;
  /// Bytes of text that one token covers at most; 0 if there is no bound (vocabularies that drop characters).
  int64_t max_token_bytes() const;

  /// True if the file carries a chat template, or the options gave one.
  bool has_chat_template() const;
  /// The conversation as the model wants to read it (Jinja template of the file, through llama.cpp's common
  /// library). Falls back to ChatML if the file has none. invalid_argument if the template refuses the
  /// messages. A message of the assistant keeps its control tokens if the template looks for them in it.
  Result<ChatPrompt> apply_chat_template(std::span<const ChatMessage> messages,
                                         bool add_generation_prompt) const;

 private:
  friend class Access;
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  Result<std::vector<Token>> encode_parts(std::string_view text, bool add_bos, bool control,
                                          std::span<const size_t> breaks) const;
  std::unique_ptr<Impl> impl_;
};

/// Collects pieces and releases only whole UTF-8 sequences, for streaming.
class Utf8Stream {
 public:
  /// Returns the longest complete part; an invalid byte is passed on as U+FFFD so that output is always
  /// UTF-8.
  std::string push(std::string_view bytes);
  /// What is left at the end, incomplete sequences as U+FFFD.
  std::string flush();

 private:
  std::string pending_;
};

}  // namespace narrows
