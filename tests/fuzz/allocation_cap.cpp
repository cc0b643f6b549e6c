// The linker's --wrap sends every call of malloc and its relatives in the program (llama.cpp's too) through
// here; operator new lives in libstdc++ and is replaced.
#include "fuzz/allocation_cap.h"

#include <malloc.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <new>

extern "C" {
void* __real_malloc(size_t n);
void* __real_calloc(size_t n, size_t size);
void* __real_realloc(void* p, size_t n);
void __real_free(void* p);
int __real_posix_memalign(void** p, size_t alignment, size_t n);
void* __real_aligned_alloc(size_t alignment, size_t n);
void* __wrap_malloc(size_t n);
void* __wrap_calloc(size_t n, size_t size);
void* __wrap_realloc(void* p, size_t n);
void __wrap_free(void* p);
int __wrap_posix_memalign(void** p, size_t alignment, size_t n);
void* __wrap_aligned_alloc(size_t alignment, size_t n);
}

namespace narrows::fuzz {

namespace {

constexpr int64_t kNoCap = std::numeric_limits<int64_t>::max();

std::atomic<int64_t> live{0};
std::atomic<int64_t> begin{0};
std::atomic<int64_t> peak{0};
std::atomic<int64_t> cap{kNoCap};

/// Before the memory is asked for, so that no page of it is touched.
void expect(size_t n) {
  const int64_t limit = cap;
  if (limit == kNoCap) return;
  const int64_t held = live - begin;
  if (n < static_cast<size_t>(kNoCap) && held + static_cast<int64_t>(n) <= limit) return;
  cap = kNoCap;  // what follows may allocate
  (void)std::fprintf(stderr, "finding: %zu bytes are asked for on top of %lld, but the input allows %lld\n",
                     n, static_cast<long long>(held), static_cast<long long>(limit));
  std::abort();
}

void* count(void* p) {
  if (p != nullptr) {
    live += static_cast<int64_t>(::malloc_usable_size(p));
    const int64_t held = live - begin;
    if (held > peak) peak = held;
  }
  return p;
}

void discount(void* p) {
  if (p != nullptr) live -= static_cast<int64_t>(::malloc_usable_size(p));
}

}  // namespace

void set_allocation_cap(int64_t bytes) {
  begin = live.load();
  peak = 0;
  cap = bytes;
}

void lift_allocation_cap() { cap = kNoCap; }
int64_t allocation_peak() { return peak; }

}  // namespace narrows::fuzz

using narrows::fuzz::count;
using narrows::fuzz::discount;
using narrows::fuzz::expect;

extern "C" {

void* __wrap_malloc(size_t n) {
  expect(n);
  return count(__real_malloc(n));
}

void* __wrap_calloc(size_t n, size_t size) {
  size_t bytes = 0;
  expect(__builtin_mul_overflow(n, size, &bytes) ? std::numeric_limits<size_t>::max() : bytes);
  return count(__real_calloc(n, size));
}

void* __wrap_realloc(void* p, size_t n) {
  expect(n);
  discount(p);
  void* moved = __real_realloc(p, n);
  if (moved == nullptr && n > 0) {
    count(p);  // still there
    return nullptr;
  }
  return count(moved);
}

void __wrap_free(void* p) {
  discount(p);
  __real_free(p);
}

int __wrap_posix_memalign(void** p, size_t alignment, size_t n) {
  expect(n);
  const int error = __real_posix_memalign(p, alignment, n);
  if (error == 0) count(*p);
  return error;
}

void* __wrap_aligned_alloc(size_t alignment, size_t n) {
  expect(n);
  return count(__real_aligned_alloc(alignment, n));
}

}  // extern "C"

void* operator new(size_t n) {
  void* p = std::malloc(n > 0 ? n : 1);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
void* operator new[](size_t n) { return operator new(n); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t /*n*/) noexcept { std::free(p); }
void operator delete[](void* p, size_t /*n*/) noexcept { std::free(p); }
