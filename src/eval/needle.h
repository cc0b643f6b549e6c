// Retrieval out of a long text, profile against profile: facts are hidden in filler at chosen depths and
// asked for, and an answer counts if it names the number. All profiles of a trial share one exact prefill, so
// that they differ in their caches alone.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "narrows/engine.h"

namespace narrows {

enum class NeedleKind {
  single,     ///< one fact
  several,    ///< ten facts of one form about ten places; one is asked for
  two_facts,  ///< the answer needs two facts that lie half a text apart
};

struct NeedleOptions {
  std::vector<int64_t> contexts = {4096};  ///< tokens of prompt and answer together
  int64_t n_depth = 5;  ///< depths, evenly from 0 (begin of the text) to 1 (end); at least 1
  int64_t trials = 2;   ///< texts a depth, each with its own place, number and begin of the filler
  NeedleKind kind = NeedleKind::single;
  std::vector<KvProfile> profiles;
  std::string basis_path;
  std::string filler;  ///< UTF-8, at least a few sentences; repeated as often as needed
  int n_threads = 0;
  PromptOptions prompt;
};

/// One profile at one context and depth.
struct NeedleRow {
  std::string kv;
  int64_t context = 0;
  double depth = 0;  ///< 0 to 1
  int64_t trials = 0;
  int64_t found = 0;
};

/// The same trials for every profile, ordered by profile, context, depth. invalid_argument if a context
/// cannot hold the facts and the question (both counts), or the filler has no sentence.
Result<std::vector<NeedleRow>> find_needles(std::shared_ptr<const Model> model, const NeedleOptions& options,
                                            const ProgressFn& progress = {});

// --- parts, for tests ---

struct NeedleTrial {
  std::vector<std::string> facts;  ///< one sentence each
  std::vector<double> depths;      ///< of each fact
  std::string question;
  std::string answer;  ///< five digits
};

/// Deterministic in its arguments.
NeedleTrial make_needle_trial(NeedleKind kind, double depth, uint32_t seed);

/// True if the reply has these digits as a whole number: not as part of a longer one.
bool names_number(std::string_view reply, std::string_view digits);

/// Share of successes with 95% confidence (Wilson 1927).
struct Interval {
  double low = 0;
  double high = 1;
};
Interval wilson_interval(int64_t successes, int64_t trials);

/// Sentences of a text, each with the white space after it; joined again they are the text.
std::vector<std::string> split_sentences(std::string_view text);

}  // namespace narrows
