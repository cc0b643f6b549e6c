#include "server/request_frame.h"

#include <algorithm>
#include <charconv>
#include <optional>

namespace narrows::server {

namespace {

constexpr std::string_view kLineEnd = "\r\n";
constexpr std::string_view kHeadEnd = "\r\n\r\n";
constexpr size_t kMaxChunkLine = 1024;
constexpr size_t kMaxTrailer = 8192;

std::string lower(std::string_view text) {
  std::string out(text);
  for (char& c : out) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  return out;
}

std::string_view trimmed(std::string_view text) {
  const auto blank = [](char c) { return c == ' ' || c == '\t'; };
  while (!text.empty() && blank(text.front())) text.remove_prefix(1);
  while (!text.empty() && blank(text.back())) text.remove_suffix(1);
  return text;
}

/// The whole text is a number that fits.
std::optional<size_t> number(std::string_view text, int base) {
  size_t n = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), n, base);
  if (text.empty() || error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return n;
}

}  // namespace

RequestFrame::State RequestFrame::look(std::string_view bytes) {
  if (state_ == State::head) {
    const size_t at = bytes.find(kHeadEnd, seen_);
    if ((at == std::string_view::npos ? bytes.size() : at) > kMaxHead) return state_ = State::head_too_large;
    if (at == std::string_view::npos) {
      seen_ = bytes.size() < kHeadEnd.size() ? 0 : bytes.size() - (kHeadEnd.size() - 1);
      return state_;
    }
    end_ = at + kHeadEnd.size();
    state_ = read_head(bytes.substr(0, at));
  }
  if (state_ == State::body) {
    if (chunked_) {
      state_ = look_for_chunks(bytes);
    } else if (bytes.size() >= end_) {
      state_ = State::whole;
    }
  }
  return state_;
}

/// The head without the empty line. end_ is where the body begins; on return, where a body of known length
/// ends.
RequestFrame::State RequestFrame::read_head(std::string_view head) {
  size_t at = std::min(head.find(kLineEnd), head.size());
  const std::string_view line = head.substr(0, at);
  const size_t space = std::min(line.find(' '), line.size());
  method_ = line.substr(0, space);
  const std::string_view target = line.substr(std::min(space + 1, line.size()));
  path_ = target.substr(0, target.find_first_of(" ?"));

  std::optional<size_t> length;
  bool odd = false, has_host = false;
  size_t n_fields = 0;
  while (at < head.size()) {
    at += kLineEnd.size();
    const size_t line_end = std::min(head.find(kLineEnd, at), head.size());
    const std::string_view field = head.substr(at, line_end - at);
    at = line_end;
    if (field.size() > kMaxLine || ++n_fields > kMaxFields) return State::head_too_large;
    const size_t colon = field.find(':');
    if (colon == std::string_view::npos) continue;
    std::string name = lower(field.substr(0, colon));
    const std::string_view value = trimmed(field.substr(colon + 1));
    if (name == "content-length") {
      const std::optional<size_t> n = number(value, 10);
      odd = odd || !n || (length && *length != *n);
      length = n;
    } else if (name == "transfer-encoding") {
      odd = odd || chunked_ || lower(value) != "chunked";
      chunked_ = true;
    } else if (name == "host") {
      odd = odd || has_host;
      has_host = true;
    } else if (name == "expect") {
      expects_continue_ = lower(value) == "100-continue";
    }
    headers_.emplace_back(std::move(name), value);
  }
  if (odd || (chunked_ && length)) return State::odd;
  if (length && *length > max_body_) return State::body_too_large;
  if (length) end_ += *length;
  return chunked_ || length.value_or(0) > 0 ? State::body : State::whole;
}

RequestFrame::State RequestFrame::look_for_chunks(std::string_view bytes) {
  while (!trailer_) {
    const size_t line_end = bytes.find(kLineEnd, std::min(end_, bytes.size()));
    if (line_end == std::string_view::npos) {
      const bool endless = bytes.size() > end_ && bytes.size() - end_ > kMaxChunkLine;
      return endless ? State::odd : State::body;
    }
    const std::string_view line = bytes.substr(end_, line_end - end_);
    const std::optional<size_t> size = number(trimmed(line.substr(0, line.find(';'))), 16);
    if (!size || line.size() > kMaxChunkLine) return State::odd;
    if (*size > max_body_ || chunk_bytes_ + *size > max_body_) return State::body_too_large;
    if (*size == 0) {
      end_ = line_end + kLineEnd.size();
      trailer_ = true;
      break;
    }
    const size_t chunk_end = line_end + kLineEnd.size() + *size + kLineEnd.size();
    if (bytes.size() < chunk_end) return State::body;
    chunk_bytes_ += *size;
    end_ = chunk_end;
  }
  return look_for_trailer(bytes);
}

/// Lines up to an empty one.
RequestFrame::State RequestFrame::look_for_trailer(std::string_view bytes) {
  for (size_t at = end_;;) {
    const size_t line_end = bytes.find(kLineEnd, at);
    if (line_end == std::string_view::npos)
      return bytes.size() - end_ > kMaxTrailer ? State::odd : State::body;
    const bool empty = line_end == at;
    at = line_end + kLineEnd.size();
    if (!empty) continue;
    end_ = at;
    return State::whole;
  }
}

}  // namespace narrows::server
