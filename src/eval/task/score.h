// What an answer is worth, from 0 to 1, against the strings that are expected of it. docs/quality.md.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "narrows/status.h"

namespace narrows {

enum class Score {
  contains_all,  ///< share of the expected strings that the answer contains, whatever their case (RULER)
  contains_any,  ///< 1 if it contains one of them
  exact,         ///< 1 if its words are those of one of them: without case, punctuation and a, an, the
  number,        ///< 1 if its last number is that of one of them; what stands behind #### goes before
  f1,            ///< harmonic mean of precision and recall over words as in exact, the best of the expected
  rouge_l,       ///< the same over the longest common subsequence of words
};

/// invalid_argument lists the names: contains-all, contains-any, exact, number, f1, rouge-l.
Result<Score> parse_score(std::string_view name);
const char* score_name(Score score);
std::vector<std::string> score_names();

/// 0 without anything expected. Case is that of ASCII letters; other bytes are compared as they are.
double score_answer(Score score, std::string_view answer, std::span<const std::string> expected);

// --- parts, for tests ---

/// The number that a worked answer ends with: the first behind the last "####" if there is one, else the last
/// of the text, as a decimal in its shortest form ("-1200", "0.5"). 1,200 and $1200.00 are one number.
std::optional<std::string> final_number(std::string_view text);

}  // namespace narrows
