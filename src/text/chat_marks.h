// What clients write into a conversation is not trusted: what looks like a control token in it is marked
// before the template is applied, and the marks say afterwards where it went.
#pragma once

#include <string>

#include "text/chat_request.h"
#include "text/special_tokens.h"

namespace narrows {

/// Makes the JSON texts that name control tokens (by escapes, maybe) plain: what a template that parses them
/// writes is what it would write of them as they are. True if any text of the request names control tokens.
/// Throws std::bad_alloc.
bool make_plain(ChatRequest& request, const SpecialTokens& special);

/// The request with `mark` in all control tokens that clients have written. An assistant's content and
/// thinking: only if assistant_too.
ChatRequest with_marks(const ChatRequest& request, const SpecialTokens& special, const std::string& mark,
                       bool assistant_too);

/// A noncharacter of Unicode that stands neither in the request nor in `rendered`; "" if all do.
std::string unused_mark(const ChatRequest& request, const std::string& rendered);

/// The text without its marks, which become breaks.
ChatPrompt without_marks(const std::string& marked, const std::string& mark);

}  // namespace narrows
