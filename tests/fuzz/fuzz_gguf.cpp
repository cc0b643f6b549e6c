// A model file: opened, its metadata read, its weights loaded, and, if all of that is accepted, three tokens
// run through the layers: whatever a file may say without being refused must also compute without harm.
#include <cstring>

#include "exec/cpu/cpu_executor.h"
#include "fuzz/fuzz.h"
#include "gguf/gguf_file.h"
#include "model/spec.h"
#include "model/weights.h"
#include "prompt/prefill.h"
#include "support/tiny_model.h"
#include "text/llama_log.h"

namespace narrows::fuzz {

namespace {

using testing::TinyModel;

/// Small files of one layer: most of their bytes are metadata.
TinyModel small(const std::string& architecture) {
  TinyModel m;
  m.architecture = architecture;
  m.n_layer = 1;
  m.n_embd = 32;
  m.n_head = 4;
  m.n_head_kv = 2;
  m.head_dim = architecture == "qwen3" ? 16 : 8;
  m.n_ff = 32;
  m.n_ctx = 64;
  m.tied_output = true;
  m.type = GGML_TYPE_Q8_0;
  return m;
}

size_t header_of(const std::string& bytes) {
  const MemoryFile file(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
  const auto opened = GgufFile::open(file.path());
  check(opened.ok(), "a seed is refused: " + opened.status().message());
  return static_cast<size_t>(opened->tensors().front().offset);
}

void run_tokens(const ModelWeights& weights) {
  const ModelSpec& spec = weights.spec();
  constexpr int64_t kTokens = 3;
  const std::vector<kernels::RopeTable> ropes = rope_tables(spec, 16);
  const Plan plan = make_plan(weights);
  auto executor = CpuExecutor::create(spec, plan, 1);
  check(executor.ok(), "no executor of one thread");
  Prefill prefill(weights, plan, ropes, **executor);
  PrefillHooks hooks;
  hooks.layer_done = [](int64_t, const float*, const float*, int64_t) -> Status { return {}; };
  std::vector<float> logits(static_cast<size_t>(spec.n_vocab));
  const std::vector<Token> tokens = {0, static_cast<Token>(spec.n_vocab / 2),
                                     static_cast<Token>(spec.n_vocab - 1)};
  static_assert(kTokens == 3);
  if (const Status s = prefill.run(tokens, 0, hooks, {}, logits.data()); !s.ok()) check_sentence(s);
}

void read_model(const std::string& path) {
  auto file = GgufFile::open(path);
  if (!file.ok()) return check_sentence(file.status());
  const auto fingerprint = file->fingerprint();
  check(fingerprint.ok() && fingerprint->size() == 16, "a file that was opened has no fingerprint");
  const auto spec = read_spec(*file);
  if (!spec.ok()) return check_sentence(spec.status());
  const auto weights = ModelWeights::load(std::move(*file), *spec, {.repack = false});
  if (!weights.ok()) return check_sentence(weights.status());
  run_tokens(**weights);
  ++g_accepted;
}

}  // namespace

std::vector<Seed> seeds() {
  std::vector<TinyModel> models = {small("llama"), small("qwen2"), small("qwen3")};
  TinyModel mixed = small("llama");
  mixed.types = {{"attn_v", GGML_TYPE_F16}, {"ffn_up", GGML_TYPE_F32}};
  mixed.other_bias = mixed.qkv_bias = true;
  mixed.rope_factors = {1, 2, 3, 4};
  models.push_back(mixed);
  TinyModel scaled = small("qwen2");
  scaled.rope_scaling = "yarn";
  scaled.rope_factor = 4;
  scaled.n_ctx_orig = 16;
  scaled.n_rot = 8;
  scaled.tied_output = false;
  scaled.output_bias = true;
  models.push_back(scaled);
  TinyModel experts = small("qwen3moe");
  experts.n_expert = 4;
  experts.n_used = 2;
  models.push_back(experts);
  std::vector<Seed> all;
  for (const TinyModel& m : models) {
    const std::string bytes = m.bytes();
    all.push_back({bytes, header_of(bytes)});
  }
  // What is refused with a reason of its own: near to these, readers of the reason have to hold too.
  const Seed good = all.front();
  for (const uint32_t version : {1U, 9U, 0x03000000U}) {
    all.push_back(good);
    std::memcpy(all.back().bytes.data() + 4, &version, sizeof(version));
  }
  all.push_back(good);
  const size_t name = good.bytes.find("blk.0.attn_q.weight");
  const int32_t unknown = 99;
  std::memcpy(all.back().bytes.data() + name + 19 + 4 + 16, &unknown, sizeof(unknown));
  return all;
}

}  // namespace narrows::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  narrows::silence_llama_log();
  const narrows::fuzz::MemoryFile file(data, size);
  narrows::fuzz::read_model(file.path());
  return 0;
}
