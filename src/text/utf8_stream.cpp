// Utf8Stream: a token may end in the middle of a character, a terminal must not see half of one.
#include "base/utf8.h"
#include "narrows/text.h"

namespace narrows {

std::string Utf8Stream::push(std::string_view bytes) {
  pending_ += bytes;
  std::string out;
  std::string_view rest = pending_;
  while (!rest.empty()) {
    const Utf8Sequence sequence = first_utf8_sequence(rest);
    if (sequence.kind == Utf8Kind::incomplete) break;
    out += sequence.kind == Utf8Kind::valid ? rest.substr(0, sequence.length) : kReplacementCharacter;
    rest.remove_prefix(sequence.length);
  }
  pending_.erase(0, pending_.size() - rest.size());
  return out;
}

std::string Utf8Stream::flush() {
  // What is pending is one incomplete sequence, by push(): one replacement character.
  const bool cut_off = !pending_.empty();
  pending_.clear();
  return std::string(cut_off ? kReplacementCharacter : std::string_view());
}

}  // namespace narrows
