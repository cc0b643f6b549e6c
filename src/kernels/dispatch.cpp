// Which table of kernels runs: one list of all compiled targets, best first, filtered by what the CPU has; an
// environment variable may force one. A forced name that does not run is an error, never a silent default.
#include "kernels/ref/ref.h"
#include "kernels/select_scratch.h"
#include "kernels/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/dispatch.cpp"
#include <hwy/foreach_target.h>

#include "kernels/kernels-inl.h"

#if NARROWS_SIMD
HWY_BEFORE_NAMESPACE();
namespace narrows::kernels::HWY_NAMESPACE {

namespace {

/// What tables of one target differ in.
struct Formats {
  decltype(Ops::gemm_bf16) product_bf16 = gemm_bf16;
  const PrefillKernel* bf16 = &kPrefillBf16;
  const PrefillKernel* bf16_shift = &kPrefillBf16Shift;
  const PrefillKernel* fp16 = &kPrefillFp16;
  const PrefillKernel* pasa = &kPrefillPasa;
  const PrefillKernel* fp16_shift = &kPrefillFp16Shift;
  PrefillKind best = PrefillKind::f32;
  bool native_half = false;
};

constexpr Ops make_table(const char* name, const Formats& formats) {
  return {
      .name = name,
      .f32_to_f16 = f32_to_f16,
      .f16_to_f32 = f16_to_f32,
      .gemm = gemm,
      .gemm_f16 = gemm_f16,
      .pack_bf16 = pack_bf16,
      .gemm_bf16 = formats.product_bf16,
      .rope_rows = rope_rows,
      .rope_tile = rope_tile,
      .attend_f32 = attend_f32,
      .attend_f16 = attend_f16,
      .prefill = {&kPrefillF32, formats.bf16, formats.bf16_shift, formats.fp16, formats.pasa,
                  formats.fp16_shift},
      .best_prefill = formats.best,
      .native_half = formats.native_half,
      .dequant_groups = dequant_groups,
      .quant_groups = quant_groups,
      .select_top = select_top,
      .quant_latents = quant_latents,
      .unpack_planes = unpack_planes,
      .expand_index = expand_index,
      .score_index = score_index,
      .fold_query = fold_query,
      .pool_candidates = pool_candidates,
      .count_above = count_above,
      .keep_above = keep_above,
      .amplitudes = amplitudes,
      .read_index = read_index,
      .sum_planes = sum_planes,
      .score_rows_f16 = score_rows_f16,
      .softmax_scores = softmax_scores,
      .softmax_part = softmax_part,
      .round_rows = round_rows,
      .packed_product = packed_product,
      .unpack_tile = unpack_tile,
      .rms_norm = rms_norm,
      .swiglu = swiglu,
      .geglu = geglu,
      .swiglu_clamped = swiglu_clamped,
      .sigmoid_gate = sigmoid_gate,
      .conv_silu = conv_silu,
      .l2_norm = l2_norm,
      .delta_step = delta_step,
      .delta_rows = delta_rows,
  };
}

#if HWY_TARGET == HWY_AVX3_DL
constexpr Formats kBf16 = {.product_bf16 = gemm_bf16_native,
                           .bf16 = &kPrefillBf16Native,
                           .bf16_shift = &kPrefillBf16ShiftNative,
                           .best = PrefillKind::bf16_shift};
#else
[[maybe_unused]] constexpr Formats kBf16;
#endif
#if NARROWS_NATIVE_HALF
/// Half arithmetic too. It is not the best: nobody has measured it on a CPU that has it.
constexpr Formats kHalf = {.product_bf16 = kBf16.product_bf16,
                           .bf16 = kBf16.bf16,
                           .bf16_shift = kBf16.bf16_shift,
                           .fp16 = &kPrefillFp16Native,
                           .pasa = &kPrefillPasaNative,
                           .fp16_shift = &kPrefillFp16ShiftNative,
                           .best = kBf16.best,
                           .native_half = true};
#endif

}  // namespace

extern const Ops kTable;
constinit const Ops kTable =
    make_table(&HWY_STR(HWY_NAMESPACE)[2],  // "N_AVX3" -> "AVX3"; hwy::TargetName is not constexpr
               Formats());
#if HWY_TARGET == HWY_AVX3_DL
// Later versions of Highway have targets of these names: AVX3_DL and AVX512-BF16; then AVX512-FP16 too.
extern const Ops kTableZen4;
constinit const Ops kTableZen4 = make_table("AVX3_ZEN4", kBf16);
#endif
#if NARROWS_NATIVE_HALF
extern const Ops kTableHalf;
constinit const Ops kTableHalf = make_table(HWY_TARGET == HWY_AVX3_DL ? "AVX3_SPR"
                                            : HWY_TARGET == HWY_NEON  ? "NEON_FP16"
                                                                      : "FP16_EMULATED",
                                            kHalf);
#endif

}  // namespace narrows::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();
#endif  // NARROWS_SIMD

#if HWY_ONCE

#include <cstdlib>
#include <string_view>

#if HWY_ARCH_ARM_A64 && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace narrows::kernels {
namespace {

struct Target {
  int64_t cpu;  ///< Highway's bit for the CPU features it needs
  const Ops* table;
  bool (*has)() = nullptr;  ///< null, or whether the CPU has what needs no bit of Highway's
};

#if HWY_ARCH_X86
bool cpu_has_bf16() { return __builtin_cpu_supports("avx512bf16") != 0; }
/// Vectors of halves. A CPU with AVX512-FP16 has AVX512-BF16, on which its table relies too.
bool cpu_has_half() { return __builtin_cpu_supports("avx512fp16") != 0 && cpu_has_bf16(); }
#elif HWY_ARCH_ARM_A64
bool cpu_has_half() {
#if defined(__linux__)
  constexpr uint64_t kBoth = HWCAP_FPHP | HWCAP_ASIMDHP;
  return (getauxval(AT_HWCAP) & kBoth) == kBoth;
#else
  return false;  // never tried
#endif
}
#endif

/// Best first. "ref" is not here: it needs nothing.
constexpr Target kTargets[] = {
#if HWY_TARGETS & HWY_AVX3_DL
    {HWY_AVX3_DL, &N_AVX3_DL::kTableHalf, cpu_has_half},
    {HWY_AVX3_DL, &N_AVX3_DL::kTableZen4, cpu_has_bf16},
    {HWY_AVX3_DL, &N_AVX3_DL::kTable},
#endif
#if HWY_TARGETS & HWY_AVX3
    {HWY_AVX3, &N_AVX3::kTable},
#endif
#if HWY_TARGETS & HWY_AVX2
    {HWY_AVX2, &N_AVX2::kTable},
#endif
#if HWY_TARGETS & HWY_SSE4
    {HWY_SSE4, &N_SSE4::kTable},
#endif
#if HWY_TARGETS & HWY_AVX2
    {HWY_AVX2, &N_AVX2::kTableHalf},  // emulated: only if forced
#endif
#if HWY_TARGETS & HWY_NEON
    {HWY_NEON, &N_NEON::kTableHalf, cpu_has_half},
    {HWY_NEON, &N_NEON::kTable},
#endif
    {0, nullptr},  // so that the array is never empty
};

struct Choice {
  const Ops* table;
  Status status;
};

Choice choose() {
  const std::vector<const Ops*> runnable = available_targets();
  const char* forced = std::getenv("NARROWS_FORCE_TARGET");
  if (forced == nullptr || *forced == '\0') return {runnable.front(), Status()};
  std::string names;
  for (const Ops* table : runnable) {
    if (std::string_view(table->name) == forced) return {table, Status()};
    names += names.empty() ? "" : ", ";
    names += table->name;
  }
  return {&ref::kTable,
          Status(StatusCode::invalid_argument,
                 std::string("NARROWS_FORCE_TARGET is \"") + forced + "\", but this CPU runs only " + names)};
}

const Choice& chosen() {
  static const Choice choice = choose();  // C++ makes this safe from several threads
  return choice;
}

}  // namespace

std::vector<const Ops*> available_targets() {
  const int64_t cpu = hwy::SupportedTargets();
  std::vector<const Ops*> tables;
  for (const Target& target : kTargets) {
    if ((target.cpu & cpu) != 0 && (target.has == nullptr || target.has())) tables.push_back(target.table);
  }
  tables.push_back(&ref::kTable);
  return tables;
}

const Ops& ops() { return *chosen().table; }

Status check_forced_target() { return chosen().status; }

int64_t select_scratch_bytes(int64_t n) {
  return static_cast<int64_t>(sizeof(uint32_t)) * (kSelectTables * kSelectBins + 2 * select_padded(n));
}

}  // namespace narrows::kernels

#endif  // HWY_ONCE
