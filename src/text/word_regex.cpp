// The matcher: a stack of what may still be tried, on the heap, one entry for a whole run of units.
#include "text/word_regex.h"

#include <algorithm>
#include <limits>
#include <optional>

namespace narrows {
namespace {

constexpr uint32_t kLastUnit = 0x10FFFF;

}  // namespace

void UnitSet::add(uint32_t first, uint32_t last) {
  for (uint32_t unit = first; unit <= std::min<uint32_t>(last, 255); ++unit)
    small_[unit / 64] |= uint64_t{1} << (unit % 64);
  ranges_.push_back({first, last});
  std::sort(ranges_.begin(), ranges_.end(), [](Range a, Range b) { return a.first < b.first; });
  size_t n = 0;
  for (const Range& range : ranges_) {
    if (n > 0 && range.first <= ranges_[n - 1].last + 1) {
      ranges_[n - 1].last = std::max(ranges_[n - 1].last, range.last);
    } else {
      ranges_[n++] = range;
    }
  }
  ranges_.resize(n);
}

void UnitSet::add(const UnitSet& other) {
  for (const Range& range : other.ranges_) add(range.first, range.last);
}

UnitSet UnitSet::complement() const {
  UnitSet rest;
  uint32_t next = 0;
  for (const Range& range : ranges_) {
    if (range.first > next) rest.add(next, range.first - 1);
    next = range.last + 1;
  }
  if (next <= kLastUnit) rest.add(next, kLastUnit);
  return rest;
}

UnitSet UnitSet::both(const UnitSet& other) const {
  UnitSet outside = complement();
  outside.add(other.complement());
  return outside.complement();
}

bool UnitSet::has_large(uint32_t unit) const {
  const auto behind = std::upper_bound(ranges_.begin(), ranges_.end(), unit,
                                       [](uint32_t u, const Range& range) { return u < range.first; });
  return behind != ranges_.begin() && unit <= std::prev(behind)->last;
}

class WordRegexMatcher {
 public:
  WordRegexMatcher(const WordRegex& regex, std::span<const uint32_t> text)
      : regex_(regex), text_(text), hopeless_(regex.steps_.size()) {}

  /// The end of the match that begins at `pos` with step `at`.
  std::optional<size_t> match(size_t at, size_t pos);

 private:
  using Step = WordRegex::Step;

  /// Something to come back to: a fork's other way, or a run that may end earlier.
  struct Choice {
    size_t step;
    size_t pos;     ///< where to go on; a run: its present end
    size_t lowest;  ///< a run: its earliest end
    size_t begin;
    size_t end;
  };

  /// Where a run may begin in vain: whatever its end, what follows fails. What follows a step does not depend
  /// on the way there, so this holds for every later try; the last such stretch is enough, since later tries
  /// begin within it or behind it.
  struct Stretch {
    size_t begin = 1;
    size_t end = 0;
  };

  bool has(const Step& step, size_t pos) const { return regex_.sets_[step.set].has(text_[pos]); }
  bool enter_run(size_t at, size_t& pos);
  /// Takes up the latest choice above `floor`; false if there is none.
  bool go_back(size_t floor, size_t& at, size_t& pos);

  const WordRegex& regex_;
  std::span<const uint32_t> text_;
  std::vector<Choice> choices_;
  std::vector<Stretch> hopeless_;  ///< one a step
};

bool WordRegexMatcher::enter_run(size_t at, size_t& pos) {
  const Step& step = regex_.steps_[at];
  const Stretch& vain = hopeless_[at];
  if (vain.begin <= pos && pos <= vain.end) return false;
  const size_t most = step.max > text_.size() - pos ? text_.size() : pos + step.max;
  size_t end = pos;
  while (end < most && has(step, end)) ++end;
  if (end - pos < step.min) return false;
  if (!step.sure && end > pos + step.min) choices_.push_back({at, end, pos + step.min, pos, end});
  pos = end;
  return true;
}

bool WordRegexMatcher::go_back(size_t floor, size_t& at, size_t& pos) {
  while (choices_.size() > floor) {
    Choice& choice = choices_.back();
    const Step& step = regex_.steps_[choice.step];
    if (step.op == Step::Op::fork) {
      at = step.other;
      pos = choice.pos;
      choices_.pop_back();
      return true;
    }
    if (choice.pos > choice.lowest) {
      at = choice.step + 1;
      pos = --choice.pos;
      return true;
    }
    if (step.max == std::numeric_limits<size_t>::max()) hopeless_[choice.step] = {choice.begin, choice.end};
    choices_.pop_back();
  }
  return false;
}

std::optional<size_t> WordRegexMatcher::match(size_t at, size_t pos) {
  const size_t floor = choices_.size();
  while (true) {
    const Step& step = regex_.steps_[at];
    bool good = true;
    switch (step.op) {
      case Step::Op::one:
        good = pos < text_.size() && has(step, pos);
        ++pos;
        ++at;
        break;
      case Step::Op::run:
        good = enter_run(at, pos);
        ++at;
        break;
      case Step::Op::fork:
        if (step.sure) choices_.resize(floor);
        choices_.push_back({at, pos, 0, 0, 0});
        at = step.to;
        break;
      case Step::Op::jump:
        at = step.to;
        break;
      case Step::Op::ahead:  // as deep as lookaheads stand in each other
        good = match(step.to, pos).has_value() != step.negative;
        at = step.other;
        break;
      case Step::Op::end:
        good = pos == text_.size();
        ++at;
        break;
      case Step::Op::match:
        choices_.resize(floor);
        return pos;
    }
    if (!good && !go_back(floor, at, pos)) return std::nullopt;
  }
}

void WordRegex::split(std::span<const uint32_t> text, std::vector<size_t>& lengths) const {
  WordRegexMatcher matcher(*this, text);
  size_t done = 0;
  for (size_t pos = 0; pos < text.size();) {
    const std::optional<size_t> end = matcher.match(0, pos);
    if (!end) {
      ++pos;
      continue;
    }
    if (pos > done) lengths.push_back(pos - done);
    if (*end > pos) lengths.push_back(*end - pos);
    done = *end;
    pos = std::max(*end, pos + 1);  // behind an empty match the next one begins a unit later
  }
  if (done < text.size()) lengths.push_back(text.size() - done);
}

}  // namespace narrows
