// The reader of model files: header, metadata, tensor table, shapes, weights.
#include "fuzz/fuzz.h"
#include "fuzz/memory_file.h"
#include "model/weights.h"
#include "support/tiny_model.h"
#include "text/llama_log.h"

namespace {
bool accepted = false;
}

bool fuzz_accepted() { return accepted; }

std::vector<std::string> fuzz_seeds() {
  using narrows::testing::TinyModel;
  std::vector<std::string> seeds;
  for (const char* architecture : {"llama", "qwen2", "qwen3"}) {
    TinyModel m;
    m.architecture = architecture;
    m.n_layer = 1;
    m.n_embd = 32;
    m.n_head = 2;
    m.n_head_kv = 1;
    m.n_ff = 32;
    seeds.push_back(m.bytes());
    m.type = GGML_TYPE_Q8_0;
    m.rope_scaling = "yarn";
    m.rope_factor = 4;
    m.n_ctx_orig = 512;
    seeds.push_back(m.bytes());
  }
  return seeds;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace narrows;
  silence_llama_log();
  accepted = false;
  static testing::MemoryFile memory;
  if (!memory.set(data, size)) return 0;
  Result<GgufFile> file = GgufFile::open(memory.path());
  if (!file.ok()) return 0;
  (void)file->fingerprint();
  const Result<Hparams> hp = read_hparams(*file);
  if (!hp.ok()) return 0;
  // Weights take at most 4 bytes for each byte of the smallest type's data: a small input stays small.
  const Result<std::unique_ptr<ModelWeights>> weights = ModelWeights::load(std::move(*file), *hp, {});
  accepted = weights.ok();
  if (accepted) {
    std::vector<float> row(static_cast<size_t>(hp->n_embd));
    const Token token = 0;
    (void)(*weights)->embed({&token, 1}, row.data());
  }
  return 0;
}
