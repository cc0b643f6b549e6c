// How an answer is written and read that may think, call tools, or both: the grammar that calls follow, where
// it begins to hold, and llama.cpp's parser of the template's own format.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "narrows/text.h"

namespace narrows {

struct AnswerFormat {
  AnswerFormat();
  ~AnswerFormat();
  AnswerFormat(const AnswerFormat&) = delete;
  AnswerFormat& operator=(const AnswerFormat&) = delete;

  std::string grammar;  ///< GBNF; "": none
  /// Of a grammar that holds from the answer's first byte: what the prompt ends with and it begins with.
  std::string grammar_prefix;
  /// Of a grammar that holds from some place on (lazy): texts and ECMAScript patterns that begin it. Both
  /// empty: it holds from the first byte.
  std::vector<std::string> words;
  std::vector<std::string> patterns;
  /// Between these nothing begins it.
  std::string thinking_begin;
  std::vector<std::string> thinking_ends;
  bool begins_thinking = false;  ///< the prompt has thinking_begin at its end

  std::vector<Token> shown;        ///< control tokens that are part of the text that read() takes
  std::vector<std::string> stops;  ///< texts that end the answer

  /// An answer or the beginning of one (partial): its role, content, reasoning and tool calls. The same
  /// text gives the same; a longer one most often what it gave and more. invalid_argument if it does not
  /// follow the format.
  Result<ChatMessage> read(std::string_view text, bool partial) const;

  struct Parser;
  std::unique_ptr<Parser> parser;  ///< set by prepare_chat()
};

}  // namespace narrows
