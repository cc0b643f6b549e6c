// Every allocation of append() and make_room(true) fails once in turn: the answer is out_of_memory, the layer
// holds what it held before, and the next try succeeds. The linker's --wrap puts the functions below between
// the program and operator new and aligned_alloc.
#include <cstdlib>
#include <new>

#include "kv/cache_data.h"

namespace {

int64_t g_allocations_left = -1;  // -1: all succeed

bool may_allocate() {
  if (g_allocations_left < 0) return true;
  return g_allocations_left-- > 0;
}

}  // namespace

extern "C" {
void* __real_aligned_alloc(size_t alignment, size_t size);
void* __wrap_aligned_alloc(size_t alignment, size_t size) {
  return may_allocate() ? __real_aligned_alloc(alignment, size) : nullptr;
}
void* __real__Znwm(size_t size);  // operator new(size_t), as the linker calls it
void* __wrap__Znwm(size_t size) {
  if (!may_allocate()) throw std::bad_alloc();
  return __real__Znwm(size);
}
}

namespace narrows::test {
namespace {

class Memory : public testing::TestWithParam<const char*> {};

TEST_P(Memory, EveryFailureLeavesTheLayerAsItWas) {
  const Heads s(3, 3, 16);
  const Tokens tokens(s, 900);
  for (const int64_t held : {0, 100, 500, 600}) {
    for (const bool step : {false, true}) {
      int64_t n_failures = 0;
      for (int64_t allowed = 0;; ++allowed) {
        const auto cache = make_cache(s, GetParam());
        KvLayer& layer = cache->layer(kCompressed);
        ASSERT_TRUE(layer.append(tokens.key(0), tokens.value(0), held).ok());
        if (step && held == 500) {  // 512 tokens are there, and the next step converts
          step_tokens(layer, tokens, 500, 512);
        }
        const int64_t n = layer.n_tokens();
        const Decoded before(layer);
        const LayerBytes bytes = layer.bytes();
        g_allocations_left = allowed;
        const StatusCode code =
            step ? layer.make_room(true).code() : layer.append(tokens.key(n), tokens.value(n), 300).code();
        g_allocations_left = -1;
        if (code == StatusCode::ok) break;
        ++n_failures;
        ASSERT_EQ(code, StatusCode::out_of_memory) << allowed;
        ASSERT_EQ(layer.n_tokens(), n);
        if (!step) {  // a step may have encoded what left the window before it found no room
          ASSERT_EQ(layer.bytes().total(), bytes.total()) << allowed;
          const Decoded after(layer);
          ASSERT_EQ(before.k, after.k);
          ASSERT_EQ(before.v, after.v);
        }
        ASSERT_LT(allowed, 10000);
        if (step) {
          step_tokens(layer, tokens, n, n + 1);
        } else {
          ASSERT_TRUE(layer.append(tokens.key(n), tokens.value(n), 300).ok());
        }
        const Decoded all(layer);
        for (const float x : all.k) ASSERT_TRUE(std::isfinite(x));
      }
      if (!step) {
        EXPECT_GT(n_failures, 2);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, Memory, testing::Values("f16", "sals-25", "kivi-2", "klt"));

}  // namespace
}  // namespace narrows::test
