// Declares the kernels of one target in its namespace (N_AVX2, N_AVX3, ..), by the types in ops.h, so that a
// signature is written once and a definition that differs from it does not compile or link. Re-included once
// a target. NARROWS_SIMD is 0 for Highway's one-lane fallback targets: they would be slower than "ref" is
// exact.

// clang-format off
#if defined(NARROWS_KERNELS_KERNELS_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef NARROWS_KERNELS_KERNELS_INL_H
#undef NARROWS_KERNELS_KERNELS_INL_H
#else
#define NARROWS_KERNELS_KERNELS_INL_H
#endif
// clang-format on

#include <hwy/highway.h>

#include <type_traits>

#include "kernels/ops.h"

#undef NARROWS_SIMD
#if HWY_TARGET == HWY_SCALAR || HWY_TARGET == HWY_EMU128
#define NARROWS_SIMD 0
#else
#define NARROWS_SIMD 1
#endif

/// Targets with kernels that compute in half: by instructions that some of their CPUs have, on AVX2 emulated.
#undef NARROWS_NATIVE_HALF
#if HWY_TARGET == HWY_AVX3_DL || HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_NEON
#define NARROWS_NATIVE_HALF 1
#else
#define NARROWS_NATIVE_HALF 0
#endif

HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {

std::remove_pointer_t<decltype(Ops::f32_to_f16)> f32_to_f16;
std::remove_pointer_t<decltype(Ops::f16_to_f32)> f16_to_f32;
std::remove_pointer_t<decltype(Ops::gemm)> gemm;
std::remove_pointer_t<decltype(Ops::gemm_f16)> gemm_f16;
std::remove_pointer_t<decltype(Ops::pack_bf16)> pack_bf16;
std::remove_pointer_t<decltype(Ops::gemm_bf16)> gemm_bf16;
std::remove_pointer_t<decltype(Ops::rope_rows)> rope_rows;
std::remove_pointer_t<decltype(Ops::rope_tile)> rope_tile;
std::remove_pointer_t<decltype(Ops::attend_f32)> attend_f32;
std::remove_pointer_t<decltype(Ops::attend_f16)> attend_f16;
std::remove_pointer_t<decltype(Ops::dequant_groups)> dequant_groups;
std::remove_pointer_t<decltype(Ops::quant_groups)> quant_groups;
std::remove_pointer_t<decltype(Ops::select_top)> select_top;
std::remove_pointer_t<decltype(Ops::quant_latents)> quant_latents;
std::remove_pointer_t<decltype(Ops::unpack_planes)> unpack_planes;
std::remove_pointer_t<decltype(Ops::expand_index)> expand_index;
std::remove_pointer_t<decltype(Ops::score_index)> score_index;
std::remove_pointer_t<decltype(Ops::softmax_part)> softmax_part;
std::remove_pointer_t<decltype(Ops::softmax_scores)> softmax_scores;
std::remove_pointer_t<decltype(Ops::fold_query)> fold_query;
std::remove_pointer_t<decltype(Ops::pool_candidates)> pool_candidates;
std::remove_pointer_t<decltype(Ops::count_above)> count_above;
std::remove_pointer_t<decltype(Ops::keep_above)> keep_above;
std::remove_pointer_t<decltype(Ops::amplitudes)> amplitudes;
std::remove_pointer_t<decltype(Ops::read_index)> read_index;
std::remove_pointer_t<decltype(Ops::sum_planes)> sum_planes;
std::remove_pointer_t<decltype(Ops::score_rows_f16)> score_rows_f16;
std::remove_pointer_t<decltype(Ops::round_rows)> round_rows;
std::remove_pointer_t<decltype(Ops::packed_product)> packed_product;
std::remove_pointer_t<decltype(Ops::unpack_tile)> unpack_tile;
std::remove_pointer_t<decltype(Ops::rms_norm)> rms_norm;
std::remove_pointer_t<decltype(Ops::swiglu)> swiglu;
std::remove_pointer_t<decltype(Ops::geglu)> geglu;
std::remove_pointer_t<decltype(Ops::swiglu_clamped)> swiglu_clamped;
std::remove_pointer_t<decltype(Ops::sigmoid_gate)> sigmoid_gate;
std::remove_pointer_t<decltype(Ops::conv_silu)> conv_silu;
std::remove_pointer_t<decltype(Ops::l2_norm)> l2_norm;
std::remove_pointer_t<decltype(Ops::delta_step)> delta_step;
std::remove_pointer_t<decltype(Ops::delta_rows)> delta_rows;

extern const PrefillKernel kPrefillF32;
extern const PrefillKernel kPrefillBf16;
extern const PrefillKernel kPrefillBf16Shift;
extern const PrefillKernel kPrefillFp16;
extern const PrefillKernel kPrefillPasa;
extern const PrefillKernel kPrefillFp16Shift;
#if HWY_TARGET == HWY_AVX3_DL
// For CPUs with AVX512-BF16.
extern const PrefillKernel kPrefillBf16Native;
extern const PrefillKernel kPrefillBf16ShiftNative;
std::remove_pointer_t<decltype(Ops::gemm_bf16)> gemm_bf16_native;
#endif
#if NARROWS_NATIVE_HALF
extern const PrefillKernel kPrefillFp16Native;
extern const PrefillKernel kPrefillPasaNative;
extern const PrefillKernel kPrefillFp16ShiftNative;
#endif

}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // re-inclusion guard
