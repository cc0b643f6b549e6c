// Sessions that step together, in the C API.
#include "capi/call.h"
#include "capi/handles.h"

using namespace narrows;
using capi::call;
using capi::given;

extern "C" {

narrows_status narrows_batch_create(const narrows_model* model, int32_t max_sessions, int32_t n_threads,
                                    narrows_batch** batch) {
  if (batch != nullptr) *batch = nullptr;
  return call("making a batch", [&]() -> Status {
    if (Status s = given({{model, "model"}, {batch, "batch"}}); !s.ok()) return s;
    Result<std::unique_ptr<DecodeBatch>> made = DecodeBatch::create(model->model, max_sessions, n_threads);
    if (!made.ok()) return made.status();
    *batch = new narrows_batch{std::move(*made), {}};
    return {};
  });
}

void narrows_batch_free(narrows_batch* batch) { delete batch; }

narrows_status narrows_batch_decode(narrows_batch* batch, narrows_session* const* sessions,
                                    const narrows_token* tokens, size_t n, narrows_status* each) {
  return call("a step of a batch", [&]() -> Status {
    if (Status s = given({{batch, "batch"}}); !s.ok()) return s;
    for (const auto& [pointer, name] :
         {capi::Argument{sessions, "sessions"}, {tokens, "tokens"}, {each, "each"}}) {
      if (Status s = given(pointer, n, name); !s.ok()) return s;
    }
    if (n > static_cast<size_t>(batch->batch->max_sessions()))
      return {StatusCode::invalid_argument, "there are more sessions than the batch was made for"};
    std::vector<Session*> taking_part;
    for (size_t i = 0; i < n; ++i) {
      if (Status s = given({{sessions[i], "a session"}}); !s.ok()) return s;
      taking_part.push_back(sessions[i]->session.get());
    }
    batch->each.assign(n, Status());
    const Status status = batch->batch->decode(taking_part, {tokens, n}, batch->each);
    for (size_t i = 0; i < n; ++i) each[i] = static_cast<narrows_status>(batch->each[i].code());
    return status;
  });
}

const char* narrows_batch_error(const narrows_batch* batch, size_t i) {
  return batch != nullptr && i < batch->each.size() ? batch->each[i].message().c_str() : "";
}
}
