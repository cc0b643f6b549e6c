// Which table runs. The forced cases are run by CTest in processes of their own with NARROWS_FORCE_TARGET and
// NARROWS_TEST_EXPECT set (CMakeLists.txt): the choice is made once a process.
#include <hwy/targets.h>

#include <cstdlib>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#if HWY_ARCH_ARM_A64 && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "kernels/kernel_test.h"
#include "support/sanitized.h"

namespace narrows::kernels {
namespace {

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

std::set<std::string> available_names() {
  std::set<std::string> names;
  for (const Ops* table : available_targets()) names.insert(table->name);
  return names;
}

TEST(Dispatch, RefIsLastAndNamesAreDistinct) {
  const std::vector<const Ops*> tables = available_targets();
  ASSERT_FALSE(tables.empty());
  EXPECT_STREQ(tables.back()->name, "ref");
  EXPECT_EQ(available_names().size(), tables.size());
}

// A target that this CPU supports but that is missing from the tables would otherwise go unnoticed: every
// test loops over what is available.
TEST(Dispatch, EveryTargetOfThisCpuIsThereBestFirst) {
  std::vector<std::string> expected;
#if HWY_ARCH_X86
  if ((hwy::SupportedTargets() & HWY_AVX3_DL) != 0 && __builtin_cpu_supports("avx512fp16"))
    expected.emplace_back("AVX3_SPR");
  if ((hwy::SupportedTargets() & HWY_AVX3_DL) != 0 && __builtin_cpu_supports("avx512bf16"))
    expected.emplace_back("AVX3_ZEN4");
  for (const int64_t target : {HWY_AVX3_DL, HWY_AVX3, HWY_AVX2, HWY_SSE4}) {
    if (kSanitized && target == HWY_AVX3) continue;  // kernels/targets.h
    if ((hwy::SupportedTargets() & target) != 0) expected.emplace_back(hwy::TargetName(target));
  }
  if ((hwy::SupportedTargets() & HWY_AVX2) != 0) expected.emplace_back("FP16_EMULATED");
#elif HWY_ARCH_ARM_A64 && defined(__linux__)
  if ((getauxval(AT_HWCAP) & HWCAP_ASIMDHP) != 0) expected.emplace_back("NEON_FP16");
  expected.emplace_back("NEON");
#endif
  expected.emplace_back("ref");
  std::vector<std::string> got;
  for (const Ops* table : available_targets()) got.emplace_back(table->name);
  EXPECT_EQ(got, expected);
}

TEST(Dispatch, TablesAreCompleteAndDiffer) {
  // Some tables are another with other products in bfloat16 or half precision.
  std::set<std::tuple<decltype(Ops::gemm), const PrefillKernel*, const PrefillKernel*>> kernels;
  for (const Ops* t : available_targets()) {
    EXPECT_TRUE(t->f32_to_f16 && t->f16_to_f32 && t->gemm && t->gemm_f16 && t->gemm_bf16 && t->rope_rows &&
                t->rope_tile && t->attend_f32 && t->attend_f16 && t->dequant_groups && t->quant_groups &&
                t->select_top)
        << t->name;
    std::set<const PrefillKernel*> prefill(std::begin(t->prefill), std::end(t->prefill));
    EXPECT_EQ(prefill.size(), size_t{kPrefillKinds}) << t->name;
    EXPECT_FALSE(prefill.contains(nullptr)) << t->name;
    kernels.insert({t->gemm, t->prefill[static_cast<int>(PrefillKind::bf16_shift)],
                    t->prefill[static_cast<int>(PrefillKind::fp16_shift)]});
  }
  EXPECT_EQ(kernels.size(), available_targets().size());
}

TEST(Dispatch, SameTableFromEveryThread) {
  std::vector<const Ops*> got(8);
  std::vector<std::thread> threads;
  for (const Ops*& slot : got) threads.emplace_back([&slot] { slot = &ops(); });
  for (std::thread& thread : threads) thread.join();
  for (const Ops* table : got) EXPECT_EQ(table, &ops());
}

// NARROWS_TEST_EXPECT: empty (nothing forced: the best), "ran" (the forced table, or the error if this CPU
// lacks it), "must_run" (the forced table on every CPU), "error".
TEST(Dispatch, ForcedTargetRanOrIsAnError) {
  const std::string forced = environment("NARROWS_FORCE_TARGET");
  const std::string expect = environment("NARROWS_TEST_EXPECT");
  const Status status = check_forced_target();
  if (forced.empty()) {
    ASSERT_NE(expect, "error");
    ASSERT_NE(expect, "ran");
    EXPECT_TRUE(status.ok());
    EXPECT_EQ(&ops(), available_targets().front());
    return;
  }
  const bool runs = available_names().contains(forced);
  if (expect == "must_run") {
    ASSERT_TRUE(runs);
  }
  if (expect == "error") {
    ASSERT_FALSE(runs);
  }
  if (runs) {
    EXPECT_TRUE(status.ok());
    EXPECT_EQ(ops().name, forced);
  } else {
    ASSERT_FALSE(status.ok());
    EXPECT_EQ(status.code(), StatusCode::invalid_argument);
    EXPECT_STREQ(ops().name, "ref");
    EXPECT_NE(status.message().find(forced), std::string::npos);
    for (const std::string& name : available_names()) {
      EXPECT_NE(status.message().find(name), std::string::npos) << name << " not in: " << status.message();
    }
  }
}

}  // namespace
}  // namespace narrows::kernels
