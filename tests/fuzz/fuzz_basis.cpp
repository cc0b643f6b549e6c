// A basis file, read for a model of two layers with keys of width 16.
#include "fuzz/fuzz.h"
#include "kv/basis_file.h"
#include "support/tiny_model.h"
#include "temp_dir.h"
#include "text/llama_log.h"

namespace narrows::fuzz {

namespace {

ModelInfo model() {
  ModelInfo m;
  m.fingerprint = "0123456789abcdef";
  m.n_layer = 2;
  m.n_head = 4;
  m.n_head_kv = 2;
  m.head_dim = 8;
  return m;
}

std::string file_bytes(uint32_t seed) {
  std::vector<float> keys;
  for (const Token t : testing::random_tokens(64 * 16, seed))
    keys.push_back(static_cast<float>(t) / 256.0F - 0.4F);
  KeyMoments moments(16);
  moments.add(keys.data(), 64);
  BasisFile basis;
  basis.fingerprint = model().fingerprint;
  basis.made_from = "a seed";
  basis.n_tokens = 64;
  CentredMoments centred(16);
  centred.add(keys.data(), 16, 64);
  const KltBasis klt = make_klt_basis(centred, std::vector<double>(16 * 8, 0.0), 8).value();
  for (int i = 0; i < 2; ++i) {
    basis.layers.push_back(moments.leading(16).value());
    basis.klt.push_back({{klt}, {klt}});
  }
  const testing::TempDir dir;
  const Status s = write_basis_file(dir.path("b.gguf"), basis, model());
  check(s.ok(), s.message());
  std::ifstream in(dir.path("b.gguf"), std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

}  // namespace

std::vector<Seed> seeds() { return {{file_bytes(1), 700}, {file_bytes(2), 700}}; }

}  // namespace narrows::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace narrows;
  silence_llama_log();
  const fuzz::MemoryFile file(data, size);
  const auto basis = read_basis_file(file.path(), fuzz::model());
  if (!basis.ok()) {
    fuzz::check_sentence(basis.status());
    return 0;
  }
  ++fuzz::g_accepted;
  // Whatever was accepted is a basis of this model.
  fuzz::check((*basis)->layers.size() == 2, "a basis with another number of layers was accepted");
  for (const LayerBasis& layer : (*basis)->layers) {
    fuzz::check(layer.width == 16 && layer.rank == 16 && layer.u.size() == 256 && layer.energy.size() == 16,
                "a basis of another shape was accepted");
    for (int64_t c = 0; c < 16; ++c) {
      double norm = 0;
      for (int64_t i = 0; i < 16; ++i)
        norm += static_cast<double>(layer.u[static_cast<size_t>(i * 16 + c)]) *
                static_cast<double>(layer.u[static_cast<size_t>(i * 16 + c)]);
      fuzz::check(norm > 0.99 && norm < 1.01, "a column that is no direction was accepted");
    }
  }
  for (const KltLayerBasis& layer : (*basis)->klt) {
    for (const auto* parts : {&layer.key, &layer.value}) {
      fuzz::check(parts->size() == 1 && parts->front().width == 16,
                  "transforms of another shape were accepted");
      // Whatever the numbers, bits can be given and a transform made or refused.
      const auto made = make_klt_transform(parts->front(), 2.0);
      if (!made.ok()) fuzz::check_sentence(made.status());
    }
  }
  return 0;
}
