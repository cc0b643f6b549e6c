// Everything that can be wrong before a model is read: exit code 2, one sentence on stderr, nothing on
// stdout. Also help, version, and an output that cannot be written.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cli/program.h"

namespace narrows {
namespace {

using testing::expect_refusal;
using testing::Finished;
using testing::run;
using testing::TempDir;
using Words = std::vector<std::string>;
using namespace std::string_literals;

/// `narrows run -m <anything> -p x` and these: flags are looked at before the model.
Finished run_with(const std::vector<std::string>& more) {
  std::vector<std::string> arguments = {"run", "-m", "no-such-model.gguf", "-p", "x"};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return run(arguments);
}

TEST(BadInput, NoCommandOrAnUnknownOne) {
  expect_refusal(run({}), 2, {"run", "inspect", "--help"});
  expect_refusal(run({"sing"}), 2, {"'sing'", "run", "inspect"});
  expect_refusal(run({"--sing"}), 2, {"--help"});
  expect_refusal(run({"run"}), 2, {"--model", "required"});
  expect_refusal(run({"run", "-m"}), 2, {"--model"});
  expect_refusal(run({"inspect"}), 2, {"--model", "narrows inspect --help"});
  expect_refusal(run_with({"--sing"}), 2, {"--sing"});
  expect_refusal(run_with({"more"}), 2, {"more"});
  expect_refusal(run_with({"-p", "y"}), 2, {"--prompt"});
}

TEST(BadInput, ModelsThatAreNone) {
  const TempDir dir;
  for (const std::vector<std::string>& command : {std::vector<std::string>{"run", "-p", "x"}, {"inspect"}}) {
    const auto with_model = [&](const std::string& path) {
      std::vector<std::string> arguments = command;
      arguments.insert(arguments.end(), {"-m", path});
      return run(arguments);
    };
    expect_refusal(with_model(dir.path("none.gguf")), 2, {"none.gguf"});
    expect_refusal(with_model(dir.path("")), 2, {dir.path("")});
    expect_refusal(with_model(dir.file("empty.gguf", "")), 2, {"empty.gguf"});
    expect_refusal(with_model(dir.file("text.gguf", "This is not a model, it is a text of some length.")), 2,
                   {"GGUF"});
    expect_refusal(with_model(dir.file("head.gguf", "GGUF\x03\0\0\0"s)), 2, {"head.gguf"});
    expect_refusal(with_model(dir.file("huge.gguf", "GGUF\x03\0\0\0"s + std::string(16, '\x7F'))), 2,
                   {"huge.gguf"});
    expect_refusal(with_model("/dev/null"), 2, {"/dev/null"});
    expect_refusal(with_model(""), 2, {});
  }
}

/// Looked at before the model.
TEST(BadInput, TasksOfQuestions) {
  const TempDir dir;
  const auto eval = [](std::vector<std::string> more) {
    more.insert(more.begin(), {"eval", "-m", "no-such-model.gguf", "--task"});
    return run(more);
  };
  expect_refusal(eval({"rules"}), 2, {"rules", "ruler"});
  expect_refusal(eval({"ruler", "--ruler", "vt,nt"}), 2, {"nt", "niah_multivalue"});
  expect_refusal(eval({"ruler", "--samples", "0"}), 2, {"--samples", "1"});
  expect_refusal(eval({"ruler", "-f", dir.path("none.txt")}), 2, {"none.txt"});
  expect_refusal(eval({"long", "--kv", "f16"}), 2, {"--kv"});
  expect_refusal(run({"eval", "-m", "none.gguf", "-f", "x", "--kv", "klt", "--peer-kv", "f16,q9"}), 2,
                 {"q9", "q4_0"});
  expect_refusal(eval({"long", "--context", "10,20"}), 2, {"--context"});
  expect_refusal(eval({"file"}), 2, {"-f"});
  expect_refusal(eval({"file", "-f", dir.path("none.jsonl"), "--context", "10,20"}), 2, {"--context"});
  expect_refusal(eval({"file", "-f", dir.path("none.jsonl")}), 2, {"none.jsonl"});
  expect_refusal(
      eval({"file", "-f", dir.file("q.jsonl", "{\"input\": \"A\", \"answer\": 1}\n{\"input\": 2}\n\xFF\n")}),
      2, {"q.jsonl", "line 2 ", "line 3 "});
  const std::string one = dir.file("one.jsonl", "{\"input\": \"A\", \"answer\": 1}\n");
  expect_refusal(eval({"file", "-f", one, "--few-shot", "1"}), 2, {"--few-shot"});
  expect_refusal(eval({"file", "-f", one, "--score", "bleu"}), 2, {"bleu", "rouge-l"});
}

TEST(BadInput, RopeAndChatTemplates) {
  for (const Words& flags : {Words{"--rope-scaling", "longrope"},
                             {"--rope-freq-base", "0"},
                             {"--rope-freq-scale", "-1"},
                             {"--rope-scale", "0"},
                             {"--yarn-orig-ctx", "0"},
                             {"--yarn-ext-factor", "-1"},
                             {"--yarn-attn-factor", "x"},
                             {"--yarn-beta-slow", "-2"},
                             {"--yarn-beta-fast", "1e9"}})
    expect_refusal(run_with(flags), 2, {flags[0]});
  expect_refusal(run_with({"--rope-scale", "2", "--rope-freq-scale", "0.5"}), 2, {"--rope-scale"});
  expect_refusal(run_with({"--chat-template", "x", "--chat-template-file", "y"}), 2, {"--chat-template"});
  expect_refusal(run_with({"--chat-template-kwargs", "{"}), 2, {"--chat-template-kwargs", "JSON object"});
  expect_refusal(run_with({"--chat-template-kwargs", "[1]"}), 2, {"JSON object"});
  const TempDir dir;
  expect_refusal(run_with({"--chat-template-file", dir.path("none")}), 2, {"none"});
  expect_refusal(run_with({"--chat-template-file", dir.file("empty", "")}), 2, {"empty", "chat template"});
}

TEST(BadInput, Profiles) {
  expect_refusal(run_with({"--kv", "f17"}), 2,
                 {"'f17'", "f16, kivi-4, sals-25, kivi-2, klt, sals-12.5, klt-10x"});
  expect_refusal(run_with({"--kv", ""}), 2, {"f16"});
  expect_refusal(run_with({"--kv", "sals-25:rank=2"}), 2, {"'rank=2'", "budget="});
  expect_refusal(run_with({"--kv", "sals-25:budget=0"}), 2, {"budget=", "from 1"});
  expect_refusal(run_with({"--kv", "sals-25:\nbudget=1"}), 2, {});  // and still one line
}

TEST(BadInput, Prefill) {
  expect_refusal(run_with({"--prefill", "thin"}), 2, {"'thin'", "dense, sparse or sparse:mass=X"});
  expect_refusal(run_with({"--prefill", "sparse:mass=2"}), 2, {"mass", "at most 1", "'2'"});
}

TEST(BadInput, ImpossibleNumbers) {
  for (const char* value : {"-1", "abc", "1.5", "99999999999", "0x10", ""}) {
    expect_refusal(run_with({"-n", value}), 2, {"tokens-to-generate", "from 0"});
  }
  for (const char* value : {"0", "-8", "1e3", "99999999999999999999"}) {
    expect_refusal(run_with({"--ctx", value}), 2, {"--ctx", "from 1"});
  }
  for (const char* value : {"0", "-1", "100000"})
    expect_refusal(run_with({"--threads", value}), 2, {"--threads"});
  for (const char* value : {"0", "-1", "1.5", "9999999999"})
    expect_refusal(run_with({"--memory-mb", value}), 2, {"--memory-mb", "from 1"});
  for (const char* value : {"gpu", "CUDA", "cuda:", "cuda:-1", "cuda:1x"})
    expect_refusal(run_with({"--device", value}), 2, {"--device", "cuda:N", "auto"});
  for (const char* value : {"-1", "4294967295", "x"})
    expect_refusal(run_with({"--seed", value}), 2, {"--seed"});
  for (const char* value : {"-0.5", "nan", "inf", "hot", "1e-9"})
    expect_refusal(run_with({"--temp", value}), 2, {"temp"});
  for (const char* flag : {"--top-p", "--min-p"}) {
    for (const char* value : {"-0.1", "1.1", "nan"})
      expect_refusal(run_with({flag, value}), 2, {flag + 2, "0 to 1"});
  }
  expect_refusal(run_with({"--top-k", "-1"}), 2, {"--top-k"});
  expect_refusal(run_with({"--repeat-penalty", "0"}), 2, {"repeat penalty"});
  for (const char* value : {"0", "-1", "many"}) {
    expect_refusal(run({"inspect", "-m", "x", "--context", value}), 2, {"--context"});
  }
}

TEST(BadInput, PromptFiles) {
  const TempDir dir;
  expect_refusal(run_with({"-f", dir.path("none.txt")}), 2, {"none.txt", "no such file"});
  expect_refusal(run_with({"-f", dir.path("")}), 2, {"folder"});
  expect_refusal(run_with({"-f", dir.file("good.txt", "a"), "-f", dir.file("bad.txt", "0123456\xFF")}), 2,
                 {"bad.txt", "UTF-8", "byte 7"});
  expect_refusal(run_with({"-f", dir.file("utf16.txt",
                                          "\xFF\xFE"
                                          "a\0"s)}),
                 2, {"utf16.txt", "byte 0"});
  expect_refusal(run({"inspect", "-m", "x", "-f", dir.path("bad.txt")}), 2, {"bad.txt", "byte 7"});
}

TEST(BadInput, Prompts) {
  const TempDir dir;
  expect_refusal(run({"run", "-m", "x", "-p", ""}), 2, {"empty"});
  expect_refusal(run({"run", "-m", "x", "-p", "", "-f", dir.file("empty.txt", "")}), 2, {"empty"});
  expect_refusal(run({"run", "-m", "x", "-p", "ab\xC3"}), 2, {"-p", "byte 2"});
  expect_refusal(run({"run", "-m", "x", "-p", "a", "--system", "\x80"}), 2, {"--system", "byte 0"});
  expect_refusal(run({"run", "-m", "x", "--json"}), 2, {"--json", "-p"});
  expect_refusal(run({"run", "-m", "x", "--raw"}), 2, {"--raw", "-p"});
  expect_refusal(run({"run", "-m", "x", "--raw", "-p", "a", "--system", "b"}), 2, {"--system"});
}

// A typing error in the variable must not silently run other kernels than were meant.
TEST(BadInput, AnUnknownForcedTarget) {
  ::setenv("NARROWS_FORCE_TARGET", "AVX9", 1);
  const Finished finished = run({"--version"});
  ::unsetenv("NARROWS_FORCE_TARGET");
  expect_refusal(finished, 2, {"AVX9", "AVX2"});
}

TEST(Help, NamesEveryFlagAndHasAnExample) {
  for (const std::vector<std::string>& command :
       {std::vector<std::string>{"--help"}, {"run", "--help"}, {"inspect", "-h"}}) {
    const Finished help = run(command);
    EXPECT_EQ(help.exit_code, 0);
    EXPECT_EQ(help.err, "");
    EXPECT_NE(help.out.find("Example"), std::string::npos);
    EXPECT_NE(help.out.find("narrows "), std::string::npos);
  }
  const std::string help = run({"run", "--help"}).out;
  for (const char* flag :
       {"-m,", "-f,", "-p,", "-n,", "--kv", "--basis", "--ctx", "--seed", "--temp", "--raw", "--threads",
        "--json", "--system", "--top-k", "--top-p", "--min-p", "--repeat-penalty", "--greedy"}) {
    EXPECT_NE(help.find(flag), std::string::npos) << flag;
  }
}

TEST(Help, VersionIsOneLine) {
  const Finished version = run({"--version"});
  EXPECT_EQ(version.exit_code, 0);
  EXPECT_EQ(version.out.rfind("narrows ", 0), 0U);
  EXPECT_EQ(std::count(version.out.begin(), version.out.end(), '\n'), 1);
  EXPECT_EQ(version.out.find("unknown"), std::string::npos);  // the build passes the number on
}

TEST(Output, ThatCannotBeWrittenIsAFailure) {
  // Without care: SIGPIPE's death, or success although nothing arrived.
  expect_refusal(run({"--help"}, {.out_path = "/dev/full"}), 1, {"standard output"});
  expect_refusal(run({"--help"}, {.out_is_closed_pipe = true}), 1, {"standard output"});
}

// A stream that is closed is not the next file that the program opens.
TEST(BadInput, MissingStreams) {
  expect_refusal(run({"--help"}, {.closed_stream = 1}), 1, {"standard output"});
  EXPECT_EQ(run({"--help"}, {.closed_stream = 2}).exit_code, 0);
  EXPECT_EQ(run({"--help"}, {.closed_stream = 0}).exit_code, 0);
  const TempDir dir;
  const std::string text = dir.file("text.gguf", "This is not a model, it is a text of some length.");
  for (const int fd : {0, 2})
    EXPECT_EQ(run({"run", "-m", text, "-p", "x"}, {.closed_stream = fd}).exit_code, 2);
}

}  // namespace
}  // namespace narrows
