// Not a test: prints, for tiny models of every kind and every cache, a hash over the logits of 700 steps from
// an empty cache, and the logits after a prompt. Run before and after a change of the engine's structure on
// one machine: steps must be the same to the last bit, prompts unless an order of sums changed.
//
//   build/tests/engine/frozen_bits > before; ...; build/tests/engine/frozen_bits | diff before -
#include <cstdio>
#include <cstring>

#include "support/session.h"
#include "support/tiny_cases.h"

namespace narrows::testing {
namespace {

constexpr uint64_t kEmpty = 0xCBF29CE484222325ULL;

uint64_t hash_of(uint64_t hash, std::span<const float> x) {
  for (const float v : x) {
    uint32_t bits = 0;
    std::memcpy(&bits, &v, sizeof(bits));
    hash = (hash ^ bits) * 0x100000001B3ULL;
  }
  return hash;
}

void print(const TinyCase& c, bool repack, const std::string& kv, int n_threads) {
  const LoadedTiny loaded(c.model, {.repack = repack});
  const auto session = make_session(loaded.model, {.kv = kv, .n_threads = n_threads});
  const std::vector<Token> tokens = random_tokens(700);
  std::printf("%s%s %s steps", c.name.c_str(), repack ? "" : " rows", kv.c_str());
  uint64_t hash = kEmpty;
  for (const Token t : tokens) {
    EXPECT_TRUE(session->decode(t).ok());
    hash = hash_of(hash, session->logits());
  }
  std::printf(" %016llx\n", static_cast<unsigned long long>(hash));
  for (const PrefillProducts products : {PrefillProducts::int8, PrefillProducts::bf16}) {
    const auto reader = make_session(loaded.model, {.kv = kv, .n_threads = n_threads, .prompt = {products}});
    for (const size_t n : {40, 700}) {
      reader->reset();
      EXPECT_TRUE(reader->prefill(std::span(tokens).first(n)).ok());
      const auto logits = reader->logits();
      std::printf("%s%s %s prompt %s %zu %016llx", c.name.c_str(), repack ? "" : " rows", kv.c_str(),
                  products == PrefillProducts::int8 ? "int8" : "bf16", n,
                  static_cast<unsigned long long>(hash_of(kEmpty, logits)));
      for (size_t i = 0; i < 4; ++i) std::printf(" %.5f", static_cast<double>(logits[i]));
      std::printf("\n");
    }
  }
  std::fflush(stdout);
}

}  // namespace
}  // namespace narrows::testing

int main() {
  using namespace narrows::testing;
  for (const TinyCase& c : all_cases()) {
    for (const char* kv : {"f16", "kivi-4", "sals-25", "klt"}) print(c, true, kv, 2);
    print(c, false, "klt", 1);
  }
  return ::testing::Test::HasFailure() ? 1 : 0;
}
