// The inside of AnswerFormat, for the files that implement it.
#pragma once

#include <chat.h>

#include "text/answer_format.h"

namespace narrows {

struct AnswerFormat::Parser {
  common_chat_parser_params params;
  /// The content that a message which is continued has already: it is no part of the answer.
  std::string content_before;
  std::string reasoning_before;
};

/// Of what common_chat_templates_apply() gives. Throws what llama.cpp throws.
std::shared_ptr<AnswerFormat> make_answer_format(const llama_vocab* vocab, const common_chat_params& params,
                                                 bool split_reasoning, bool continues);

}  // namespace narrows
