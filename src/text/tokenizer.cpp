// Tokenizer over libllama's vocabulary (no weights are read) and llama.cpp's Jinja chat templates.
// libllama throws, asserts and logs; here all of that becomes a Status.
#include <chat.h>
#include <fmt/format.h>
#include <llama.h>

#include <algorithm>
#include <exception>
#include <limits>
#include <mutex>
#include <new>
#include <utility>

#include "base/file.h"
#include "base/utf8.h"
#include "narrows/text.h"
#include "text/llama_log.h"
#include "text/vocabulary.h"

namespace narrows {
namespace {

struct ModelFree {
  void operator()(llama_model* model) const { llama_model_free(model); }
};

/// Used when the file carries no template; the same text as llama.cpp's own fallback.
std::string chatml(std::span<const ChatMessage> messages, bool add_generation_prompt) {
  std::string text;
  for (const ChatMessage& message : messages) {
    text += "<|im_start|>" + message.role + "\n" + message.content + "<|im_end|>\n";
  }
  if (add_generation_prompt) text += "<|im_start|>assistant\n";
  return text;
}

/// The line that says what is wrong: Jinja draws the template over many lines and ends with "Error: ..."; a
/// parser's error begins with its reason.
std::string reason_in(std::string_view text) {
  constexpr std::string_view kMark = "\nError: ";
  if (const size_t mark = text.rfind(kMark); mark != std::string_view::npos)
    text.remove_prefix(mark + kMark.size());
  text.remove_prefix(std::min(text.find_first_not_of(" \n"), text.size()));
  return quote(text.substr(0, text.find('\n')), 200);
}

}  // namespace

struct Tokenizer::Impl {
  std::unique_ptr<llama_model, ModelFree> model;  ///< vocabulary only
  const llama_vocab* vocab = nullptr;
  int32_t n_vocab = 0;
  bool has_template = false;
  common_chat_templates_ptr templates;  ///< null if the file has none, or one that does not parse
  std::string template_error;           ///< why it does not parse

  void read_template();
};

/// A template that does not parse spoils chat, not the model: the error waits for apply_chat_template().
void Tokenizer::Impl::read_template() {
  const char* source = llama_model_chat_template(model.get(), nullptr);
  has_template = source != nullptr;
  if (!has_template) return;
  try {
    templates = common_chat_templates_init(model.get(), "");
  } catch (const std::exception&) {
    try {  // llama.cpp rethrows a sliced exception: parse once more for the reason
      const common_chat_template again(source, "", "");
      template_error = "no reason given";
    } catch (const std::exception& error) {
      template_error = reason_in(error.what());
    }
  }
}

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;

Result<std::unique_ptr<Tokenizer>> Tokenizer::load(const std::string& gguf_path) {
  if (Status status = check_readable(gguf_path); !status.ok()) return status;
  const LlamaAbortGuard guard;
  clear_llama_error();
  const auto refused = [&](const std::string& reason) {
    return Status(StatusCode::invalid_file,
                  fmt::format("cannot read the vocabulary of {}: {}", quote(gguf_path), reason));
  };
  try {
    auto impl = std::make_unique<Impl>();
    llama_model_params params = llama_model_default_params();
    params.vocab_only = true;
    impl->model.reset(llama_model_load_from_file(gguf_path.c_str(), params));
    if (!impl->model) return refused(llama_error());
    impl->vocab = llama_model_get_vocab(impl->model.get());
    impl->n_vocab = llama_vocab_n_tokens(impl->vocab);
    if (llama_vocab_type(impl->vocab) == LLAMA_VOCAB_TYPE_NONE || impl->n_vocab <= 0) {
      return refused("the file has none; use the GGUF file of a whole language model");
    }
    impl->read_template();
    return std::unique_ptr<Tokenizer>(new Tokenizer(std::move(impl)));
  } catch (const std::bad_alloc&) {
    return {StatusCode::out_of_memory, fmt::format("no memory for the vocabulary of {}", quote(gguf_path))};
  } catch (const std::exception& error) {
    return refused(reason_in(error.what()));
  }
}

Result<std::vector<Token>> Tokenizer::encode(std::string_view text, bool add_special,
                                             bool parse_special) const {
  if (text.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    return {StatusCode::invalid_argument,
            fmt::format("the text has {} bytes, more than the {} that can be tokenized at once", text.size(),
                        std::numeric_limits<int32_t>::max())};
  }
  if (const size_t bad = find_invalid_utf8(text); bad != std::string_view::npos) {
    return {StatusCode::invalid_argument, fmt::format("the text is not valid UTF-8 at byte {}", bad)};
  }
  const LlamaAbortGuard guard;  // libllama asserts that a file that wants BOS or EOS also names it
  try {
    const auto size = static_cast<int32_t>(text.size());
    // One token a byte is possible, one for two bytes is far more than any language needs: if not, ask again.
    std::vector<Token> tokens(text.size() / 2 + 16);
    int32_t n = llama_tokenize(impl_->vocab, text.data(), size, tokens.data(),
                               static_cast<int32_t>(tokens.size()), add_special, parse_special);
    if (n < 0 && n != std::numeric_limits<int32_t>::min()) {
      tokens.resize(static_cast<size_t>(-static_cast<int64_t>(n)));
      n = llama_tokenize(impl_->vocab, text.data(), size, tokens.data(), static_cast<int32_t>(tokens.size()),
                         add_special, parse_special);
    }
    if (n < 0) return {StatusCode::invalid_argument, "the text has more tokens than can be counted"};
    tokens.resize(static_cast<size_t>(n));
    return tokens;
  } catch (const std::bad_alloc&) {
    return {StatusCode::out_of_memory, fmt::format("no memory to tokenize {} bytes", text.size())};
  } catch (const std::exception& error) {
    return {StatusCode::invalid_file,
            "the model's vocabulary cannot tokenize the text: " + reason_in(error.what())};
  }
}

std::string Tokenizer::piece(Token token, bool special) const {
  if (token < 0 || token >= impl_->n_vocab) return {};
  std::string bytes(32, '\0');
  int32_t n =
      llama_token_to_piece(impl_->vocab, token, bytes.data(), static_cast<int32_t>(bytes.size()), 0, special);
  if (n < 0) {
    bytes.resize(static_cast<size_t>(-n));
    n = llama_token_to_piece(impl_->vocab, token, bytes.data(), static_cast<int32_t>(bytes.size()), 0,
                             special);
  }
  bytes.resize(n > 0 ? static_cast<size_t>(n) : 0);
  return bytes;
}

std::string Tokenizer::decode(std::span<const Token> tokens, bool special) const {
  // Not llama_detokenize(): it drops a leading space and cleans up others, so that parts would not add up to
  // the whole.
  std::string text;
  for (const Token token : tokens) text += piece(token, special);
  return text;
}

bool Tokenizer::is_end(Token token) const {
  return token >= 0 && token < impl_->n_vocab && llama_vocab_is_eog(impl_->vocab, token);
}

const llama_vocab* vocabulary(const Tokenizer& tokenizer) { return tokenizer.impl().vocab; }

int64_t Tokenizer::n_vocab() const { return impl_->n_vocab; }

bool Tokenizer::has_chat_template() const { return impl_->has_template; }

Result<std::string> Tokenizer::apply_chat_template(std::span<const ChatMessage> messages,
                                                   bool add_generation_prompt) const {
  if (!impl_->has_template) return chatml(messages, add_generation_prompt);
  if (!impl_->templates) {
    return {StatusCode::unsupported, "the model's chat template cannot be read (" + impl_->template_error +
                                         "); give the prompt as raw text"};
  }
  const LlamaAbortGuard guard;
  try {
    common_chat_templates_inputs inputs;
    for (const ChatMessage& message : messages) {
      common_chat_msg& added = inputs.messages.emplace_back();
      added.role = message.role;
      added.content = message.content;
    }
    inputs.add_generation_prompt = add_generation_prompt;
    inputs.force_pure_content =
        true;  // no parser for tool calls, which would cost a study of the template each time
    // llama.cpp tells the template the date by std::localtime(), whose result all threads of a process share.
    static std::mutex localtime_mutex;
    const std::lock_guard<std::mutex> lock(localtime_mutex);
    return common_chat_templates_apply(impl_->templates.get(), inputs).prompt;
  } catch (const std::bad_alloc&) {
    return {StatusCode::out_of_memory, "no memory to apply the chat template"};
  } catch (const std::exception& error) {
    return {StatusCode::invalid_argument,
            "the model's chat template refuses the messages: " + reason_in(error.what())};
  }
}

}  // namespace narrows
