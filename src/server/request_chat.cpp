// Conversations and tools, as OpenAI's clients write them.
#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "base/utf8.h"
#include "sample/grammar.h"
#include "server/request_parts.h"

namespace narrows::server {

namespace {

constexpr size_t kMaxId = 512;
constexpr size_t kMaxToolName = 128;
constexpr size_t kAnyLength = std::string::npos;  ///< the body has its own limit

/// Text of a message: a string, or an array of parts of type text.
std::string message_content(const Json& message, Fields& f) {
  f.pass("content");
  const auto found = message.find("content");
  if (found == message.end() || found->is_null()) return {};
  if (found->is_string()) return found->get<std::string>();
  if (!found->is_array()) {
    f.fail("content", fmt::format("must be a string or an array of parts, not {}", kind_of(*found)));
    return {};
  }
  std::string text;
  for (const Json& part : *found) {
    const auto type = part.is_object() ? part.find("type") : part.end();
    const bool is_text = part.is_object() && type != part.end() && type->is_string() &&
                         (*type == "text" || *type == "refusal") && part.contains(type->get<std::string>()) &&
                         part[type->get<std::string>()].is_string();
    if (!is_text) {
      f.fail("content", "holds a part that is not text; this server reads text only");
      return {};
    }
    text += part[type->get<std::string>()].get<std::string>();
  }
  return text;
}

std::vector<ToolCall> read_calls(Fields& m, const std::string& path) {
  std::vector<ToolCall> calls;
  const Json* list = m.array("tool_calls");
  if (list == nullptr) return calls;
  if (list->size() > kMaxTools) m.fail("tool_calls", fmt::format("has more than {} items", kMaxTools));
  for (size_t i = 0; i < list->size() && m.ok(); ++i) {
    const std::string here = fmt::format("{}.tool_calls[{}]", path, i);
    if (!(*list)[i].is_object()) {
      m.fail("tool_calls", fmt::format("holds {}, it must hold objects only", kind_of((*list)[i])));
      break;
    }
    Fields c((*list)[i], here);
    const std::string type = c.text("type", 64).value_or("function");
    if (type != "function") c.fail("type", "must be function");
    c.pass("index");
    ToolCall call;
    call.id = c.text("id", kMaxId).value_or("");
    const Json* function = c.object("function");
    if (function == nullptr) {
      c.fail("function", "is missing");
    } else {
      Fields g(*function, here + ".function");
      call.name = g.text("name", kMaxToolName).value_or("");
      if (call.name.empty()) g.fail("name", "is missing");
      const Json* arguments = g.find("arguments");
      // Some clients send them as the object that they are.
      call.arguments = arguments != nullptr && arguments->is_object()
                           ? arguments->dump()
                           : g.text("arguments", kAnyLength).value_or("{}");
      if (json_depth(call.arguments) > kMaxJsonDepth)
        g.fail("arguments", fmt::format("are nested deeper than {} levels", kMaxJsonDepth));
      c.take(g);
    }
    m.take(c);
    calls.push_back(std::move(call));
  }
  return calls;
}

bool is_tool_name(const std::string& name) {
  return std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
           c == '-' || c == '.' || c == ':' || c == '/';
  });
}

void read_choice(Fields& f, ChatRequest& chat) {
  const Json* value = f.find("tool_choice");
  if (value == nullptr) return;
  if (value->is_string()) {
    const auto& text = value->get_ref<const std::string&>();
    if (text == "none") {
      chat.tool_choice = ToolChoice::none;
    } else if (text == "required") {
      chat.tool_choice = ToolChoice::required;
    } else if (text != "auto") {
      f.fail("tool_choice", "must be auto, none, required or a function");
    }
  } else if (value->is_object()) {
    Fields c(*value, "tool_choice");
    if (c.text("type", 64).value_or("") != "function") c.fail("type", "must be function");
    const Json* function = c.object("function");
    if (function == nullptr) {
      c.fail("function", "is missing");
    } else {
      Fields g(*function, "tool_choice.function");
      chat.forced_tool = g.text("name", kMaxToolName).value_or("");
      if (chat.forced_tool.empty()) g.fail("name", "is missing");
      c.take(g);
    }
    chat.tool_choice = ToolChoice::required;
    f.take(c);
  } else {
    f.fail("tool_choice", fmt::format("must be a string or an object, not {}", kind_of(*value)));
  }
}

}  // namespace

void name_results(std::vector<ChatMessage>& messages) {
  for (size_t i = 0; i < messages.size(); ++i) {
    if (messages[i].role != "tool" || !messages[i].tool_name.empty()) continue;
    // Of the assistant's message before, which the results of all its calls follow.
    size_t j = i;
    while (j > 0 && messages[j].role == "tool") --j;
    for (const ToolCall& call : messages[j].tool_calls)
      if (call.id == messages[i].tool_call_id) messages[i].tool_name = call.name;
  }
}

std::vector<ChatMessage> read_messages(Fields& f) {
  const Json* list = f.array("messages");
  if (list == nullptr) {
    f.fail("messages", "is missing");
    return {};
  }
  if (list->empty() || list->size() > kMaxMessages) {
    f.fail("messages", fmt::format("has {} items, it must have 1 to {}", list->size(), kMaxMessages));
    return {};
  }
  std::vector<ChatMessage> messages;
  for (size_t i = 0; i < list->size() && f.ok(); ++i) {
    const Json& item = (*list)[i];
    const std::string path = fmt::format("messages[{}]", i);
    if (!item.is_object()) {
      f.fail("messages", fmt::format("holds {}, it must hold objects only", kind_of(item)));
      break;
    }
    Fields m(item, path);
    ChatMessage message;
    message.role = m.text("role", 64).value_or("");
    if (message.role == "developer") message.role = "system";  // the newer name of the same
    if (m.ok() && message.role != "system" && message.role != "user" && message.role != "assistant" &&
        message.role != "tool")
      m.fail("role", "must be system, user, assistant or tool");
    message.content = message_content(item, m);
    const std::string name = m.text("name", kMaxId).value_or("");
    if (message.role == "assistant") {
      message.tool_calls = read_calls(m, path);
      message.reasoning = m.text("reasoning_content", kAnyLength).value_or("");
      for (const char* field : {"refusal", "annotations", "audio", "function_call", "reasoning",
                                "reasoning_details", "provider_specific_fields"})
        m.pass(field);
    } else if (m.has("tool_calls")) {
      m.fail("tool_calls", "belong to the assistant");
    }
    if (message.role == "tool") {
      message.tool_call_id = m.text("tool_call_id", kMaxId).value_or("");
      message.tool_name = name;
    }
    f.take(m);
    messages.push_back(std::move(message));
  }
  name_results(messages);
  return messages;
}

namespace {

/// One tool; `path` names it in messages. Checks its name and its schema.
void add_tool(Fields& f, const std::string& path, ChatTool tool, ChatRequest& chat, SchemaWork& work) {
  const auto fail = [&](const char* what, const std::string& why) {
    f.fail("tools", fmt::format("are wrong: {}.{} {}", path, what, why));
  };
  if (tool.name.empty()) return fail("name", "is missing");
  if (tool.name.size() > kMaxToolName || !is_tool_name(tool.name))
    return fail("name", fmt::format("must have at most {} letters, digits, and _ - . : /, not {}",
                                    kMaxToolName, quote(tool.name, 60)));
  if (tool.parameters.empty()) tool.parameters = R"({"type":"object","properties":{}})";
  const Result<std::string> plain = tool_parameters(tool.parameters, work);
  if (!plain.ok()) return fail("parameters", "cannot be used: " + plain.status().message());
  tool.plain_parameters = *plain;
  chat.tools.push_back(std::move(tool));
}

}  // namespace

void check_tools(Fields& f, const ChatRequest& chat) {
  // The rules of a grammar know letters, digits and hyphens only.
  std::set<std::string> names;
  for (const ChatTool& tool : chat.tools) {
    std::string rule = tool.name;
    for (char& c : rule)
      if (c == '_' || c == '.' || c == ':' || c == '/') c = '-';
    if (!names.insert(rule).second)
      f.fail("tools", fmt::format("have two of the name {}, or of names too much alike", quote(tool.name)));
  }
  if (chat.tools.empty() && chat.tool_choice == ToolChoice::required)
    f.fail("tool_choice", "asks for a call, but there are no tools");
  if (chat.forced_tool.empty()) return;
  const bool there = std::any_of(chat.tools.begin(), chat.tools.end(),
                                 [&](const ChatTool& tool) { return tool.name == chat.forced_tool; });
  if (!there)
    f.fail("tool_choice", fmt::format("names {}, which no tool is called", quote(chat.forced_tool)));
}

void read_tool_list(Fields& f, ChatRequest& chat, const ReadToolFn& read) {
  const Json* list = f.array("tools");
  if (list != nullptr && list->size() > kMaxTools)
    f.fail("tools", fmt::format("has {} items, at most {} are allowed", list->size(), kMaxTools));
  SchemaWork work;
  for (size_t i = 0; list != nullptr && i < list->size() && f.ok(); ++i) {
    std::string path = fmt::format("tools[{}]", i);
    if (!(*list)[i].is_object()) {
      f.fail("tools", fmt::format("holds {}, it must hold objects only", kind_of((*list)[i])));
      break;
    }
    Fields t((*list)[i], path);
    ChatTool tool;
    read(t, tool, path);
    f.take(t);
    if (f.ok()) add_tool(f, path, std::move(tool), chat, work);
  }
}

void read_tools(Fields& f, ChatRequest& chat) {
  read_tool_list(f, chat, [](Fields& t, ChatTool& tool, std::string& path) {
    if (t.text("type", 64).value_or("function") != "function") t.fail("type", "must be function");
    const Json* function = t.object("function");
    if (function == nullptr) {
      t.fail("function", "is missing");
    } else {
      path += ".function";
      Fields g(*function, path);
      tool.name = g.text("name", kMaxToolName).value_or("");
      tool.description = g.text("description", kMaxGrammarBytes).value_or("");
      if (const Json* schema = g.object("parameters")) tool.parameters = schema->dump();
      g.pass("strict");  // arguments follow their schema, whether asked for or not
      t.take(g);
    }
  });
  read_choice(f, chat);
  if (const auto parallel = f.boolean("parallel_tool_calls")) chat.parallel_tool_calls = *parallel;
  if (f.ok()) check_tools(f, chat);
}

void read_template_fields(Fields& f, GenerationRequest& r) {
  ChatRequest& chat = r.conversation;
  if (const Json* arguments = f.object("chat_template_kwargs")) {
    for (const auto& [name, value] : arguments->items()) {
      if (name == "messages" || name == "tools" || name == "add_generation_prompt" || name == "bos_token" ||
          name == "eos_token") {
        f.fail("chat_template_kwargs", "cannot set " + name);
      } else if (name == "enable_thinking" && value.is_boolean()) {
        chat.enable_thinking = value.get<bool>();
      }
      chat.arguments[name] = value.dump();
    }
  }
  if (const auto effort = f.text("reasoning_effort", 32)) {
    if (*effort == "none") {
      chat.enable_thinking = false;
    } else if (*effort == "minimal" || *effort == "low" || *effort == "medium" || *effort == "high" ||
               *effort == "xhigh") {
      chat.arguments["reasoning_effort"] = Json(*effort).dump();
      r.reasoning_effort = *effort;
    } else {
      f.fail("reasoning_effort", "must be none, minimal, low, medium, high or xhigh");
    }
  }
  if (const auto format = f.text("reasoning_format", 32)) {
    chat.split_reasoning = *format != "none";
    if (*format != "none" && *format != "auto" && *format != "deepseek")
      f.fail("reasoning_format", "must be none, auto or deepseek");
  }
  const auto generation = f.boolean("add_generation_prompt");
  const Json* continues = f.find("continue_final_message");
  const bool ends_with_assistant = !chat.messages.empty() && chat.messages.back().role == "assistant" &&
                                   chat.messages.back().tool_calls.empty();
  if (continues != nullptr && !continues->is_boolean()) {
    f.fail("continue_final_message", fmt::format("must be true or false, not {}", kind_of(*continues)));
  } else if (continues != nullptr && continues->get<bool>()) {
    if (generation.value_or(false))
      f.fail("continue_final_message", "and add_generation_prompt cannot be given together");
    if (!ends_with_assistant)
      f.fail("continue_final_message", "needs a last message of the assistant, without tool calls");
    chat.continue_final = true;
  } else if (continues == nullptr && !generation) {
    chat.continue_final = ends_with_assistant;
  }
  chat.add_generation_prompt = generation.value_or(true) || chat.continue_final;
}

}  // namespace narrows::server
