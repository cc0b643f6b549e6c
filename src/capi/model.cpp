// Models, tokens and chat templates of the C API.
#include "capi/call.h"
#include "capi/handles.h"

using namespace narrows;
using capi::call;
using capi::given;

namespace {

constexpr size_t kFirstOptions = 16, kFirstInfo = 112;
static_assert(sizeof(void*) != 8 ||
              (sizeof(narrows_model_options) >= kFirstOptions && sizeof(narrows_model_info) >= kFirstInfo));

narrows_model_options default_options() {
  const LoadOptions o;
  return {sizeof(narrows_model_options), o.repack ? 1 : 0, o.float_weights ? 1 : 0};
}

/// The conversation through the template.
Result<ChatPrompt> render(const narrows_model* model, const narrows_chat_message* messages, size_t n,
                          int add_generation_prompt) {
  if (Status s = given({{model, "model"}}); !s.ok()) return s;
  if (Status s = given(messages, n, "messages"); !s.ok()) return s;
  std::vector<ChatMessage> list;
  for (size_t i = 0; i < n; ++i) {
    if (Status s =
            given({{messages[i].role, "a message's role"}, {messages[i].content, "a message's content"}});
        !s.ok())
      return s;
    list.push_back({messages[i].role, messages[i].content});
  }
  return model->model->tokenizer().apply_chat_template(list, add_generation_prompt != 0);
}

}  // namespace

extern "C" {

void narrows_model_options_init_size(narrows_model_options* options, size_t struct_size) {
  capi::init_struct(options, struct_size, default_options());
}

narrows_status narrows_model_load(const char* path, const narrows_model_options* options,
                                  narrows_model** model) {
  if (model != nullptr) *model = nullptr;
  return call("loading a model", [&]() -> Status {
    if (Status s = given({{path, "path"}, {model, "model"}}); !s.ok()) return s;
    narrows_model_options o = default_options();
    if (Status s = capi::read_struct(options, kFirstOptions, "narrows_model_options", &o); !s.ok()) return s;
    Result<std::shared_ptr<const Model>> loaded =
        Model::load(path, {.repack = o.repack != 0, .float_weights = o.float_weights != 0});
    if (!loaded.ok()) return loaded.status();
    *model = new narrows_model{std::move(*loaded)};
    return {};
  });
}

void narrows_model_free(narrows_model* model) { delete model; }

narrows_status narrows_model_get_info(const narrows_model* model, narrows_model_info* info) {
  return call("a model's facts", [&]() -> Status {
    if (Status s = given({{model, "model"}, {info, "info"}}); !s.ok()) return s;
    const ModelInfo& m = model->model->info();
    narrows_model_info out{};
    out.architecture = m.architecture.c_str();
    out.name = m.name.c_str();
    out.fingerprint = m.fingerprint.c_str();
    out.n_layer = m.n_layer;
    out.n_embd = m.n_embd;
    out.n_ff = m.n_ff;
    out.n_head = m.n_head;
    out.n_head_kv = m.n_head_kv;
    out.head_dim = m.head_dim;
    out.n_vocab = m.n_vocab;
    out.n_ctx_train = m.n_ctx_train;
    out.weight_bytes = m.weight_bytes;
    out.has_chat_template = model->model->tokenizer().has_chat_template() ? 1 : 0;
    return capi::write_struct(out, kFirstInfo, "narrows_model_info", info);
  });
}

narrows_status narrows_tokenize(const narrows_model* model, const char* text, size_t n_bytes, int add_special,
                                int parse_special, narrows_token* tokens, size_t capacity, size_t* n_tokens) {
  std::vector<Token> found;
  const narrows_status status = call("tokenizing", [&]() -> Status {
    if (Status s = given({{model, "model"}}); !s.ok()) return s;
    if (Status s = given(text, n_bytes, "text"); !s.ok()) return s;
    Result<std::vector<Token>> encoded =
        model->model->tokenizer().encode({text, n_bytes}, add_special != 0, parse_special != 0);
    if (!encoded.ok()) return encoded.status();
    found = std::move(*encoded);
    return {};
  });
  if (status != NARROWS_OK) return status;
  return capi::give<narrows_token>(found, tokens, capacity, n_tokens);
}

narrows_status narrows_detokenize(const narrows_model* model, const narrows_token* tokens, size_t n_tokens,
                                  int special, char* text, size_t capacity, size_t* n_bytes) {
  std::string bytes;
  const narrows_status status = call("detokenizing", [&]() -> Status {
    if (Status s = given({{model, "model"}}); !s.ok()) return s;
    if (Status s = given(tokens, n_tokens, "tokens"); !s.ok()) return s;
    bytes = model->model->tokenizer().decode({tokens, n_tokens}, special != 0);
    return {};
  });
  if (status != NARROWS_OK) return status;
  return capi::give<char>(bytes, text, capacity, n_bytes, 1);
}

int narrows_is_end(const narrows_model* model, narrows_token token) {
  return model != nullptr && model->model->tokenizer().is_end(token) ? 1 : 0;
}

narrows_status narrows_chat_render(const narrows_model* model, const narrows_chat_message* messages, size_t n,
                                   int add_generation_prompt, char* text, size_t capacity, size_t* n_bytes) {
  std::string rendered;
  const narrows_status status = call("a chat template", [&]() -> Status {
    Result<ChatPrompt> prompt = render(model, messages, n, add_generation_prompt);
    if (!prompt.ok()) return prompt.status();
    rendered = std::move(prompt->text);
    return {};
  });
  if (status != NARROWS_OK) return status;
  return capi::give<char>(rendered, text, capacity, n_bytes, 1);
}

narrows_status narrows_chat_tokenize(const narrows_model* model, const narrows_chat_message* messages,
                                     size_t n, int add_generation_prompt, narrows_token* tokens,
                                     size_t capacity, size_t* n_tokens) {
  std::vector<Token> found;
  const narrows_status status = call("a chat template", [&]() -> Status {
    const Result<ChatPrompt> prompt = render(model, messages, n, add_generation_prompt);
    if (!prompt.ok()) return prompt.status();
    Result<std::vector<Token>> encoded = model->model->tokenizer().encode(*prompt);
    if (!encoded.ok()) return encoded.status();
    found = std::move(*encoded);
    return {};
  });
  if (status != NARROWS_OK) return status;
  return capi::give<narrows_token>(found, tokens, capacity, n_tokens);
}
}
