// JSON of replies, in OpenAI's shapes. Bytes that are no characters become U+FFFD.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "server/job.h"
#include "server/json_fields.h"

namespace narrows::server {

/// One line, always UTF-8.
std::string dump(const Json& json);

/// Replies to one job. Streams: chunk() for every event, then usage_chunk() if asked for; else add() every
/// event, then whole().
class Replies {
 public:
  Replies(const Job& job, std::string model_name);

  /// Takes an event of kind text or finished in.
  void add(const Event& event);
  Json whole() const;

  /// What a stream says of an event; null if nothing. `first`: the first of its choice.
  Json chunk(const Event& event);
  /// The last chunk before [DONE], with the counts.
  Json usage_chunk() const;

 private:
  struct Choice {
    std::string text;
    std::vector<TokenLogprob> logprobs;
    ChoiceResult result;
    bool finished = false;
    bool begun = false;
    size_t n_bytes = 0;  ///< text_offset of completions
  };

  Json head(const char* object) const;
  Json usage() const;
  Json extras(const ChoiceResult& result) const;
  Json logprobs(const std::vector<TokenLogprob>& tokens, size_t offset) const;

  const Job& job_;
  std::string model_name_;
  int64_t created_;
  std::vector<Choice> choices_;
};

}  // namespace narrows::server
