// The reader of basis files.
#include <fstream>
#include <iterator>

#include "cache/basis.h"
#include "fuzz/fuzz.h"
#include "fuzz/memory_file.h"
#include "support/tiny_model.h"
#include "temp_dir.h"
#include "text/llama_log.h"

namespace {

bool accepted = false;

narrows::ModelInfo model() {
  narrows::ModelInfo info;
  info.fingerprint = "0123456789abcdef";
  info.n_layer = 2;
  info.n_head = 2;
  info.n_head_kv = 1;
  info.head_dim = 16;
  return info;
}

}  // namespace

bool fuzz_accepted() { return accepted; }

std::vector<std::string> fuzz_seeds() {
  using namespace narrows;
  BasisFile basis;
  basis.fingerprint = model().fingerprint;
  basis.made_from = "the fuzzer, 40 tokens";
  basis.n_tokens = 40;
  for (int64_t layer = 0; layer < model().n_layer; ++layer) {
    std::vector<float> keys(40 * 16);
    for (size_t i = 0; i < keys.size(); ++i)
      keys[i] = static_cast<float>((i * 37 + static_cast<size_t>(layer)) % 23) - 11.0F;
    KeyMoments moments(16);
    moments.add(keys.data(), 40);
    basis.layers.push_back(moments.leading(16).value());
  }
  const testing::TempDir dir;
  if (!write_basis_file(dir.path("basis.gguf"), basis, model()).ok()) return {};
  std::ifstream file(dir.path("basis.gguf"), std::ios::binary);
  return {std::string(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>())};
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace narrows;
  silence_llama_log();
  static testing::MemoryFile memory;
  accepted = memory.set(data, size) && read_basis_file(memory.path(), model()).ok();
  return 0;
}
