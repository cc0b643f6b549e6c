// Which CPU targets the kernels are compiled for. Include before any Highway header: Highway reads these
// macros when it first looks at the compiler.
#pragma once

// SSSE3 and older: no CPU with enough memory for a long context lacks SSE4 (2008); "ref" still runs there.
// SVE and RVV: vectors of unknown size cannot be members of the register blocks in gemm-inl.h.
// WASM, PPC8: never tried.
// NARROWS_FEW_TARGETS: builds that look for races, which the targets do not differ in, keep two and compile
// in half the time.
// With AddressSanitizer without AVX3: AVX3_DL has its vectors, and all but its products of bytes.
#ifdef NARROWS_FEW_TARGETS
#define NARROWS_OTHER_TARGETS (HWY_SSE4 | HWY_AVX3)
#elif defined(__SANITIZE_ADDRESS__)
#define NARROWS_OTHER_TARGETS HWY_AVX3
#else
#define NARROWS_OTHER_TARGETS 0
#endif
#define HWY_DISABLED_TARGETS                                                                            \
  (HWY_SSSE3 | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV | HWY_WASM | HWY_WASM_EMU256 | \
   HWY_PPC8 | NARROWS_OTHER_TARGETS)

// Highway 1.0.3 leaves AVX3_DL (Ice Lake, Zen 4) out unless asked.
#define HWY_WANT_AVX3_DL
