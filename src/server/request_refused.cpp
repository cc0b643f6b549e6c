// Known fields that are not done here. Nobody should believe that they were: they are refused by name, unless
// their value asks for what happens anyway.
#include <fmt/format.h>

#include "server/request_parts.h"

namespace narrows::server {

namespace {

/// Of llama.cpp's server, vLLM and OpenAI; with the value that asks for nothing, if there is one.
struct Refused {
  const char* name;
  const char* harmless;  ///< JSON; null: none
};

constexpr Refused kRefused[] = {
    // OpenAI
    {"audio", nullptr},
    {"best_of", "1"},
    {"functions", "[]"},
    {"function_call", "\"none\""},
    {"modalities", "[\"text\"]"},
    {"verbosity", "\"medium\""},
    {"web_search_options", nullptr},
    {"moderation", nullptr},
    // llama.cpp
    {"adaptive_target", "-1.0"},
    {"chat_format", nullptr},
    {"chat_parser", nullptr},
    {"generation_prompt", nullptr},
    {"grammar_lazy", "false"},
    {"grammar_triggers", "[]"},
    {"image_data", "[]"},
    {"input_extra", "[]"},
    {"lora", "[]"},
    {"media_path", nullptr},
    {"multimodal_data", "[]"},
    {"n_cache_reuse", "0"},
    {"n_discard", "0"},
    {"n_indent", "0"},
    {"parse_tool_calls", "true"},
    {"post_sampling_probs", "false"},
    {"preserved_tokens", "[]"},
    {"reasoning_budget_tokens", "-1"},
    {"reasoning_budget_message", "\"\""},
    {"reasoning_in_content", "false"},
    {"response_fields", "[]"},
    {"return_tokens", "false"},
    {"t_max_predict_ms", "0"},
    {"t_max_prompt_ms", "0"},
    {"thinking_budget_tokens", "-1"},
    {"timings_per_token", "false"},
    // vLLM
    {"add_special_tokens", nullptr},
    {"allowed_token_ids", "[]"},
    {"bad_words", "[]"},
    {"chat_template", nullptr},
    {"documents", "[]"},
    {"guided_choice", nullptr},
    {"guided_decoding_backend", nullptr},
    {"guided_grammar", nullptr},
    {"guided_regex", nullptr},
    {"guided_whitespace_pattern", nullptr},
    {"include_stop_str_in_output", "false"},
    {"kv_transfer_params", nullptr},
    {"length_penalty", "1.0"},
    {"logits_processors", "[]"},
    {"mm_processor_kwargs", nullptr},
    {"priority", "0"},
    {"prompt_embeds", nullptr},
    {"prompt_logprobs", "0"},
    {"return_token_ids", "false"},
    {"return_tokens_as_token_ids", "false"},
    {"structured_outputs", nullptr},
    {"thinking_token_budget", nullptr},
    {"truncate_prompt_tokens", "-1"},
    {"use_beam_search", "false"},
    {"vllm_xargs", nullptr},
};

/// What changes neither the answer nor its form.
constexpr const char* kPassed[] = {
    "cache_salt",
    "metadata",
    "n_keep",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "request_id",
    "safety_identifier",
    "service_tier",
    "spaces_between_special_tokens",
    "store",
    "user",
};

}  // namespace

void refuse_what_is_not_done(Fields& f) {
  for (const Refused& r : kRefused) {
    const Json* value = f.find(r.name);
    if (value == nullptr) continue;
    if (r.harmless != nullptr && *value == Json::parse(r.harmless)) continue;
    f.fail(r.name, r.harmless == nullptr
                       ? std::string("is not supported by this server")
                       : fmt::format("is not supported by this server but for {}", r.harmless));
  }
  if (f.has("suffix")) f.fail("suffix", "is not supported by this server; use /infill");
  for (const char* name : kPassed) f.pass(name);
}

}  // namespace narrows::server
