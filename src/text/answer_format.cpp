#include "text/answer_format.h"

#include <algorithm>
#include <exception>
#include <new>

#include "text/answer_parser.h"
#include "text/llama_log.h"
#include "text/tokenizer_impl.h"

namespace narrows {

namespace {

/// The token that is `text` and nothing else, if there is one.
std::optional<Token> single_token(const llama_vocab* vocab, const std::string& text) {
  Token tokens[2];
  const int32_t n =
      llama_tokenize(vocab, text.data(), static_cast<int32_t>(text.size()), tokens, 2, false, true);
  return n == 1 ? std::optional<Token>(tokens[0]) : std::nullopt;
}

/// `text` without what `before` has of it.
std::string behind(const std::string& text, const std::string& before) {
  return text.compare(0, before.size(), before) == 0 ? text.substr(before.size()) : text;
}

std::string trimmed(std::string text) {
  const size_t end = text.find_last_not_of(" \n\r\t");
  text.resize(end == std::string::npos ? 0 : end + 1);
  return text;
}

ChatMessage message_of(const common_chat_msg& parsed, const AnswerFormat::Parser& parser) {
  ChatMessage message{"assistant", behind(parsed.content, parser.content_before)};
  message.reasoning = behind(parsed.reasoning_content, parser.reasoning_before);
  for (const common_chat_tool_call& call : parsed.tool_calls)
    message.tool_calls.push_back({call.id, call.name, call.arguments});
  return message;
}

}  // namespace

AnswerFormat::AnswerFormat() = default;
AnswerFormat::~AnswerFormat() = default;

Result<ChatMessage> AnswerFormat::read(std::string_view text, bool partial) const {
  const LlamaAbortGuard guard;
  try {
    return message_of(common_chat_parse(std::string(text), partial, parser->params), *parser);
  } catch (const std::bad_alloc&) {
    return Status(StatusCode::out_of_memory, "no memory to read the answer");
  } catch (const std::exception& error) {
    return Status(StatusCode::invalid_argument, reason_in(error.what()));
  }
}

std::shared_ptr<AnswerFormat> make_answer_format(const llama_vocab* vocab, const common_chat_params& params,
                                                 bool split_reasoning, bool continues) {
  auto format = std::make_shared<AnswerFormat>();
  format->parser = std::make_unique<AnswerFormat::Parser>();
  common_chat_parser_params& p = format->parser->params;
  p = common_chat_parser_params(params);
  p.reasoning_format = split_reasoning ? COMMON_REASONING_FORMAT_DEEPSEEK : COMMON_REASONING_FORMAT_NONE;
  if (!params.parser.empty()) p.parser.load(params.parser);
  if (continues) {
    const common_chat_msg before = common_chat_parse("", true, p);
    format->parser->content_before = before.content;
    format->parser->reasoning_before = before.reasoning_content;
  }

  format->grammar = params.grammar;
  if (params.grammar_lazy) {
    for (const common_grammar_trigger& trigger : params.grammar_triggers) {
      const bool is_word = trigger.type == COMMON_GRAMMAR_TRIGGER_TYPE_WORD;
      if (!trigger.value.empty()) (is_word ? format->words : format->patterns).push_back(trigger.value);
    }
    // A grammar that nothing begins never holds.
    if (format->words.empty() && format->patterns.empty()) format->grammar.clear();
  } else {
    format->grammar_prefix = params.generation_prompt;
  }
  format->thinking_begin = params.thinking_start_tag;
  format->thinking_ends = params.thinking_end_tags;
  const std::string end = trimmed(params.generation_prompt);
  const std::string& tag = params.thinking_start_tag;
  format->begins_thinking =
      !tag.empty() && end.size() >= tag.size() && end.compare(end.size() - tag.size(), tag.size(), tag) == 0;

  for (const std::string& text : params.preserved_tokens) {
    if (const std::optional<Token> token = single_token(vocab, text)) format->shown.push_back(*token);
  }
  for (const std::string& text : {params.thinking_start_tag}) {
    if (text.empty()) continue;
    if (const std::optional<Token> token = single_token(vocab, text)) format->shown.push_back(*token);
  }
  for (const std::string& text : params.thinking_end_tags) {
    if (const std::optional<Token> token = single_token(vocab, text)) format->shown.push_back(*token);
  }
  for (const std::string& stop : params.additional_stops) {
    if (!stop.empty()) format->stops.push_back(stop);
  }
  return format;
}

}  // namespace narrows
