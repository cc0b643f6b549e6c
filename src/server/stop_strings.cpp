#include "server/stop_strings.h"

#include <algorithm>

namespace narrows::server {

namespace {

/// Length of the longest end of `text` that begins `stop` without being all of it.
size_t begun(std::string_view text, std::string_view stop) {
  for (size_t n = std::min(text.size(), stop.size() - 1); n > 0; --n) {
    if (text.substr(text.size() - n) == stop.substr(0, n)) return n;
  }
  return 0;
}

}  // namespace

StopStrings::StopStrings(std::vector<std::string> stops) : stops_(std::move(stops)) {
  std::erase_if(stops_, [](const std::string& s) { return s.empty(); });
}

std::string StopStrings::push(std::string_view text) {
  if (stopped_) return {};
  held_ += text;
  size_t at = std::string::npos;
  for (const std::string& stop : stops_) {
    const size_t here = held_.find(stop);
    // Of two that begin at one place the longer one: it is what the text says.
    if (here == std::string::npos || here > at || (here == at && stop.size() <= found_.size())) continue;
    at = here;
    found_ = stop;
  }
  if (at != std::string::npos) {
    stopped_ = true;
    std::string shown = held_.substr(0, at);
    held_.clear();
    return shown;
  }
  size_t keep = 0;
  for (const std::string& stop : stops_) keep = std::max(keep, begun(held_, stop));
  std::string shown = held_.substr(0, held_.size() - keep);
  held_.erase(0, shown.size());
  return shown;
}

std::string StopStrings::flush() {
  std::string rest;
  rest.swap(held_);
  return rest;
}

}  // namespace narrows::server
