// operator new of the whole program is replaced by one that fails when a test says so; what C code takes with
// malloc does not count. For one source of a program of its own.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace narrows::testing {

/// Allocations from now on until one fails, on all threads but those with t_is_test; below 0: none does.
inline std::atomic<int64_t> g_left{-1};
inline std::atomic<bool> g_failed{false};
inline thread_local bool t_is_test = false;  ///< the test's own thread has its memory

inline void* take_or_fail(size_t n, size_t alignment) {
  if (!t_is_test && g_left.load(std::memory_order_relaxed) >= 0 && g_left.fetch_sub(1) == 0) {
    g_failed = true;
    throw std::bad_alloc();
  }
  n = std::max<size_t>(n, 1);
  void* p = alignment > alignof(std::max_align_t)
                ? std::aligned_alloc(alignment, (n + alignment - 1) / alignment * alignment)
                : std::malloc(n);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}

}  // namespace narrows::testing

// Out of line: inlined, GCC takes free() for a mismatch of new.
#define NARROWS_OUT_OF_LINE [[gnu::noinline]]
void* operator new(size_t n) { return narrows::testing::take_or_fail(n, 0); }
void* operator new[](size_t n) { return narrows::testing::take_or_fail(n, 0); }
void* operator new(size_t n, std::align_val_t a) {
  return narrows::testing::take_or_fail(n, static_cast<size_t>(a));
}
void* operator new[](size_t n, std::align_val_t a) {
  return narrows::testing::take_or_fail(n, static_cast<size_t>(a));
}
NARROWS_OUT_OF_LINE void operator delete(void* p) noexcept { std::free(p); }
NARROWS_OUT_OF_LINE void operator delete[](void* p) noexcept { std::free(p); }
NARROWS_OUT_OF_LINE void operator delete(void* p, size_t) noexcept { std::free(p); }
NARROWS_OUT_OF_LINE void operator delete[](void* p, size_t) noexcept { std::free(p); }
NARROWS_OUT_OF_LINE void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
NARROWS_OUT_OF_LINE void operator delete[](void* p, std::align_val_t) noexcept { std::free(p); }
NARROWS_OUT_OF_LINE void operator delete(void* p, size_t, std::align_val_t) noexcept { std::free(p); }
NARROWS_OUT_OF_LINE void operator delete[](void* p, size_t, std::align_val_t) noexcept { std::free(p); }
#undef NARROWS_OUT_OF_LINE

// ggml's C code loses what it holds when the C++ that it calls throws, and oneDNN a primitive that it cannot
// finish (dnnl_primitive_create): those are no leaks of ours. Our own would be seen in the other tests.
extern "C" const char* __lsan_default_suppressions();
extern "C" const char* __lsan_default_suppressions() {
  return "leak:ggml_\nleak:gguf_\nleak:llama_\nleak:libdnnl\n";
}
