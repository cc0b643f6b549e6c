// `narrows run` with the model: repeatable answers, the JSON document, limits, Ctrl-C, an output that breaks
// off.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/program.h"

namespace narrows {
namespace {

using testing::expect_refusal;
using testing::Finished;
using testing::Program;
using testing::run;
using testing::TempDir;
using Json = nlohmann::json;

/// One thread: what is tested is the command line, and other programs may be using the cores.
std::vector<std::string> arguments(const std::vector<std::string>& more) {
  std::vector<std::string> all = {"run", "-m", testing::model_path(), "--threads", "1"};
  all.insert(all.end(), more.begin(), more.end());
  return all;
}

Finished run_model(const std::vector<std::string>& more) { return run(arguments(more)); }

Json json_of(const std::vector<std::string>& more) {
  const Finished finished = run_model(more);
  EXPECT_EQ(finished.exit_code, 0) << finished.err;
  Json document = Json::parse(finished.out, nullptr, false);
  EXPECT_FALSE(document.is_discarded()) << finished.out;
  return document;
}

/// The number that follows a text in the summary.
int64_t number_after(const std::string& text, const std::string& before) {
  const size_t at = text.find(before);
  EXPECT_NE(at, std::string::npos) << "'" << before << "' is not in: " << text;
  return at == std::string::npos ? -1 : std::stoll(text.substr(at + before.size()));
}

/// A prompt that the model goes on with for ever.
const char* const kEndless = "la la la la la la la la la la la la la la la la";

TEST(Run, JsonHasTheKeysOfTheContractAndTheTextOfTheStream) {
  const std::vector<std::string> prompt = {"--raw", "-p", kEndless, "-n", "12", "--temp", "0", "--seed", "9"};
  std::vector<std::string> as_json = prompt;
  as_json.emplace_back("--json");
  const Json document = json_of(as_json);
  std::vector<std::string> keys;
  for (const auto& item : document.items()) keys.push_back(item.key());
  EXPECT_EQ(keys, (std::vector<std::string>{"decode_s", "decode_tok_s", "generated_tokens", "kv", "prefill_s",
                                            "prefill_tok_s", "prompt_tokens", "seed", "text"}));
  EXPECT_EQ(document["generated_tokens"], 12);
  EXPECT_EQ(document["seed"], 9);
  EXPECT_EQ(document["kv"]["profile"], "klt");  // the default
  EXPECT_EQ(document["kv"].size(), 4U);
  EXPECT_GT(document["kv"]["bytes"], 0);
  EXPECT_GT(document["prefill_tok_s"], 0);
  EXPECT_GT(document["decode_tok_s"], 0);

  const Finished streamed = run_model(prompt);
  EXPECT_EQ(streamed.out, document["text"].get<std::string>() + "\n");
  EXPECT_NE(streamed.err.find("stopped at -n"), std::string::npos);
}

TEST(Run, ASavedSessionIsNotReadAgain) {
  const TempDir dir;
  std::string words;
  for (int i = 0; i < 300; ++i) words += "line " + std::to_string(i) + "\n";
  const std::string file = dir.path("licence.session"), text = dir.file("text", words);
  const auto ask = [&](const std::string& question, const std::vector<std::string>& more) {
    std::vector<std::string> all = {"-f", text, "-p", question, "-n", "8", "--temp", "0", "--json"};
    all.insert(all.end(), more.begin(), more.end());
    return json_of(all);
  };
  const Json first = ask("What is it?", {"--session", file});
  EXPECT_EQ(first["cached_tokens"], 0);
  ASSERT_GT(first["prompt_tokens"], 600);
  const Json again = ask("What is it?", {"--session", file});
  EXPECT_GT(again["cached_tokens"].get<int64_t>(), first["prompt_tokens"].get<int64_t>() - 256 - 128 - 20);
  EXPECT_EQ(again["text"], first["text"]);
  const Json other = ask("Who wrote that?", {"--session", file});
  EXPECT_GT(other["cached_tokens"], 0);
  EXPECT_EQ(other["text"], ask("Who wrote that?", {"--session", dir.path("new")})["text"]);

  expect_refusal(run_model({"-p", "Hi", "--session", file, "--kv", "f16"}), 2, {"--kv klt"});
  expect_refusal(run_model({"-p", "Hi", "--session", text}), 2, {"is not a saved session"});
  expect_refusal(run_model({"--session", file}), 2, {"--session needs a prompt"});
}

TEST(Run, PrintedSeedIsTheOneThatWasUsed) {
  const std::vector<std::string> prompt = {"-p", "Invent a name for a boat.", "-n", "16", "--temp", "1.5"};
  const Finished random = run_model(prompt);
  ASSERT_EQ(random.exit_code, 0) << random.err;
  std::vector<std::string> again = prompt;
  again.insert(again.end(), {"--seed", std::to_string(number_after(random.err, "seed "))});
  EXPECT_EQ(run_model(again).out, random.out);
  EXPECT_NE(run_model(prompt).out, random.out);  // another seed, at a temperature where that shows
}

TEST(Run, GreedyIsTemperatureZero) {
  const Finished greedy = run_model({"-p", "Hi", "-n", "8", "--greedy"});
  EXPECT_EQ(greedy.out, run_model({"-p", "Hi", "-n", "8", "--temp", "0"}).out);
  EXPECT_EQ(greedy.out, run_model({"-p", "Hi", "-n", "8", "--greedy"}).out);
}

TEST(Run, PartsOfThePromptAreJoinedByBlankLines) {
  const TempDir dir;
  const Json parts = json_of({"--raw", "-f", dir.file("a", "One two.\n"), "-f", dir.file("b", "Three\n\n\n"),
                              "-p", "-4 + 5?", "-n", "6", "--greedy", "--json"});
  const Json whole =
      json_of({"--raw", "-p", "One two.\n\nThree\n\n-4 + 5?", "-n", "6", "--greedy", "--json"});
  EXPECT_EQ(parts["prompt_tokens"], whole["prompt_tokens"]);
  EXPECT_EQ(parts["text"], whole["text"]);
}

TEST(Run, ChatTemplateAndSystemMessageReachTheModel) {
  // The template's own system message has 20 tokens or so; "Be brief." has fewer, and --raw has none.
  const auto tokens = [](const std::vector<std::string>& more) {
    std::vector<std::string> all = {"-p", "Hi", "-n", "0", "--json"};
    all.insert(all.end(), more.begin(), more.end());
    return json_of(all)["prompt_tokens"].get<int64_t>();
  };
  EXPECT_EQ(tokens({"--raw"}), 1);
  EXPECT_GT(tokens({}), tokens({"--system", "Be brief."}));
  EXPECT_GT(tokens({"--system", "Be brief."}), 8);
}

TEST(Run, NoTokensAreNoText) {
  const Json document = json_of({"-p", "Hi", "-n", "0", "--json"});
  EXPECT_EQ(document["text"], "");
  EXPECT_EQ(document["generated_tokens"], 0);
}

TEST(Run, TooLongPromptIsRefusedWithBothCounts) {
  const Finished finished =
      run_model({"-p", "one two three four five six seven eight nine ten", "--ctx", "16"});
  expect_refusal(finished, 2, {"16", "tokens", "--ctx"});
  const int64_t n = json_of(
      {"-p", "one two three four five six seven eight nine ten", "-n", "0", "--json"})["prompt_tokens"];
  expect_refusal(finished, 2, {std::to_string(n)});
}

TEST(Run, FullContextIsSaidLoudly) {
  const std::string n_prompt =
      std::to_string(json_of({"--raw", "-p", kEndless, "-n", "0", "--json"})["prompt_tokens"].get<int64_t>());
  const Finished exact = run_model({"--raw", "-p", kEndless, "--ctx", n_prompt, "--greedy"});
  EXPECT_EQ(exact.exit_code, 0) << exact.err;
  EXPECT_NE(exact.err.find("CONTEXT FULL"), std::string::npos) << exact.err;
  EXPECT_EQ(number_after(exact.err, "generated "), 1);  // the prompt's own logits give one token
}

TEST(Run, CtrlCWhileGeneratingEndsWithTheSummary) {
  Program program(arguments({"--raw", "-p", kEndless, "--greedy"}));
  ASSERT_TRUE(program.wait_for_output(30));
  program.interrupt();
  const Finished finished = program.wait();
  EXPECT_EQ(finished.exit_code, 0) << finished.err;
  EXPECT_NE(finished.err.find("stopped by Ctrl-C"), std::string::npos) << finished.err;
  EXPECT_LT(number_after(finished.err, "generated "), 8000);
}

TEST(Run, CtrlCWhileReadingThePromptIsAFailure) {
  const TempDir dir;
  std::string text;
  for (int i = 0; i < 700; ++i) text += "Sentence number " + std::to_string(i) + ".\n";
  Program program(arguments({"-f", dir.file("long.txt", text), "-p", "Sum up.", "-n", "0"}));
  std::this_thread::sleep_for(std::chrono::milliseconds(400));  // loading or reading: both must notice
  program.interrupt();
  expect_refusal(program.wait(), 1, {"interrupted while reading the prompt"});
}

TEST(Run, OutputThatBreaksOffEndsTheRun) {
  const testing::ProgramOptions full = {.out_path = "/dev/full"};
  expect_refusal(run(arguments({"--raw", "-p", kEndless}), full), 1, {"standard output", "No space left"});
  expect_refusal(run(arguments({"-p", "Hi", "-n", "2", "--json"}), full), 1, {"standard output"});
  const testing::ProgramOptions closed = {.out_is_closed_pipe = true};
  expect_refusal(run(arguments({"--raw", "-p", kEndless}), closed), 1, {"standard output", "Broken pipe"});
}

/// A text of more than 900 tokens, and the tokens that a session of it can give to another question at least.
std::string numbered_lines() {
  std::string words;
  for (int i = 0; i < 300; ++i) words += "line " + std::to_string(i) + "\n";
  return words;
}

/// What the session in the file spares a run with another question, whose answer is that of a fresh run.
void expect_it_goes_on(const std::string& file, const std::string& text, int64_t at_least) {
  const TempDir dir;
  const auto ask = [&](const std::string& session) {
    return json_of(
        {"-f", text, "-p", "Which line is last?", "-n", "6", "--greedy", "--json", "--session", session});
  };
  const Json next = ask(file), fresh = ask(dir.path("fresh"));
  EXPECT_GE(next["cached_tokens"], at_least);
  EXPECT_EQ(fresh["cached_tokens"], 0);
  EXPECT_EQ(next["text"], fresh["text"]);
}

TEST(Run, ASignalWhileAnsweringSavesTheSession) {
  for (const int number : {SIGTERM, SIGHUP}) {
    const TempDir dir;
    const std::string text = dir.file("text", numbered_lines()), file = dir.path("s");
    Program program(arguments(
        {"-f", text, "-p", "Repeat all of it.", "--greedy", "--repeat-penalty", "1", "--session", file}));
    ASSERT_TRUE(program.wait_for_note("tokens saved")) << "once the prompt is read";
    ASSERT_TRUE(std::filesystem::exists(file));
    ASSERT_TRUE(program.wait_for_output(4));
    program.send(number);
    const Finished finished = program.wait();
    EXPECT_EQ(finished.exit_code, 1) << finished.err;
    EXPECT_NE(finished.err.find("narrows: ended by a signal"), std::string::npos) << finished.err;
    expect_it_goes_on(file, text, 700);
  }
}

TEST(Run, KilledWhileAnsweringLeavesWhatWasRead) {
  const TempDir dir;
  const std::string text = dir.file("text", numbered_lines()), file = dir.path("s");
  Program program(arguments({"-f", text, "-p", "Repeat all of it.", "--greedy", "--session", file}));
  ASSERT_TRUE(program.wait_for_output(4));
  program.send(SIGKILL);
  (void)program.wait();
  expect_it_goes_on(file, text, 700);
}

TEST(Run, AnOutputThatBreaksOffSavesTheSession) {
  const TempDir dir;
  const std::string text = dir.file("text", numbered_lines()), file = dir.path("s");
  const Finished finished =
      run(arguments({"-f", text, "-p", "Why?", "--greedy", "--session", file}), {.out_is_closed_pipe = true});
  EXPECT_EQ(finished.exit_code, 1);
  EXPECT_NE(finished.err.find("Broken pipe"), std::string::npos) << finished.err;
  EXPECT_NE(finished.err.find("tokens saved"), std::string::npos) << finished.err;
  expect_it_goes_on(file, text, 700);
}

TEST(Run, ASignalWhileReadingIsAFailure) {
  const TempDir dir;
  std::string text;
  for (int i = 0; i < 700; ++i) text += "Sentence number " + std::to_string(i) + ".\n";
  const std::string file = dir.path("s");
  Program program(
      arguments({"-f", dir.file("long.txt", text), "-p", "Sum up.", "-n", "0", "--session", file}));
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  program.send(SIGTERM);
  // While the model is loaded the signal ends the program at once.
  const Finished finished = program.wait();
  EXPECT_TRUE(finished.exit_code == 1 || finished.exit_code == -SIGTERM) << finished.exit_code;
  EXPECT_EQ(finished.out, "");
}

TEST(Run, AClosedInputIsEmptyAndAByteOrderMarkNoToken) {
  // What follows a closed standard input: the model's file, read as questions.
  const Finished closed = run(arguments({"-n", "4"}), {.closed_stream = 0});
  expect_refusal(closed, 2, {"there is no question"});
  EXPECT_EQ(run(arguments({"-p", "Hi", "-n", "2"}), {.closed_stream = 0}).exit_code, 0);
  expect_refusal(run(arguments({"-p", "Hi", "-n", "2"}), {.closed_stream = 1}), 1, {"standard output"});

  const TempDir dir;
  const auto tokens = [&](const std::string& text) {
    return json_of({"--raw", "-f", dir.file("text", text), "-n", "0", "--json"})["prompt_tokens"]
        .get<int64_t>();
  };
  EXPECT_EQ(tokens("\xEF\xBB\xBFHello"), tokens("Hello"));
  EXPECT_GT(tokens("Hello\xEF\xBB\xBF"), tokens("Hello"));  // elsewhere it is text
  const auto chat = [&](const std::string& input) {
    return run(arguments({"-n", "4", "--greedy"}), {.input = input});
  };
  const Finished with = chat("\xEF\xBB\xBFHi\n"), without = chat("Hi\n");
  EXPECT_EQ(with.out, without.out);
  EXPECT_EQ(number_after(with.err, "[prompt "), number_after(without.err, "[prompt "));
}

TEST(Run, CutOffModelsAndMissingBasesAreRefused) {
  const TempDir dir;
  std::ifstream model(testing::model_path(), std::ios::binary);
  for (const size_t size :
       {size_t{100'000}, size_t{4'000'000}}) {  // within the vocabulary; within the weights
    std::string head(size, '\0');
    model.seekg(0);
    ASSERT_TRUE(model.read(head.data(), static_cast<std::streamsize>(size)));
    expect_refusal(run({"run", "-p", "x", "-m", dir.file("cut.gguf", head)}), 2, {"cut.gguf"});
  }
  expect_refusal(run_model({"-p", "x", "--kv", "sals-25", "--basis", dir.path("none.gguf")}), 2,
                 {"none.gguf"});
  // A pipe would be waited for; here both of its ends are open, so that nothing waits where it is read.
  const std::string pipe = dir.path("pipe");
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  const int ends = ::open(pipe.c_str(), O_RDWR | O_CLOEXEC);
  for (const std::string& path : {pipe, std::string("/dev/zero")})
    expect_refusal(run_model({"-p", "x", "--kv", "sals-25", "--basis", path}), 2, {path, "device or pipe"});
  ::close(ends);
}

}  // namespace
}  // namespace narrows
