// Tokenizer over libllama's vocabulary (no weights are read). libllama throws, asserts and logs; here all of
// that becomes a Status.
#include <fmt/format.h>

#include <algorithm>
#include <exception>
#include <new>
#include <utility>

#include "base/file.h"
#include "base/utf8.h"
#include "text/llama_log.h"
#include "text/tokenizer_impl.h"

namespace narrows {

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;

Result<std::unique_ptr<Tokenizer>> Tokenizer::load(const std::string& gguf_path,
                                                   const ChatTemplateOptions& options) {
  if (Status status = check_readable(gguf_path, /*regular=*/true); !status.ok()) return status;
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
    impl->special = SpecialTokens(impl->vocab);
    impl->read_template();
    if (Status s = impl->take(options); !s.ok()) return s;
    std::unique_ptr<Tokenizer> tokenizer(new Tokenizer(std::move(impl)));
    const auto type = llama_vocab_type(tokenizer->impl_->vocab);
    if (type == LLAMA_VOCAB_TYPE_BPE || type == LLAMA_VOCAB_TYPE_SPM) {
      // What is unknown is a character, of four bytes at most.
      int64_t longest = 4;
      for (Token t = 0; t < tokenizer->n_vocab(); ++t)
        longest = std::max(longest, static_cast<int64_t>(tokenizer->piece(t, true).size()));
      tokenizer->impl_->max_token_bytes = longest;
    }
    return tokenizer;
  } catch (const std::bad_alloc&) {
    return {StatusCode::out_of_memory, fmt::format("no memory for the vocabulary of {}", quote(gguf_path))};
  } catch (const std::exception& error) {
    return refused(reason_in(error.what()));
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

int64_t Tokenizer::n_vocab() const { return impl_->n_vocab; }

std::optional<Token> Tokenizer::end_behind_texts() const {
  if (!llama_vocab_get_add_eos(impl_->vocab)) return std::nullopt;
  const Token end = llama_vocab_eos(impl_->vocab);
  return end >= 0 && end < impl_->n_vocab ? std::optional<Token>(end) : std::nullopt;
}

int64_t Tokenizer::max_token_bytes() const { return impl_->max_token_bytes; }

bool Tokenizer::has_chat_template() const { return impl_->has_template; }

}  // namespace narrows
