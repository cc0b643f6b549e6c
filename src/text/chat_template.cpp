// Conversations through the file's Jinja template, by llama.cpp's common chat library: the prompt, and with
// tools or thinking the way to read the answer. Control tokens that clients write stay text (chat_marks.h).
#include <fmt/format.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <new>

#include "base/utf8.h"
#include "text/answer_parser.h"
#include "text/chat_marks.h"
#include "text/chat_request.h"
#include "text/llama_log.h"
#include "text/tokenizer_impl.h"

namespace narrows {
namespace {

using Impl = Access::TokenizerImpl;

/// Used when the file carries no template; the same text as llama.cpp's own fallback.
std::string chatml(const ChatRequest& request) {
  std::string text;
  for (const ChatMessage& message : request.messages) {
    text += "<|im_start|>" + message.role + "\n" + message.content + "<|im_end|>\n";
  }
  if (request.add_generation_prompt) text += "<|im_start|>assistant\n";
  return text;
}

enum class Purpose {
  prompt,      ///< its text alone, by nothing but the template
  whole_text,  ///< its text as llama.cpp's handlers of known templates change it
  format,      ///< how the answer is read
};

/// Arguments that are no JSON where the template wants objects: as a string, which is what they are.
std::string as_json(const std::string& arguments) {
  const common_json parsed = common_json::parse_no_throw(arguments);
  return parsed.is_discarded() ? common_json::make(arguments).dump() : arguments;
}

std::vector<common_chat_msg> messages_of(const ChatRequest& request, bool object_arguments) {
  std::vector<common_chat_msg> messages;
  for (const ChatMessage& message : request.messages) {
    common_chat_msg& added = messages.emplace_back();
    added.role = message.role;
    added.content = message.content;
    added.reasoning_content = message.reasoning;
    added.tool_call_id = message.tool_call_id;
    added.tool_name = message.tool_name;
    for (const ToolCall& call : message.tool_calls)
      added.tool_calls.push_back(
          {call.name, object_arguments ? as_json(call.arguments) : call.arguments, call.id});
  }
  return messages;
}

common_chat_params apply(const Impl& impl, const ChatRequest& request, Purpose purpose) {
  common_chat_templates_inputs inputs;
  inputs.messages = messages_of(request, impl.template_caps.object_arguments);
  inputs.add_generation_prompt = request.add_generation_prompt;
  inputs.chat_template_kwargs = impl.template_arguments;
  for (const auto& [name, value] : request.arguments) inputs.chat_template_kwargs[name] = value;
  // Without a parser, which costs a study of the template each time.
  inputs.force_pure_content = purpose == Purpose::prompt;
  if (request.continue_final) inputs.continue_final_message = COMMON_CHAT_CONTINUATION_AUTO;
  inputs.enable_thinking = request.enable_thinking.value_or(impl.enable_thinking);
  if (request.split_reasoning) inputs.reasoning_format = COMMON_REASONING_FORMAT_DEEPSEEK;
  inputs.parallel_tool_calls = request.parallel_tool_calls.value_or(impl.template_caps.parallel_calls);
  const bool format = purpose == Purpose::format;
  for (const ChatTool& tool : request.tools) {
    if (format && !request.forced_tool.empty() && tool.name != request.forced_tool) continue;
    inputs.tools.push_back({tool.name, tool.description, format ? tool.plain_parameters : tool.parameters});
  }
  // The prompt does not depend on the choice, and schemas as clients write them are not converted.
  inputs.tool_choice = !format || request.tool_choice == ToolChoice::none ? COMMON_CHAT_TOOL_CHOICE_NONE
                       : request.tool_choice == ToolChoice::required      ? COMMON_CHAT_TOOL_CHOICE_REQUIRED
                                                                          : COMMON_CHAT_TOOL_CHOICE_AUTO;
  // llama.cpp tells the template the date by std::localtime(), whose result all threads of a process share.
  static std::mutex localtime_mutex;
  const std::lock_guard<std::mutex> lock(localtime_mutex);
  return common_chat_templates_apply(impl.templates.get(), inputs);
}

/// The line of a grammar that defines a rule; npos if there is none.
struct Line {
  size_t begin = std::string::npos;
  size_t end = 0;
};
Line rule_line(const std::string& gbnf, const std::string& rule) {
  const std::string head = rule + " ::= ";
  size_t at = gbnf.compare(0, head.size(), head) == 0 ? 0 : gbnf.find("\n" + head);
  if (at == std::string::npos) return {};
  if (at > 0) ++at;
  return {at, std::min(gbnf.find('\n', at), gbnf.size())};
}

/// llama.cpp's grammars repeat calls that stand in brackets of their own whatever was asked for.
void forbid_more_calls(std::string& gbnf) {
  const Line line = rule_line(gbnf, "tool-calls");
  if (line.begin != std::string::npos && line.end > 2 && gbnf.compare(line.end - 2, 2, ")+") == 0)
    gbnf.erase(line.end - 1, 1);
}

/// Where all that begins a call is words, in a free answer's params.
bool begins_with_words(const common_chat_params& params) {
  const auto is_word = [](const common_grammar_trigger& t) {
    return t.type == COMMON_GRAMMAR_TRIGGER_TYPE_WORD;
  };
  return !params.grammar.empty() && params.grammar_lazy && !params.grammar_triggers.empty() &&
         std::all_of(params.grammar_triggers.begin(), params.grammar_triggers.end(), is_word);
}

/// How the answer is written and read.
std::shared_ptr<const AnswerFormat> format_of(const Impl& impl, const ChatRequest& request) {
  common_chat_params params = apply(impl, request, Purpose::format);
  bool from_call = false;
  if (request.tool_choice == ToolChoice::required && !request.continue_final && !params.supports_thinking) {
    // llama.cpp lets any text come before a required call, which a small model may never end. A free answer's
    // grammar begins with the calls: so does this one then.
    ChatRequest free = request;
    free.tool_choice = ToolChoice::automatic;
    const common_chat_params calls = apply(impl, free, Purpose::format);
    const Line from = rule_line(calls.grammar, "root"), to = rule_line(params.grammar, "root");
    from_call = begins_with_words(calls) && from.begin != std::string::npos && to.begin != std::string::npos;
    if (from_call)
      params.grammar.replace(to.begin, to.end - to.begin, calls.grammar, from.begin, from.end - from.begin);
  }
  if (!request.parallel_tool_calls.value_or(impl.template_caps.parallel_calls))
    forbid_more_calls(params.grammar);
  auto format = make_answer_format(impl.vocab, params, request.split_reasoning, request.continue_final);
  if (from_call) format->grammar_prefix.clear();
  return format;
}

/// Whether the template has a place for thinking; found out at the first chat.
bool thinks(const Impl& impl) {
  std::call_once(impl.thinks_once, [&] {
    try {
      ChatRequest any;
      any.messages = {{"user", "a"}};
      impl.thinks = apply(impl, any, Purpose::whole_text).supports_thinking;
    } catch (const std::exception&) {
      impl.thinks = false;  // it takes plain chats only, or refuses those too when they come
    }
  });
  return impl.thinks;
}

bool has_calls(const ChatRequest& request) {
  return std::any_of(request.messages.begin(), request.messages.end(),
                     [](const ChatMessage& m) { return !m.tool_calls.empty(); });
}

Status too_deep(const std::string& what) {
  return {StatusCode::invalid_argument,
          fmt::format("{} are nested deeper than {} levels", what, kMaxChatJsonDepth)};
}

Status check(const Impl& impl, const ChatRequest& request) {
  const bool wants_tools = !request.tools.empty() || has_calls(request);
  if (impl.has_template && !impl.templates) {
    return {StatusCode::unsupported, "the model's chat template cannot be read (" + impl.template_error +
                                         "); give the prompt as raw text"};
  }
  if (wants_tools && !impl.has_template)
    return {StatusCode::invalid_argument, "the model's file has no chat template, which tools need"};
  if (!request.tools.empty() && !impl.template_caps.tools)
    return {
        StatusCode::invalid_argument,
        "the model's chat template knows no tools; leave tools out or serve a model that was made for them"};
  for (const ChatMessage& message : request.messages) {
    for (const ToolCall& call : message.tool_calls)
      if (json_depth(call.arguments) > kMaxChatJsonDepth) return too_deep("the arguments of a tool call");
  }
  for (const ChatTool& tool : request.tools)
    if (json_depth(tool.parameters) > kMaxChatJsonDepth) return too_deep("the parameters of a tool");
  for (const auto& [name, value] : request.arguments)
    if (json_depth(value) > kMaxChatJsonDepth) return too_deep("arguments of the template");
  return {};
}

/// A message that is continued comes behind the prompt for it; the handlers of known templates know better.
struct Continued {
  ChatRequest request;
  std::string begun;
};
Continued without_last(const ChatRequest& request) {
  Continued c{request, {}};
  c.request.continue_final = false;
  c.request.add_generation_prompt = true;
  c.begun = c.request.messages.back().content;
  c.request.messages.pop_back();
  return c;
}

Result<std::string> render(const Impl& impl, const ChatRequest& request, Purpose purpose) {
  if (request.continue_final && purpose == Purpose::prompt) {
    const Continued c = without_last(request);
    Result<std::string> text = render(impl, c.request, purpose);
    return text.ok() ? *text + c.begun : text;
  }
  if (!impl.has_template) return chatml(request);
  return apply(impl, request, purpose).prompt;
}

/// The prompt with breaks where clients have written control tokens.
Result<ChatPrompt> guarded_prompt(const Impl& impl, ChatRequest request, Purpose purpose) {
  const bool names_tokens = make_plain(request, impl.special);
  const Result<std::string> plain = render(impl, request, purpose);
  if (!plain.ok()) return plain.status();
  if (!names_tokens) return ChatPrompt{*plain, {}};
  const std::string mark = unused_mark(request, *plain);
  if (mark.empty()) {
    return {StatusCode::invalid_argument,
            "the messages hold control tokens and all of U+FDD0 to U+FDEF: leave one of these out"};
  }
  const auto render_marked = [&](bool assistant_too) -> Result<ChatPrompt> {
    const Result<std::string> rendered =
        render(impl, with_marks(request, impl.special, mark, assistant_too), purpose);
    if (!rendered.ok()) return rendered.status();
    return without_marks(*rendered, mark);
  };
  // Marks may keep a template from finding what it looks for, an assistant's end of thinking, say, and the
  // text tells. Then an assistant's tokens, which its model wrote, stay whole.
  Result<ChatPrompt> prompt = render_marked(true);
  if (prompt.ok() && prompt->text != *plain) prompt = render_marked(false);
  return prompt;
}

}  // namespace

int json_depth(std::string_view json) {
  int depth = 0, deepest = 0;
  bool quoted = false;
  for (size_t i = 0; i < json.size(); ++i) {
    const char c = json[i];
    if (quoted && c == '\\') {
      ++i;
    } else if (c == '"') {
      quoted = !quoted;
    } else if (!quoted && (c == '{' || c == '[')) {
      deepest = std::max(deepest, ++depth);
    } else if (!quoted && (c == '}' || c == ']')) {
      --depth;
    }
  }
  return deepest;
}

std::string reason_in(std::string_view text) {
  constexpr std::string_view kMark = "\nError: ";
  if (const size_t mark = text.rfind(kMark); mark != std::string_view::npos)
    text.remove_prefix(mark + kMark.size());
  text.remove_prefix(std::min(text.find_first_not_of(" \n"), text.size()));
  return quote(text.substr(0, text.find('\n')), 200);
}

/// Throws if it cannot be read. source: empty for the file's own.
void Tokenizer::Impl::use_template(const std::string& source) {
  templates = common_chat_templates_init(model.get(), source);
  const auto caps = common_chat_templates_get_caps(templates.get());
  const auto can = [&](const char* what) { return caps.count(what) > 0 && caps.at(what); };
  template_caps.tools = can("supports_tools");
  template_caps.parallel_calls = can("supports_parallel_tool_calls");
  template_caps.effort = can("supports_reasoning_effort");
  template_caps.object_arguments = can("supports_object_arguments");
}

void Tokenizer::Impl::read_template() {
  const char* source = llama_model_chat_template(model.get(), nullptr);
  has_template = source != nullptr;
  if (!has_template) return;
  try {
    use_template("");
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
    use_template(options.source);
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

bool knows_tools(const Tokenizer& tokenizer) { return Access::impl(tokenizer).template_caps.tools; }

Result<PreparedChat> prepare_chat(const Tokenizer& tokenizer, const ChatRequest& request) {
  const auto& impl = Access::impl(tokenizer);
  const LlamaAbortGuard guard;
  try {
    if (Status s = check(impl, request); !s.ok()) return s;
    const bool calls = !request.tools.empty() && request.tool_choice != ToolChoice::none;
    const bool parsed = impl.has_template && (calls || (request.split_reasoning && thinks(impl)));
    const bool plain = !impl.has_template || (!parsed && request.tools.empty());
    PreparedChat prepared;
    Result<ChatPrompt> prompt = guarded_prompt(impl, request, plain ? Purpose::prompt : Purpose::whole_text);
    if (!prompt.ok()) return prompt.status();
    prepared.prompt = std::move(*prompt);
    prepared.knows_effort = impl.template_caps.effort;
    if (parsed) prepared.format = format_of(impl, request);
    return prepared;
  } catch (const std::bad_alloc&) {
    return Status(StatusCode::out_of_memory, "no memory to apply the chat template");
  } catch (const std::exception& error) {
    return Status(StatusCode::invalid_argument,
                  "the model's chat template refuses the messages: " + reason_in(error.what()));
  }
}

Result<ChatPrompt> Tokenizer::apply_chat_template(std::span<const ChatMessage> messages,
                                                  bool add_generation_prompt) const {
  try {
    ChatRequest request;
    request.messages.assign(messages.begin(), messages.end());
    request.add_generation_prompt = add_generation_prompt;
    request.split_reasoning = false;
    Result<PreparedChat> prepared = prepare_chat(*this, request);
    if (!prepared.ok()) return prepared.status();
    return std::move(prepared->prompt);
  } catch (const std::bad_alloc&) {
    return {StatusCode::out_of_memory, "no memory to apply the chat template"};
  }
}

}  // namespace narrows
