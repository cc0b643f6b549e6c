// The regular expressions by which pre-tokenizers cut text into words, matched as std::regex's ECMAScript
// grammar matches them (leftmost, alternatives in their order, greedy), but without its recursion, which
// takes some hundred bytes of stack a character, and in time that grows with the text and not with its
// square.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

namespace narrows {

/// A set of units (code points, or the bytes that stand for their categories): sorted disjoint ranges.
class UnitSet {
 public:
  struct Range {
    uint32_t first;
    uint32_t last;
  };
  void add(uint32_t first, uint32_t last);
  void add(const UnitSet& other);
  UnitSet complement() const;
  UnitSet both(const UnitSet& other) const;
  bool has(uint32_t unit) const {
    return unit < 256 ? (small_[unit / 64] >> (unit % 64) & 1) != 0 : has_large(unit);
  }

 private:
  bool has_large(uint32_t unit) const;
  std::vector<Range> ranges_;
  uint64_t small_[4] = {};  ///< of the units below 256
};

class WordRegex {
 public:
  /// In text whose code points llama.cpp has collapsed to bytes, these stand for the categories of those
  /// beyond ASCII. Others are 0xD0, white space 0x0B.
  static constexpr uint32_t kNumber = 0xD1, kLetter = 0xD2, kPunctuation = 0xD3, kMark = 0xD4, kSymbol = 0xD5;

  /// `expression` is UTF-8. Null if it holds anything but literals, classes, \s \S \d \r \n \t, \p{category},
  /// groups, alternatives, greedy quantifiers, lookahead and $, repeats what can be empty, or grows large.
  static std::unique_ptr<const WordRegex> compile(std::string_view expression);

  /// Appends to `lengths` the lengths of the matches in `text` and of what lies between them, empty ones left
  /// out; together they are text.size(). Throws std::bad_alloc.
  void split(std::span<const uint32_t> text, std::vector<size_t>& lengths) const;

  /// One step of the program that an expression becomes.
  struct Step {
    enum class Op {
      one,    ///< a unit of set `set`
      run,    ///< as many of them as there are, from min to max
      fork,   ///< goes on at `to`, and if that fails at `other`
      jump,   ///< to `to`
      ahead,  ///< what begins at `to` must match here (or must not: `negative`); then `other`
      end,    ///< of the text
      match,
    };
    Op op = Op::match;
    size_t set = 0;
    size_t min = 0;
    size_t max = 0;
    size_t to = 0;
    size_t other = 0;
    bool negative = false;
    /// fork, run: what follows cannot fail, so that nothing tried before is ever come back to.
    bool sure = false;
  };

 private:
  friend class WordRegexCompiler;
  friend class WordRegexMatcher;
  std::vector<UnitSet> sets_;
  std::vector<Step> steps_;
};

}  // namespace narrows
