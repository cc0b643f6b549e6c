#include "text/chat_marks.h"

#include <json.h>

#include <algorithm>

namespace narrows {

namespace {

enum class Kind { text, json, own };  ///< own: an assistant's words

/// Calls f(text, kind) for all that clients write.
template <class Request, class F>
void each_text(Request& request, F&& f) {
  for (auto& m : request.messages) {
    f(m.content, m.role == "assistant" ? Kind::own : Kind::text);
    f(m.reasoning, Kind::own);
    f(m.tool_call_id, Kind::text);
    f(m.tool_name, Kind::text);
    for (auto& call : m.tool_calls) {
      f(call.id, Kind::text);
      f(call.name, Kind::text);
      f(call.arguments, Kind::json);
    }
  }
  for (auto& tool : request.tools) {
    f(tool.description, Kind::text);
    f(tool.parameters, Kind::json);
  }
  for (auto& [name, value] : request.arguments) f(value, Kind::json);
}

/// Marks a text or the strings and keys of a tree, and remembers whether there was anything to mark.
class Marking {
 public:
  Marking(const SpecialTokens& special, const std::string& mark) : special_(special), mark_(mark) {}

  bool any() const { return any_; }

  std::string text(const std::string& plain) {
    const std::vector<size_t> at = special_.breaks_for(plain);
    if (at.empty()) return plain;
    any_ = true;
    std::string marked;
    size_t done = 0;
    for (const size_t b : at) {
      marked.append(plain, done, b - done).append(mark_);
      done = b;
    }
    return marked.append(plain, done);
  }

  common_json tree(const common_json& plain) {
    if (plain.is_string()) return common_json::make(text(plain.get<std::string>()));
    if (plain.is_array()) {
      common_json list = common_json::array();
      for (const auto& item : plain) list.push_back(common_json_value(tree(item)));
      return list;
    }
    if (!plain.is_object()) return plain;
    common_json object = common_json::object();
    for (const auto& [key, value] : plain.items()) object[text(key)] = tree(value);
    return object;
  }

 private:
  const SpecialTokens& special_;
  const std::string& mark_;
  bool any_ = false;
};

/// Of JSON, which may be none.
std::string marked_json(const std::string& plain, Marking& marking) {
  const common_json parsed = common_json::parse_no_throw(plain);
  if (parsed.is_discarded()) return marking.text(plain);
  const common_json marked = marking.tree(parsed);
  return marking.any() ? marked.dump() : marking.text(plain);
}

}  // namespace

bool make_plain(ChatRequest& request, const SpecialTokens& special) {
  bool any = false;
  const std::string no_mark;
  each_text(request, [&](std::string& text, Kind kind) {
    Marking marking(special, no_mark);
    std::string plain = kind == Kind::json ? marked_json(text, marking) : marking.text(text);
    if (marking.any()) text = std::move(plain);
    any = any || marking.any();
  });
  return any;
}

ChatRequest with_marks(const ChatRequest& request, const SpecialTokens& special, const std::string& mark,
                       bool assistant_too) {
  ChatRequest marked = request;
  each_text(marked, [&](std::string& text, Kind kind) {
    Marking marking(special, mark);
    if (kind == Kind::json) {
      text = marked_json(text, marking);
    } else if (kind == Kind::text || assistant_too) {
      text = marking.text(text);
    }
  });
  return marked;
}

std::string unused_mark(const ChatRequest& request, const std::string& rendered) {
  std::vector<std::string> marks;
  for (uint32_t c = 0xFDD0; c <= 0xFDEF; ++c)
    marks.push_back({static_cast<char>(0xEF), static_cast<char>(0x80 | (c >> 6 & 0x3F)),
                     static_cast<char>(0x80 | (c & 0x3F))});
  for (std::string& mark : marks) {
    bool used = rendered.find(mark) != std::string::npos;
    each_text(request,
              [&](const std::string& text, Kind) { used = used || text.find(mark) != std::string::npos; });
    if (!used) return mark;
  }
  return {};
}

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

}  // namespace narrows
