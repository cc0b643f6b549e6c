// Linked into every instrumented program, so that it holds under ctest and by hand alike: defaults of the
// sanitizers' options (ASAN_OPTIONS, UBSAN_OPTIONS and TSAN_OPTIONS still override them), and what
// ThreadSanitizer has to be told about llama.cpp's threads. Not instrumented itself: a part runs before the
// sanitizers are ready.

extern "C" const char* __asan_default_options() {
  // llama.cpp is not instrumented: a container that it fills and we read (or the reverse) has stale bounds
  // marks, which would be reported as container overflows.
  return "detect_container_overflow=0:strict_string_checks=1:detect_stack_use_after_return=1";
}

extern "C" const char* __ubsan_default_options() { return "print_stacktrace=1"; }

extern "C" const char* __tsan_default_options() { return "halt_on_error=1:second_deadlock_stack=1"; }

#ifdef NARROWS_TSAN
#include <dlfcn.h>
#include <sanitizer/tsan_interface.h>

// ggml's threads are libgomp's, and libgomp synchronises with futexes that TSan cannot see: whatever one
// thread writes before a barrier and another reads behind it would be called a race, in our custom ops too.
// The two entry points that ggml calls stand here in libgomp's place, say what they order, and pass the call
// on.
namespace {

char order;  // its address names the order between all OpenMP threads

template <typename Function>
Function* libgomp(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

struct Region {
  void (*body)(void*);
  void* data;
};

void run_region(void* region) {
  __tsan_acquire(&order);
  static_cast<Region*>(region)->body(static_cast<Region*>(region)->data);
  __tsan_release(&order);
}

}  // namespace

extern "C" void GOMP_barrier() {
  static auto* const barrier = libgomp<void()>("GOMP_barrier");
  __tsan_release(&order);
  barrier();
  __tsan_acquire(&order);
}

extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned n_threads, unsigned flags) {
  static auto* const parallel = libgomp<void(void (*)(void*), void*, unsigned, unsigned)>("GOMP_parallel");
  Region region{body, data};
  __tsan_release(&order);
  parallel(run_region, &region, n_threads, flags);
  __tsan_acquire(&order);
}
#endif
