// Conversations through the file's Jinja template. Messages are not trusted: what looks like a control token
// in them is marked before the template is applied, and the marks say afterwards where it went.
#include <fmt/format.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <new>

#include "base/utf8.h"
#include "text/llama_log.h"
#include "text/tokenizer_impl.h"

namespace narrows {
namespace {

/// Used when the file carries no template; the same text as llama.cpp's own fallback.
std::string chatml(std::span<const ChatMessage> messages, bool add_generation_prompt) {
  std::string text;
  for (const ChatMessage& message : messages) {
    text += "<|im_start|>" + message.role + "\n" + message.content + "<|im_end|>\n";
  }
  if (add_generation_prompt) text += "<|im_start|>assistant\n";
  return text;
}

/// A noncharacter of Unicode that stands neither in the messages nor in `rendered`; "" if all do.
std::string unused_mark(std::span<const ChatMessage> messages, const std::string& rendered) {
  std::vector<std::string> marks;
  for (uint32_t c = 0xFDD0; c <= 0xFDEF; ++c)
    marks.push_back({static_cast<char>(0xEF), static_cast<char>(0x80 | (c >> 6 & 0x3F)),
                     static_cast<char>(0x80 | (c & 0x3F))});
  for (std::string& mark : marks) {
    const bool used = std::any_of(messages.begin(), messages.end(), [&](const ChatMessage& m) {
      return m.content.find(mark) != std::string::npos;
    });
    if (!used && rendered.find(mark) == std::string::npos) return mark;
  }
  return {};
}

std::string with_marks(const std::string& text, const std::vector<size_t>& at, const std::string& mark) {
  std::string marked;
  size_t done = 0;
  for (const size_t b : at) {
    marked.append(text, done, b - done).append(mark);
    done = b;
  }
  return marked.append(text, done);
}

/// The text without its marks, which become breaks.
ChatPrompt without_marks(const std::string& marked, const std::string& mark) {
  ChatPrompt prompt;
  size_t done = 0;
  for (size_t at = marked.find(mark); at != std::string::npos; at = marked.find(mark, done)) {
    prompt.text.append(marked, done, at - done);
    prompt.breaks.push_back(prompt.text.size());
    done = at + mark.size();
  }
  prompt.text.append(marked, done);
  return prompt;
}

}  // namespace

std::string reason_in(std::string_view text) {
  constexpr std::string_view kMark = "\nError: ";
  if (const size_t mark = text.rfind(kMark); mark != std::string_view::npos)
    text.remove_prefix(mark + kMark.size());
  text.remove_prefix(std::min(text.find_first_not_of(" \n"), text.size()));
  return quote(text.substr(0, text.find('\n')), 200);
}

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

Status Tokenizer::Impl::take(const ChatTemplateOptions& options) {
  template_arguments = options.arguments;
  if (const auto thinking = template_arguments.find("enable_thinking");
      thinking != template_arguments.end()) {
    if (thinking->second != "true" && thinking->second != "false")
      return {StatusCode::invalid_argument,
              fmt::format("the chat template's enable_thinking is true or false, not {}",
                          quote(thinking->second))};
    enable_thinking = thinking->second == "true";
  }
  if (options.source.empty()) return {};
  try {
    templates = common_chat_templates_init(model.get(), options.source);
    has_template = true;
    template_error.clear();
    return {};
  } catch (const std::exception&) {
    std::string reason = "no reason given";
    try {  // as in read_template()
      const common_chat_template again(options.source, "", "");
    } catch (const std::exception& error) {
      reason = reason_in(error.what());
    }
    return {StatusCode::invalid_argument, fmt::format("the chat template cannot be read ({})", reason)};
  }
}

Result<std::string> Tokenizer::render(std::span<const ChatMessage> messages,
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
    inputs.enable_thinking = impl_->enable_thinking;
    inputs.chat_template_kwargs = impl_->template_arguments;
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

Result<ChatPrompt> Tokenizer::apply_chat_template(std::span<const ChatMessage> messages,
                                                  bool add_generation_prompt) const {
  try {
    Result<std::string> plain = render(messages, add_generation_prompt);
    if (!plain.ok()) return plain.status();
    std::vector<std::vector<size_t>> breaks;
    for (const ChatMessage& message : messages) breaks.push_back(impl_->special.breaks_for(message.content));
    if (std::all_of(breaks.begin(), breaks.end(), [](const auto& b) { return b.empty(); }))
      return ChatPrompt{std::move(plain).value(), {}};

    const std::string mark = unused_mark(messages, *plain);
    if (mark.empty()) {
      return {StatusCode::invalid_argument,
              "the messages hold control tokens and all of U+FDD0 to U+FDEF: leave one of these out"};
    }
    const auto render_marked = [&](bool assistant_too) -> Result<ChatPrompt> {
      std::vector<ChatMessage> marked(messages.begin(), messages.end());
      for (size_t i = 0; i < marked.size(); ++i) {
        if (assistant_too || marked[i].role != "assistant")
          marked[i].content = with_marks(marked[i].content, breaks[i], mark);
      }
      const Result<std::string> rendered = render(marked, add_generation_prompt);
      if (!rendered.ok()) return rendered.status();
      return without_marks(*rendered, mark);
    };
    // Marks may keep a template from finding what it looks for, an assistant's end of thinking, say, and the
    // text tells. Then an assistant's tokens, which its model wrote, stay whole.
    Result<ChatPrompt> prompt = render_marked(true);
    if (prompt.ok() && prompt->text != *plain) prompt = render_marked(false);
    return prompt;
  } catch (const std::bad_alloc&) {
    return {StatusCode::out_of_memory, "no memory to apply the chat template"};
  }
}

}  // namespace narrows
