// `narrows eval` over questions: the JSON with every answer, and a run that goes on where one was cut off.
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "cli/program.h"

namespace narrows {
namespace {

using testing::Finished;
using testing::run;
using testing::TempDir;
using Json = nlohmann::json;

std::vector<std::string> arguments(std::vector<std::string> more) {
  more.insert(more.begin(),
              {"eval", "-m", testing::model_path(), "--threads", "1", "--kv", "kivi-2", "--task"});
  return more;
}

Json eval(std::vector<std::string> more) {
  more.emplace_back("--json");
  const Finished finished = run(arguments(std::move(more)));
  EXPECT_EQ(finished.exit_code, 0) << finished.err;
  return Json::parse(finished.out, nullptr, false);
}

TEST(EvalTasks, RulerHasARowATaskAndProfileAndEveryAnswer) {
  const Json rows = eval({"ruler", "--ruler", "niah_single_1,vt", "--context", "600", "--samples", "2"});
  ASSERT_EQ(rows.size(), 6U);  // two tasks and all of them, f16 and kivi-2
  EXPECT_EQ(rows[0]["task"], "niah_single_1");
  EXPECT_EQ(rows[0]["kv"], "f16");
  EXPECT_EQ(rows[3]["task"], "vt");
  EXPECT_EQ(rows[3]["kv"], "kivi-2");
  EXPECT_EQ(rows[5]["task"], "all");
  for (const Json& row : rows) {
    EXPECT_EQ(row["context"], 600);
    for (const char* key : {"score", "score_f16"}) {
      EXPECT_GE(row[key], 0);
      EXPECT_LE(row[key], 1);
    }
    EXPECT_LE(row["low"], row["difference"]);
    EXPECT_GE(row["high"], row["difference"]);
    if (row["task"] == "all") continue;
    EXPECT_EQ(row["n"], 2);
    ASSERT_EQ(row["answers"].size(), 2U);
    EXPECT_LE(row["answers"][1]["prompt_tokens"], 600);
    EXPECT_TRUE(row["answers"][1]["answer"].is_string());
  }
  // SmolLM2 finds a number among sentences that say nothing.
  EXPECT_GT(rows[0]["score"], 0);
}

TEST(EvalTasks, AFileOfQuestionsGoesOnWhereItWas) {
  const TempDir dir;
  const std::string questions = dir.file(
      "q.jsonl",
      "{\"input\": \"What is 1 + 1?\", \"answer\": \"2\"}\n"
      "{\"input\": \"What is 2 + 2? Answer with the number.\", \"answer\": \"4\"}\n"
      "{\"messages\": [{\"role\": \"user\", \"content\": \"Say blue.\"}], \"outputs\": [\"blue\"]}\n");
  const std::string kept = dir.path("kept.jsonl");
  const std::vector<std::string> all = {"file",         "-f", questions,  "--few-shot", "1",
                                        "--max-tokens", "6",  "--resume", kept};
  const Json rows = eval(all);
  ASSERT_EQ(rows.size(), 2U);
  EXPECT_EQ(rows[1]["n"], 2);
  EXPECT_EQ(rows[1]["answers"][0]["index"], 2);  // the line
  EXPECT_LE(rows[1]["answers"][0]["answer_tokens"], 6);
  // The last answer is cut off, as by a kill: the same rows again, out of the file but for that one.
  std::string content;
  {
    std::ifstream in(kept, std::ios::binary);
    content.assign(std::istreambuf_iterator<char>(in), {});
  }
  std::ofstream(kept, std::ios::binary | std::ios::trunc) << content.substr(0, content.size() - 10);
  EXPECT_EQ(eval(all), rows);
  std::ifstream in(kept, std::ios::binary);
  EXPECT_EQ(std::string(std::istreambuf_iterator<char>(in), {}), content);
  // Other options are another run.
  std::vector<std::string> other = all;
  other[6] = "7";
  testing::expect_refusal(run(arguments(other)), 2, {"kept.jsonl", "max-tokens", "6", "7"});
}

TEST(EvalTasks, ALongTextIsJudgedByPosition) {
  const Json rows = eval({"long", "--context", "300", "--tokens", "32"});
  ASSERT_EQ(rows.size(), 1U);
  EXPECT_EQ(rows[0]["kv"], "kivi-2");
  ASSERT_EQ(rows[0]["buckets"].size(), 8U);
  EXPECT_EQ(rows[0]["buckets"][7]["to"], 32);
  EXPECT_GT(rows[0]["kl_mean"], 0);
  EXPECT_LE(rows[0]["drift_low"], rows[0]["drift_high"]);
  EXPECT_FALSE(rows[0]["texts"][0].get<std::string>().empty());
}

}  // namespace
}  // namespace narrows
