// From text to tokens: the tokens that a text names are found here, what lies between them is cut by
// libllama.
#include <fmt/format.h>

#include <exception>
#include <limits>
#include <new>

#include "base/utf8.h"
#include "text/byte_tokens.h"
#include "text/llama_log.h"
#include "text/tokenizer_impl.h"

namespace narrows {
namespace {

/// libllama's tokens of a part that names none.
bool append_tokens(const llama_vocab* vocab, std::string_view text, std::vector<Token>& tokens) {
  const auto size = static_cast<int32_t>(text.size());
  const size_t before = tokens.size();
  // One token a byte is possible, one for two bytes is far more than any language needs: if not, ask again.
  tokens.resize(before + text.size() / 2 + 16);
  const auto ask = [&] {
    return llama_tokenize(vocab, text.data(), size, tokens.data() + before,
                          static_cast<int32_t>(tokens.size() - before), false, false);
  };
  int32_t n = ask();
  if (n < 0 && n != std::numeric_limits<int32_t>::min()) {
    tokens.resize(before + static_cast<size_t>(-static_cast<int64_t>(n)));
    n = ask();
  }
  tokens.resize(before + static_cast<size_t>(std::max(n, 0)));
  return n >= 0;
}

bool is_control(const llama_vocab* vocab, Token token) {
  return (llama_vocab_get_attr(vocab, token) & LLAMA_TOKEN_ATTR_CONTROL) != 0;
}

/// Merging pairs can arrive at a control token that was not to be read as one: it is spelled out instead.
Status spell_control_tokens(const llama_vocab* vocab, size_t from, std::vector<Token>& tokens) {
  const auto first = std::find_if(tokens.begin() + static_cast<std::ptrdiff_t>(from), tokens.end(),
                                  [&](Token t) { return is_control(vocab, t); });
  if (first == tokens.end()) return {};
  const std::vector<Token> merged(first, tokens.end());
  tokens.erase(first, tokens.end());
  for (const Token token : merged) {
    if (!is_control(vocab, token)) {
      tokens.push_back(token);
      continue;
    }
    const char* text = llama_vocab_get_text(vocab, token);
    if (!append_byte_tokens(vocab, text, tokens)) {
      return {StatusCode::invalid_argument,
              fmt::format(
                  "the text names the control token {}, which the model's vocabulary cannot write as text",
                  quote(text, 60))};
    }
  }
  return {};
}

}  // namespace

Result<std::vector<Token>> Tokenizer::encode(std::string_view text, bool add_special,
                                             bool parse_special) const {
  return encode_parts(text, add_special, parse_special, {});
}

Result<std::vector<Token>> Tokenizer::encode(const ChatPrompt& prompt, size_t from) const {
  from = std::min(from, prompt.text.size());
  std::vector<size_t> breaks;
  for (const size_t b : prompt.breaks)
    if (b >= from) breaks.push_back(b - from);
  return encode_parts(std::string_view(prompt.text).substr(from), from == 0, true, breaks);
}

Result<std::vector<Token>> Tokenizer::encode_parts(std::string_view text, bool add_bos, bool control,
                                                   std::span<const size_t> breaks) const {
  if (text.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    return {StatusCode::invalid_argument,
            fmt::format("the text has {} bytes, more than the {} that can be tokenized at once", text.size(),
                        std::numeric_limits<int32_t>::max())};
  }
  if (const size_t bad = find_invalid_utf8(text); bad != std::string_view::npos) {
    return {StatusCode::invalid_argument, fmt::format("the text is not valid UTF-8 at byte {}", bad)};
  }
  const llama_vocab* vocab = impl_->vocab;
  const LlamaAbortGuard guard;  // libllama asserts what an untrusted file says
  try {
    std::vector<Token> tokens;
    if (add_bos && llama_vocab_get_add_bos(vocab)) {
      const Token bos = llama_vocab_bos(vocab);
      if (bos < 0 || bos >= impl_->n_vocab) {
        return {
            StatusCode::invalid_file,
            "the model's vocabulary cannot tokenize the text: it asks for a BOS token that it does not have"};
      }
      tokens.push_back(bos);
    }
    for (const TextPart& part : impl_->special.parts(text, control, breaks)) {
      if (part.token != LLAMA_TOKEN_NULL) {
        tokens.push_back(part.token);
        continue;
      }
      const size_t before = tokens.size();
      if (!append_tokens(vocab, text.substr(part.begin, part.end - part.begin), tokens))
        return {StatusCode::invalid_argument, "the text has more tokens than can be counted"};
      if (Status s = spell_control_tokens(vocab, before, tokens); !s.ok()) return s;
    }
    return tokens;
  } catch (const std::bad_alloc&) {
    return {StatusCode::out_of_memory, fmt::format("no memory to tokenize {} bytes", text.size())};
  } catch (const std::exception& error) {
    return {StatusCode::invalid_file,
            "the model's vocabulary cannot tokenize the text: " + reason_in(error.what())};
  }
}

}  // namespace narrows
