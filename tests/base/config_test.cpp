// Profiles: what each name means, every way to get one wrong, and random bytes for the parser.
#include "narrows/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <string>

namespace narrows {
namespace {

using ::testing::HasSubstr;

KvProfile parsed(std::string_view text) {
  Result<KvProfile> profile = KvProfile::parse(text);
  EXPECT_TRUE(profile.ok()) << profile.status().message();
  return profile.ok() ? *profile : KvProfile{};
}

std::string error_of(std::string_view text) {
  const Result<KvProfile> profile = KvProfile::parse(text);
  EXPECT_FALSE(profile.ok()) << text;
  if (profile.ok()) return "";
  EXPECT_EQ(profile.status().code(), StatusCode::invalid_argument);
  EXPECT_EQ(profile.status().message().find('\n'), std::string::npos);
  return profile.status().message();
}

TEST(KvProfile, NamesMeanWhatTheTableOfProfilesSays) {
  const KvProfile f16 = parsed("f16");
  EXPECT_EQ(f16.kind, KvKind::f16);
  EXPECT_EQ(f16.value_bits, 16);
  const KvProfile kivi = parsed("kivi-2");
  EXPECT_EQ(kivi.kind, KvKind::kivi);
  EXPECT_EQ(kivi.key_bits, 2);
  EXPECT_EQ(kivi.value_bits, 2);
  EXPECT_EQ(parsed("kivi-4").key_bits, 4);
  const KvProfile sals25 = parsed("sals-25");
  EXPECT_EQ(sals25.kind, KvKind::sals);
  EXPECT_EQ(sals25.rank_divisor, 4);
  EXPECT_EQ(sals25.value_bits, 4);
  EXPECT_EQ(sals25.n_sink, 16);
  EXPECT_EQ(sals25.n_recent, 64);
  EXPECT_EQ(sals25.budget, KvProfile::kBudgetAuto);
  const KvProfile sals12 = parsed("sals-12.5");
  EXPECT_EQ(sals12.rank_divisor, 8);
  EXPECT_EQ(sals12.value_bits, 2);
}

TEST(KvProfile, EveryNameParsesToItself) {
  ASSERT_EQ(KvProfile::names().size(), 7U);
  for (const std::string& name : KvProfile::names()) EXPECT_EQ(parsed(name).name, name);
}

TEST(KvProfile, KeysSetTheirNumber) {
  const KvProfile sals = parsed("sals-25:budget=1024,sinks=0,recent=128");
  EXPECT_EQ(sals.budget, 1024);
  EXPECT_EQ(sals.n_sink, 0);
  EXPECT_EQ(sals.n_recent, 128);
  EXPECT_EQ(sals.name, "sals-25:budget=1024,sinks=0,recent=128");
  EXPECT_EQ(parsed("sals-12.5:budget=all").budget, KvProfile::kBudgetAll);
  EXPECT_EQ(parsed("kivi-4:recent=65536").n_recent, 65536);
  EXPECT_EQ(parsed("sals-25:budget=1000000000").budget, 1'000'000'000);
}

TEST(KvProfile, MassIsAShareThatKltStopsAt) {
  EXPECT_EQ(parsed("klt").mass, 0.98);
  EXPECT_EQ(parsed("klt-10x").mass, 0.98);
  EXPECT_EQ(parsed("klt:mass=1").mass, 1);
  EXPECT_EQ(parsed("klt:mass=0.5,budget=64").mass, 0.5);
  EXPECT_EQ(parsed("sals-25").mass, 1);
  for (const char* value : {"0", "0.49", "1.01", "-1", "nan", "inf", "all", "", "0.9x"}) {
    EXPECT_THAT(error_of(std::string("klt:mass=") + value),
                HasSubstr("a share of the attention from 0.5 to 1"));
  }
  EXPECT_THAT(error_of("sals-25:mass=0.9"), HasSubstr("budget=, sinks=, recent="));
}

TEST(KvProfile, WrongNamesAreAnsweredWithThoseThatExist) {
  for (const char* text : {"", ":", "f1", "F16", "f16 ", "sals", "sals-25%", "klt9", "sals-25;budget=1"}) {
    for (const std::string& name : KvProfile::names()) EXPECT_THAT(error_of(text), HasSubstr(name));
  }
}

TEST(KvProfile, WrongKeysAreAnsweredWithThoseThatExist) {
  EXPECT_THAT(error_of("sals-25:rank=4"), HasSubstr("budget=, sinks=, recent="));
  EXPECT_THAT(error_of("kivi-4:budget=4"), HasSubstr("sinks=, recent="));
  EXPECT_THAT(error_of("f16:sinks=4"), HasSubstr("f16 takes no keys"));
  EXPECT_THAT(error_of("f16:"), HasSubstr("takes no keys"));
  EXPECT_THAT(error_of("sals-25:"), HasSubstr("budget="));
  EXPECT_THAT(error_of("sals-25:budget=1,"), HasSubstr("sinks="));
  EXPECT_THAT(error_of("sals-25:sinks"), HasSubstr("sinks="));
  EXPECT_THAT(error_of("sals-25:sinks=1,recent=2,sinks=1"), HasSubstr("twice"));
}

TEST(KvProfile, ImpossibleNumbersAreAnsweredWithTheRange) {
  for (const char* value : {"", "0", "-1", "1000000001", "99999999999999999999", "1.5", "1e3", " 1", "1 ",
                            "0x10", "+1", "ALL", "nan"}) {
    EXPECT_THAT(error_of(std::string("sals-25:budget=") + value), HasSubstr("from 1 to 1000000000 or all"));
  }
  EXPECT_THAT(error_of("sals-25:sinks=4097"), HasSubstr("from 0 to 4096"));
  EXPECT_THAT(error_of("kivi-2:recent=0"), HasSubstr("from 1 to 65536"));
  EXPECT_THAT(error_of("kivi-2:recent=65537"), HasSubstr("from 1 to 65536"));
  EXPECT_THAT(error_of("kivi-2:recent=all"), HasSubstr("from 1 to 65536,"));  // "or all" is for budget= only
}

TEST(KvProfile, AutomaticBudgetIsAnEighthOfTheContextFrom4KOn) {
  const KvProfile sals = parsed("sals-25");
  EXPECT_EQ(sals.budget_at(0), 432);
  EXPECT_EQ(sals.budget_at(4096), 432);  // 16 + 432 + 64 = 512
  EXPECT_EQ(sals.budget_at(8192), 1024 - 80);
  EXPECT_EQ(parsed("sals-25:budget=7").budget_at(8192), 7);
  EXPECT_EQ(parsed("sals-25:budget=all").budget_at(8192), 8192);
}

TEST(KvProfile, DenseLayers) {
  EXPECT_TRUE(parsed("f16").layer_is_dense(7, 30));
  EXPECT_FALSE(parsed("kivi-4").layer_is_dense(0, 30));
  const KvProfile sals = parsed("sals-25");
  EXPECT_TRUE(sals.layer_is_dense(0, 30));
  EXPECT_TRUE(sals.layer_is_dense(1, 30));
  EXPECT_FALSE(sals.layer_is_dense(2, 30));
  EXPECT_FALSE(sals.layer_is_dense(28, 30));
  EXPECT_TRUE(sals.layer_is_dense(29, 30));
}

TEST(KvProfile, RandomBytesNeitherCrashNorPassSilently) {
  // Pieces of real profiles in random order: finds slips in the splitting that single bytes rarely reach.
  const std::string pieces[] = {"sals-25",
                                "kivi-4",
                                ":",
                                ",",
                                "=",
                                "budget",
                                "sinks",
                                "recent",
                                "all",
                                "16",
                                "-",
                                "\n",
                                std::string(1, '\0'),
                                "\xff",
                                "9999999999999999999999"};
  std::mt19937 random(1);
  int accepted = 0;
  for (int i = 0; i < 200'000; ++i) {
    std::string text;
    for (uint32_t n = random() % 8; n > 0; --n) text += pieces[random() % std::size(pieces)];
    const Result<KvProfile> profile = KvProfile::parse(text);
    if (!profile.ok()) {
      ASSERT_EQ(profile.status().message().find('\n'), std::string::npos);
      continue;
    }
    ++accepted;
    ASSERT_EQ(profile->name, text);
    ASSERT_TRUE(profile->budget >= 1 || profile->budget == KvProfile::kBudgetAuto ||
                profile->budget == KvProfile::kBudgetAll);
    ASSERT_TRUE(profile->n_sink >= 0 && profile->n_sink <= 4096);
    ASSERT_TRUE(profile->n_recent >= 1 && profile->n_recent <= 65536);
  }
  EXPECT_GT(accepted, 1000);  // or the loop tested nothing but refusals
}

TEST(Attention, NamesAreReadBackAndOthersRefusedWithTheList) {
  ASSERT_GE(attention_names().size(), 4U);
  for (const std::string& name : attention_names()) {
    const Result<PrefillAttention> attention = parse_attention(name);
    ASSERT_TRUE(attention.ok()) << name;
    EXPECT_EQ(attention_name(*attention), name);
  }
  EXPECT_EQ(*parse_attention("auto"), PrefillAttention::automatic);
  EXPECT_EQ(*parse_attention("bf16-shift"), PrefillAttention::bf16_shift);
  for (const std::string name : {"", "F32", "bf16 ", "float"}) {
    const Status s = parse_attention(name).status();
    EXPECT_EQ(s.code(), StatusCode::invalid_argument);
    for (const std::string& known : attention_names())
      EXPECT_NE(s.message().find(known), std::string::npos) << s.message();
  }
}

TEST(Prefill, ReadsWhatItSays) {
  EXPECT_EQ(*parse_prefill("dense"), 1);
  EXPECT_GT(*parse_prefill("sparse"), 0.5);
  EXPECT_LT(*parse_prefill("sparse"), 1);
  EXPECT_EQ(*parse_prefill("sparse:mass=0.75"), 0.75);
  EXPECT_EQ(*parse_prefill("sparse:mass=1"), 1);
  for (const char* text : {"", "thin", "sparse:", "sparse:mass", "dense:mass=1"}) {
    const Status s = parse_prefill(text).status();
    EXPECT_EQ(s.code(), StatusCode::invalid_argument) << text;
    EXPECT_THAT(s.message(), HasSubstr("dense, sparse or sparse:mass=X")) << text;
  }
  for (const char* text : {"sparse:mass=", "sparse:mass=0", "sparse:mass=1.01", "sparse:mass=nan",
                           "sparse:mass=-1", "sparse:mass=0.5x"}) {
    EXPECT_THAT(parse_prefill(text).status().message(), HasSubstr("above 0 and at most 1")) << text;
  }
}

}  // namespace
}  // namespace narrows
