#include "server/answer.h"

#include <fmt/format.h>

#include <algorithm>

namespace narrows::server {

namespace {

/// An answer is read anew from its beginning, so that calls are told apart as its whole text says: as often
/// as it has grown by one part in so many.
constexpr size_t kReadingsOfAnAnswer = 64;

/// Moves `shown` on to `now`, where that goes on from it; what is new.
std::string advance_text(std::string& shown, const std::string& now) {
  if (now.size() <= shown.size() || now.compare(0, shown.size(), shown) != 0) return {};
  std::string more = now.substr(shown.size());
  shown = now;
  return more;
}

/// An end of the text that might have begun a call, which then did not come.
std::string held_back(const AnswerFormat& format, const std::string& text) {
  size_t longest = 0;
  for (const std::string& word : format.words) {
    for (size_t n = std::min(word.size() - 1, text.size()); n > longest; --n)
      if (text.compare(text.size() - n, n, word, 0, n) == 0) longest = n;
  }
  return text.substr(text.size() - longest);
}

}  // namespace

AnswerDelta Answer::add(const std::string& text) {
  if (format_ == nullptr) {
    shown_.content += text;
    return {{}, text, {}};
  }
  text_ += text;
  if (text_.size() - n_read_ < text_.size() / kReadingsOfAnAnswer) return {};
  n_read_ = text_.size();
  const Result<ChatMessage> now = format_->read(text_, true);
  return now.ok() ? advance(*now, false) : AnswerDelta();
}

AnswerDelta Answer::finish() {
  if (format_ == nullptr || text_.empty()) return {};
  Result<ChatMessage> now = format_->read(text_, false);
  if (!now.ok()) now = format_->read(text_, true);  // it was cut, or the model went astray
  if (now.ok() && now->tool_calls.empty()) {
    const std::string end = held_back(*format_, text_);
    if (!now->content.ends_with(end)) now->content += end;
  }
  if (now.ok() && (!now->content.empty() || !now->reasoning.empty() || !now->tool_calls.empty()))
    return advance(*now, true);
  if (!shown_.content.empty() || !shown_.reasoning.empty() || !shown_.tool_calls.empty()) return {};
  ChatMessage raw{"assistant", text_};
  return advance(raw, true);
}

AnswerDelta Answer::advance(const ChatMessage& now, bool last) {
  AnswerDelta delta;
  delta.reasoning = advance_text(shown_.reasoning, now.reasoning);
  delta.content = advance_text(shown_.content, now.content);
  for (size_t i = 0; i < now.tool_calls.size(); ++i) {
    const ToolCall& call = now.tool_calls[i];
    // A name may grow until its arguments begin.
    const bool begins = i >= shown_.tool_calls.size();
    if (begins && call.name.empty()) break;
    if (begins && call.arguments.empty() && i + 1 == now.tool_calls.size() && !last) break;
    AnswerDelta::Call out;
    out.index = i;
    out.begins = begins;
    if (begins) {
      out.id = !call.id.empty() ? call.id : fmt::format("call_{}_{}", id_, i);
      out.name = call.name;
      shown_.tool_calls.push_back({out.id, out.name, {}});
    }
    out.arguments = advance_text(shown_.tool_calls[i].arguments, call.arguments);
    // A call without arguments is one with none.
    if (last && shown_.tool_calls[i].arguments.empty()) out.arguments = shown_.tool_calls[i].arguments = "{}";
    if (begins || !out.arguments.empty()) delta.calls.push_back(std::move(out));
  }
  return delta;
}

}  // namespace narrows::server
