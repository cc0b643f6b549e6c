#include "text/infill.h"

#include <new>

#include "text/tokenizer_impl.h"

namespace narrows {

Result<ChatPrompt> infill_prompt(const Tokenizer& tokenizer, const std::string& before,
                                 const std::string& behind, const std::string& begun) {
  const auto& impl = Access::impl(tokenizer);
  const llama_token marks[] = {llama_vocab_fim_pre(impl.vocab), llama_vocab_fim_suf(impl.vocab),
                               llama_vocab_fim_mid(impl.vocab)};
  for (const llama_token mark : marks) {
    if (mark == LLAMA_TOKEN_NULL)
      return {StatusCode::unsupported, "the model's vocabulary has no tokens for filling in the middle"};
  }
  try {
    const std::string* const texts[] = {&before, &behind, &begun};
    ChatPrompt prompt;
    for (size_t i = 0; i < 3; ++i) {
      prompt.text += llama_vocab_get_text(impl.vocab, marks[i]);
      for (const size_t at : impl.special.breaks_for(*texts[i]))
        prompt.breaks.push_back(prompt.text.size() + at);
      prompt.text += *texts[i];
    }
    return prompt;
  } catch (const std::bad_alloc&) {
    return {StatusCode::out_of_memory, "no memory for the prompt"};
  }
}

}  // namespace narrows
