// Samplers of the C API.
#include "capi/call.h"
#include "capi/handles.h"

using namespace narrows;
using capi::call;
using capi::given;

namespace {

constexpr size_t kFirstOptions = 72;
static_assert(sizeof(void*) != 8 || sizeof(narrows_sampler_options) >= kFirstOptions);

narrows_sampler_options default_options() {
  const SamplerOptions o;
  narrows_sampler_options c{};
  c.struct_size = sizeof c;
  c.temperature = o.temperature;
  c.top_k = o.top_k;
  c.top_p = o.top_p;
  c.min_p = o.min_p;
  c.repeat_penalty = o.repeat_penalty;
  c.presence_penalty = o.presence_penalty;
  c.frequency_penalty = o.frequency_penalty;
  c.repeat_last_n = o.repeat_last_n;
  c.seed = o.seed;
  return c;
}

Result<SamplerOptions> read_options(const narrows_sampler_options* given_options) {
  narrows_sampler_options c = default_options();
  if (Status s = capi::read_struct(given_options, kFirstOptions, "narrows_sampler_options", &c); !s.ok())
    return s;
  if (Status s = given(c.logit_bias, c.n_logit_bias, "logit_bias"); !s.ok()) return s;
  if (c.reserved != 0) return {StatusCode::unsupported, "narrows_sampler_options sets reserved"};
  SamplerOptions o;
  o.temperature = c.temperature;
  o.top_k = c.top_k;
  o.top_p = c.top_p;
  o.min_p = c.min_p;
  o.repeat_penalty = c.repeat_penalty;
  o.presence_penalty = c.presence_penalty;
  o.frequency_penalty = c.frequency_penalty;
  o.repeat_last_n = c.repeat_last_n;
  o.seed = c.seed;
  for (size_t i = 0; i < c.n_logit_bias; ++i)
    o.logit_bias.push_back({c.logit_bias[i].token, c.logit_bias[i].bias});
  o.grammar = capi::text_or(c.grammar, "");
  return o;
}

}  // namespace

extern "C" {

void narrows_sampler_options_init_size(narrows_sampler_options* options, size_t struct_size) {
  capi::init_struct(options, struct_size, default_options());
}

narrows_status narrows_sampler_create(const narrows_model* model, const narrows_sampler_options* options,
                                      narrows_sampler** sampler) {
  if (sampler != nullptr) *sampler = nullptr;
  return call("making a sampler", [&]() -> Status {
    if (Status s = given({{model, "model"}, {sampler, "sampler"}}); !s.ok()) return s;
    const Result<SamplerOptions> o = read_options(options);
    if (!o.ok()) return o.status();
    Result<std::unique_ptr<Sampler>> made = Sampler::create(*o, &model->model->tokenizer());
    if (!made.ok()) return made.status();
    *sampler = new narrows_sampler{model->model, std::move(*made)};
    return {};
  });
}

void narrows_sampler_free(narrows_sampler* sampler) { delete sampler; }

narrows_status narrows_sampler_sample(narrows_sampler* sampler, const float* logits, size_t n,
                                      narrows_token* token) {
  return call("sampling", [&]() -> Status {
    if (Status s = given({{sampler, "sampler"}, {logits, "logits"}, {token, "token"}}); !s.ok()) return s;
    const Result<Token> drawn = sampler->sampler->sample({logits, n});
    if (!drawn.ok()) return drawn.status();
    *token = *drawn;
    return {};
  });
}

narrows_status narrows_sampler_accept(narrows_sampler* sampler, narrows_token token) {
  return call("accepting a token", [&]() -> Status {
    if (Status s = given({{sampler, "sampler"}}); !s.ok()) return s;
    sampler->sampler->accept(token);
    return {};
  });
}

narrows_status narrows_sampler_accept_prompt(narrows_sampler* sampler, narrows_token token) {
  return call("accepting a token", [&]() -> Status {
    if (Status s = given({{sampler, "sampler"}}); !s.ok()) return s;
    sampler->sampler->accept_prompt(token);
    return {};
  });
}
}
