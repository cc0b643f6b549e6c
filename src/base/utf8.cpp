// The table of well-formed sequences is Unicode 15, table 3-7: only the second byte has a range of its own,
// which is what keeps out overlong forms, surrogates and everything above U+10FFFF.
#include "base/utf8.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace narrows {
namespace {

struct Lead {
  size_t length;      ///< 0: the byte begins nothing
  unsigned char low;  ///< range of the second byte, both ends included
  unsigned char high;
};

Lead lead_of(unsigned char byte) {
  if (byte < 0x80) return {1, 0, 0};
  if (byte < 0xC2) return {0, 0, 0};  // continuation bytes; C0 and C1 would be overlong
  if (byte < 0xE0) return {2, 0x80, 0xBF};
  if (byte == 0xE0) return {3, 0xA0, 0xBF};  // below A0: overlong
  if (byte == 0xED) return {3, 0x80, 0x9F};  // above 9F: surrogates
  if (byte < 0xF0) return {3, 0x80, 0xBF};
  if (byte == 0xF0) return {4, 0x90, 0xBF};  // below 90: overlong
  if (byte < 0xF4) return {4, 0x80, 0xBF};
  if (byte == 0xF4) return {4, 0x80, 0x8F};  // above 8F: beyond U+10FFFF
  return {0, 0, 0};
}

}  // namespace

Utf8Sequence first_utf8_sequence(std::string_view bytes) {
  const Lead lead = lead_of(static_cast<unsigned char>(bytes[0]));
  if (lead.length == 0) return {Utf8Kind::invalid, 1};
  for (size_t i = 1; i < lead.length; ++i) {
    if (i == bytes.size()) return {Utf8Kind::incomplete, i};
    const auto byte = static_cast<unsigned char>(bytes[i]);
    const unsigned char low = i == 1 ? lead.low : 0x80;
    const unsigned char high = i == 1 ? lead.high : 0xBF;
    if (byte < low || byte > high) return {Utf8Kind::invalid, i};
  }
  return {Utf8Kind::valid, lead.length};
}

size_t find_invalid_utf8(std::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    uint64_t eight = 0;
    if (text.size() - at >= sizeof(eight)) {  // most text is ASCII: eight bytes at a time
      std::memcpy(&eight, text.data() + at, sizeof(eight));
      if ((eight & 0x8080808080808080U) == 0) {
        at += sizeof(eight);
        continue;
      }
    }
    const Utf8Sequence sequence = first_utf8_sequence(text.substr(at));
    if (sequence.kind != Utf8Kind::valid) return at;
    at += sequence.length;
  }
  return std::string_view::npos;
}

std::string quote(std::string_view text, size_t max_bytes) {
  const bool cut = text.size() > max_bytes;
  std::string_view rest = text.substr(0, max_bytes);
  std::string out = "'";
  while (!rest.empty()) {
    const Utf8Sequence sequence = first_utf8_sequence(rest);
    if (cut && sequence.kind == Utf8Kind::incomplete) break;  // the cut went through it
    const auto first = static_cast<unsigned char>(rest[0]);
    // C2 80 .. C2 9F are the C1 control characters, which terminals obey as they obey C0.
    const bool control = first < 0x20 || first == 0x7F ||
                         (first == 0xC2 && rest.size() > 1 && static_cast<unsigned char>(rest[1]) < 0xA0);
    if (sequence.kind == Utf8Kind::valid && !control) {
      out += rest.substr(0, sequence.length);
    } else {
      for (const char c : rest.substr(0, sequence.length)) {
        out += fmt::format("\\x{:02x}", static_cast<unsigned>(static_cast<unsigned char>(c)));
      }
    }
    rest.remove_prefix(sequence.length);
  }
  return out + (cut ? "...'" : "'");
}

}  // namespace narrows
