// What a client asks for: the bodies of /v1/chat/completions, /v1/completions and the small endpoints, parsed
// and checked. docs/server_api.md lists the fields.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "narrows/sampling.h"
#include "narrows/text.h"
#include "server/json_fields.h"
#include "text/chat_request.h"

namespace narrows::server {

/// Limits of one request, beside the size of its body.
inline constexpr int kMaxChoices = 16;        ///< n
inline constexpr int kMaxPrompts = 64;        ///< prompts of a completion
inline constexpr size_t kMaxStops = 16;       ///< stop strings
inline constexpr size_t kMaxStopBytes = 512;  ///< of one stop string
inline constexpr int kMaxTopLogprobs = 20;
inline constexpr size_t kMaxGrammarBytes = size_t{1} << 16;  ///< of a grammar or schema
inline constexpr size_t kMaxMessages = 4096;
inline constexpr size_t kMaxTools = 512;
inline constexpr size_t kMaxStopTokens = 256;

/// One prompt of a completion: a text, or tokens.
struct Prompt {
  std::string text;
  std::vector<Token> tokens;
  bool is_tokens = false;
};

/// A text with a gap: the answer fills it.
struct Infill {
  std::string before, behind;
  std::string begun;  ///< the answer goes on with this
};

struct GenerationRequest {
  bool chat = false;
  ChatRequest conversation;           ///< chat
  std::vector<Prompt> prompts;        ///< completion
  std::optional<Infill> infill;       ///< instead of prompts
  std::string model;                  ///< as the client calls it; any name is served
  std::string kv;                     ///< narrows.kv; "": the server's profile
  int n = 1;                          ///< choices a prompt
  std::optional<int64_t> max_tokens;  ///< nothing: until the model ends or the context is full
  SamplerOptions sampling;            ///< of the first choice; the i-th takes seed + i
  std::vector<std::string> stops;
  std::vector<Token> stop_tokens;  ///< end the answer, as the model's own ends do
  bool show_special = false;       ///< control tokens are written into the answer
  std::optional<int> logprobs;     ///< alternatives to report beside each token's own; nothing: none at all
  std::string grammar;             ///< GBNF; "": free text
  bool echo = false;               ///< completion: the prompt comes before the answer
  bool ignore_eos = false;         ///< goes on where the model would end
  bool cache_prompt = true;        ///< may use what other requests left
  int id_slot = -1;                ///< the slot that it must have; -1: any
  bool stream = false;
  bool include_usage = false;         ///< stream: one more chunk with the counts
  bool return_progress = false;       ///< stream: events while the prompt is read
  std::string reasoning_effort;       ///< "": not given
  std::vector<std::string> warnings;  ///< what was not done, a sentence each
};

/// What a body may be judged by.
struct RequestDefaults {
  SamplerOptions sampling;
  bool has_seed = false;              ///< sampling.seed is meant; else one is drawn
  std::optional<int64_t> max_tokens;  ///< of requests that say none
  int64_t n_vocab = 0;
  int64_t n_ctx = 0;
  int n_slots = 1;
};

/// nothing: error says what is wrong. Seeds that are not given are drawn here.
std::optional<GenerationRequest> parse_chat(std::string_view body, const RequestDefaults& defaults,
                                            ApiError& error);
std::optional<GenerationRequest> parse_completion(std::string_view body, const RequestDefaults& defaults,
                                                  ApiError& error);

/// Of /v1/embeddings.
inline constexpr size_t kMaxInputs = 2048;
struct EmbeddingRequest {
  std::vector<Prompt> inputs;
  bool base64 = false;  ///< float32, little end first, in place of a list of numbers
  std::vector<std::string> warnings;
};
/// n_embd: what the model gives; other dimensions are refused.
std::optional<EmbeddingRequest> parse_embedding(std::string_view body, int64_t n_vocab, int64_t n_embd,
                                                ApiError& error);

/// Of /tokenize: some hundred bytes of memory are needed for each.
inline constexpr size_t kMaxTokenizeBytes = size_t{2} << 20;

struct TokenizeRequest {
  std::string content;
  bool add_special = false;
  bool parse_special = true;
  bool with_pieces = false;
};
std::optional<TokenizeRequest> parse_tokenize(std::string_view body, ApiError& error);
std::optional<std::vector<Token>> parse_detokenize(std::string_view body, int64_t n_vocab, ApiError& error);
std::optional<GenerationRequest> parse_apply_template(std::string_view body, ApiError& error);
/// The file name of a slot action; no check of what it names.
std::optional<std::string> parse_file_name(std::string_view body, ApiError& error);

}  // namespace narrows::server
