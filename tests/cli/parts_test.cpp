// The pieces of the command line that need neither a model nor a process: exit codes, formats, ranges,
// joining of parts.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "cli/engine_flags.h"
#include "cli/eval_precision.h"
#include "cli/eval_task.h"
#include "cli/exit_code.h"
#include "cli/output.h"
#include "cli/report.h"

namespace narrows::cli {
namespace {

using ::testing::HasSubstr;

TEST(ExitCode, FollowsTheContract) {
  const auto code = [](StatusCode status, Phase phase) { return exit_code({Status(status, "x"), phase}); };
  EXPECT_EQ(exit_code({}), 0);
  for (const StatusCode usage : {StatusCode::invalid_argument, StatusCode::invalid_file,
                                 StatusCode::unsupported, StatusCode::disk_full}) {
    EXPECT_EQ(code(usage, Phase::before_work), 2);
    EXPECT_EQ(code(usage, Phase::at_work), 2);
  }
  for (const StatusCode either : {StatusCode::context_full, StatusCode::out_of_memory}) {
    EXPECT_EQ(code(either, Phase::before_work), 2);
    EXPECT_EQ(code(either, Phase::at_work), 1);
  }
  for (const StatusCode failed :
       {StatusCode::io_error, StatusCode::cancelled, StatusCode::non_finite, StatusCode::internal}) {
    EXPECT_EQ(code(failed, Phase::before_work), 1);
    EXPECT_EQ(code(failed, Phase::at_work), 1);
  }
}

TEST(HumanBytes, HasThreeDigits) {
  EXPECT_EQ(human_bytes(0), "0 bytes");
  EXPECT_EQ(human_bytes(999), "999 bytes");
  EXPECT_EQ(human_bytes(1000), "1.00 kB");
  EXPECT_EQ(human_bytes(12'345'678), "12.3 MB");
  EXPECT_EQ(human_bytes(999'600), "1.00 MB");  // not "1000 kB"
  EXPECT_EQ(human_bytes(9'996'000), "10.0 MB");
  EXPECT_EQ(human_bytes(345'000'000'000), "345 GB");
}

TEST(JoinParts, PutsOneBlankLineBetween) {
  EXPECT_EQ(join_parts({"a", "b"}), "a\n\nb");
  EXPECT_EQ(join_parts({"a\n\n\n", "b\n"}), "a\n\nb\n");
  EXPECT_EQ(join_parts({"", "b", ""}), "b");
  EXPECT_EQ(join_parts({}), "");
}

TEST(WholeNumber, ReadsDecimalNumbersInTheRange) {
  const CLI::Validator validator = whole_number(0, 100);
  for (std::string good : {"0", "100", "010"}) EXPECT_EQ(validator(good), "");
  for (std::string bad : {"-1", "101", "", "1.5", "1e1", "0x1", " 1", "nan", "99999999999999999999"}) {
    EXPECT_THAT(validator(bad), HasSubstr("from 0 to 100")) << bad;
  }
}

TEST(SamplerFlags, SeedIsTheGivenOneOrRandom) {
  SamplerFlags flags;
  flags.seed = 5;
  EXPECT_EQ(flags.resolve().seed, 5U);
  flags.seed.reset();
  EXPECT_NE(flags.resolve().seed, flags.resolve().seed);  // equal once in 2^32
  flags.greedy = true;
  EXPECT_EQ(flags.resolve().temperature, 0.0F);
}

RunReport sample() {
  RunReport report;
  report.answer.text = "caf\xC3\xA9 \"\n";
  report.answer.prompt_tokens = 100;
  report.answer.generated_tokens = 11;
  report.answer.decode_steps = 10;
  report.answer.prefill_s = 0.5;
  report.answer.decode_s = 2;
  report.cache.n_tokens = 110;
  report.cache.bytes = 1000;
  report.cache.bytes_f16 = 4000;
  report.profile = "kivi-4";
  report.seed = 4294967294U;
  report.n_ctx = 110;
  report.n_ctx_train = 110;
  return report;
}

TEST(Report, JsonIsTheContractsDocument) {
  const std::string text = json_document(sample());
  const auto expected = nlohmann::ordered_json::parse(R"({"text": "café \"\n", "prompt_tokens": 100,
    "generated_tokens": 11, "prefill_s": 0.5, "decode_s": 2.0, "prefill_tok_s": 200.0, "decode_tok_s": 5.0,
    "kv": {"profile": "kivi-4", "bytes": 1000, "bytes_f16": 4000, "compression": 4.0}, "seed": 4294967294})");
  EXPECT_EQ(nlohmann::ordered_json::parse(text), expected);
  EXPECT_EQ(text.back(), '\n');
}

TEST(Report, NothingGeneratedGivesNoInfinities) {
  RunReport report = sample();
  report.answer = {};
  report.cache = {};
  const auto document = nlohmann::json::parse(json_document(report));
  EXPECT_EQ(document["prefill_tok_s"], 0.0);
  EXPECT_EQ(document["decode_tok_s"], 0.0);
  EXPECT_EQ(document["kv"]["compression"], 0.0);
}

TEST(Report, FullContextIsSaidLoudlyWithWhatToDo) {
  RunReport report = sample();
  report.answer.stop = StopReason::context_full;
  EXPECT_THAT(summary(report), HasSubstr("CONTEXT FULL"));
  EXPECT_THAT(stop_sentence(report), HasSubstr("shorter prompt"));
  report.n_ctx_train = 8192;
  EXPECT_THAT(stop_sentence(report), HasSubstr("--ctx (the model was made for 8192)"));
}

TEST(Report, SummaryHasTheFigures) {
  const std::string text = summary(sample());
  for (const char* part : {"100 tokens", "200.0 tok/s", "11 tokens", "5.0 tok/s", "kivi-4", "1.00 kB",
                           "4.00 kB", "ratio 4.00", "seed 4294967294", "ended its answer"}) {
    EXPECT_THAT(text, HasSubstr(part));
  }
}

std::vector<PrecisionRow> precision_rows() {
  PrecisionRow good;
  good.name = "layer 4 head 8";
  good.kernel = PrefillAttention::bf16_shift;
  good.rmse = 0.004;
  good.rows = 100;
  good.head_dim = 64;
  good.length = 2048;
  good.layer = 4;
  good.head = 8;
  good.qk_max = 113934;
  good.qk_max_shifted = 3393;
  good.resonance = 0.8;
  PrecisionRow bad = good;
  bad.kernel = PrefillAttention::fp16;
  bad.nan_rows = 7;
  PrecisionRow none = good;
  none.name = "uniform mean 30";
  none.layer = none.head = -1;
  none.nan_rows = none.rows;
  none.rmse = std::nan("");
  return {none, good, bad};
}

TEST(Precision, JsonHasTheKeysOfTheContract) {
  const auto list = nlohmann::json::parse(precision_json(precision_rows()));
  ASSERT_EQ(list.size(), 3U);
  EXPECT_EQ(list[1],
            nlohmann::json::parse(R"({"case": "layer 4 head 8", "kernel": "bf16-shift", "rmse": 0.004,
    "nan_rows": 0, "rows": 100, "head_dim": 64, "length": 2048, "layer": 4, "head": 8, "qk_max": 113934.0,
    "qk_max_shifted": 3393.0, "resonance": 0.8})"));
  EXPECT_TRUE(list[0]["rmse"].is_null());
  EXPECT_TRUE(list[0]["layer"].is_null());
}

TEST(Precision, TableHasALineACaseAndSaysWhatOverflowed) {
  const std::string table = precision_table(precision_rows());
  EXPECT_EQ(std::count(table.begin(), table.end(), '\n'), 3);
  for (const char* part : {"layer 4 head 8", "113934", "3393", "4.0e-03 NaN 7%", "uniform mean 30", "NaN"})
    EXPECT_THAT(table, HasSubstr(part));
}

TEST(EvalReport, ATasksTableSaysPointsAndHowSureTheyAre) {
  TaskRow f16, klt;
  f16.task = klt.task = "vt";
  f16.kv = "f16";
  klt.kv = "klt";
  f16.context = klt.context = 4096;
  f16.n = klt.n = 10;
  f16.score = klt.score_f16 = 0.8;
  klt.score = 0.75;
  klt.changed_text = 4;
  klt.difference.mean = -0.05;
  klt.difference.low = -0.125;
  klt.difference.better = 1;
  klt.difference.worse = 2;
  const std::string table = task_table({f16, klt});
  EXPECT_THAT(table, HasSubstr("80.0\n"));
  EXPECT_THAT(table, HasSubstr("75.0       1       2       1      -5.0  -12.5 to 0.0\n"));
  klt.difference.exact = true;
  EXPECT_THAT(task_table({klt}), HasSubstr("(exact)"));
}

}  // namespace
}  // namespace narrows::cli
