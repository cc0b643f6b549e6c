// Stop strings in a stream of text: found also where they cross the borders of tokens, never shown, not even
// in part.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace narrows::server {

class StopStrings {
 public:
  /// Empty strings are left out.
  explicit StopStrings(std::vector<std::string> stops);

  /// Adds text; returns what can be shown now: everything before a stop string, without an end that may yet
  /// become the beginning of one. Nothing more once stopped().
  std::string push(std::string_view text);
  /// The end of the text: what was held back, if no stop string came of it.
  std::string flush();

  bool stopped() const { return stopped_; }
  /// The stop string that was found; "" if none.
  const std::string& found() const { return found_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  std::string found_;
  bool stopped_ = false;
};

}  // namespace narrows::server
