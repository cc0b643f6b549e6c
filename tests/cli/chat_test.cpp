// The chat, driven through a pipe: each turn feeds only what is new, commands, and what goes wrong.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cli/program.h"
#include "support/tiny_model.h"

namespace narrows {
namespace {

using testing::expect_refusal;
using testing::Finished;
using testing::run;
using testing::TempDir;

Finished chat(const std::string& input, std::vector<std::string> more = {}) {
  std::vector<std::string> arguments = {"run",    "-m", testing::model_path(), "--greedy",
                                        "--seed", "1",  "--threads",           "1"};
  arguments.insert(arguments.end(), more.begin(), more.end());
  return run(arguments, {.input = input});
}

int64_t number_after(const std::string& text, const std::string& before, size_t from = 0) {
  const size_t at = text.find(before, from);
  EXPECT_NE(at, std::string::npos) << "'" << before << "' is not in: " << text;
  return at == std::string::npos ? -1 : std::stoll(text.substr(at + before.size()));
}

struct Totals {
  int64_t prompt;
  int64_t generated;
  int64_t cached;
};

/// From the closing summary.
Totals totals(const Finished& finished) {
  const size_t last = finished.err.rfind("[prompt ");
  if (last == std::string::npos) {
    ADD_FAILURE() << "no summary in: " << finished.err;
    return {};
  }
  return {number_after(finished.err, "[prompt ", last), number_after(finished.err, "generated ", last),
          number_after(finished.err, " for ", last)};
}

TEST(Chat, EachTurnFeedsOnlyWhatIsNew) {
  const Finished one = chat("Name a colour.\n", {"-n", "8"});
  const Finished three =
      chat("Name a colour.\nAnd another one.\nOne more.", {"-n", "8"});  // the last line has no end
  ASSERT_EQ(three.exit_code, 0) << three.err;
  const Totals first = totals(one);
  const Totals all = totals(three);
  EXPECT_GT(all.prompt, first.prompt + 10);
  // Reading the conversation again each turn would count its tokens up to three times. What the cache holds
  // is what was fed; the last token of an answer is fed with the next turn, so it counts twice.
  EXPECT_LE(all.prompt + all.generated - all.cached, 3);
  EXPECT_GE(all.prompt + all.generated, all.cached);
  EXPECT_LT(all.prompt, 2 * first.prompt + 20);
  EXPECT_EQ(three.err.find("reading it again"), std::string::npos);
  EXPECT_EQ(three.out.rfind(one.out, 0), 0U);  // the first answer is the same
}

TEST(Chat, FilesStandBeforeTheFirstQuestionOnly) {
  const TempDir dir;
  std::string text;
  for (int i = 0; i < 50; ++i) text += "The box number " + std::to_string(i) + " is red. ";
  const Finished with_file = chat("Why?\nWhy?\n", {"-n", "4", "-f", dir.file("a.txt", text)});
  const Finished without = chat("Why?\nWhy?\n", {"-n", "4"});
  ASSERT_EQ(with_file.exit_code, 0) << with_file.err;
  const int64_t more = totals(with_file).prompt - totals(without).prompt;
  EXPECT_GT(more, 300);
  EXPECT_LT(more, 700);  // once, not twice
}

TEST(Chat, Commands) {
  const Finished finished =
      chat("/help\nHi\n/stats\n/reset\nHi\n/nonsense\n/exit\nnever asked\n", {"-n", "4"});
  EXPECT_EQ(finished.exit_code, 0) << finished.err;
  EXPECT_NE(finished.err.find("/reset   forget"), std::string::npos);
  EXPECT_NE(finished.err.find("no command /nonsense"), std::string::npos);
  const std::string answer = finished.out.substr(0, finished.out.find('\n') + 1);
  EXPECT_EQ(finished.out,
            answer + answer);  // after /reset the same question has the same answer, and two were asked
}

TEST(Chat, QuestionThatIsNotUtf8EndsAPipe) {
  const Finished finished = chat("ab\xFF\nHi\n", {"-n", "4"});
  EXPECT_EQ(finished.exit_code, 2);
  EXPECT_EQ(finished.out, "");
  EXPECT_NE(finished.err.find("narrows: the question is not valid UTF-8 at byte 2\n"), std::string::npos);
}

TEST(Chat, NoQuestionIsAnError) {
  expect_refusal(chat(""), 2, {"no question", "-p"});
  expect_refusal(chat("\n  \n"), 2, {"no question"});
  EXPECT_EQ(chat("/exit\n").exit_code, 0);
}

TEST(Chat, FullContextIsSaidAndTheNextTurnRefused) {
  const Finished finished = chat("Count from one to a hundred in words.\nGo on.\n", {"--ctx", "45"});
  EXPECT_EQ(finished.exit_code, 2);
  EXPECT_NE(finished.err.find("CONTEXT FULL"), std::string::npos) << finished.err;
  EXPECT_NE(finished.err.find("narrows: "), std::string::npos);
}

/// A model whose template leaves out what earlier answers said, as templates do with thoughts.
std::string forgetful_model(const TempDir& dir, testing::TinyModel tiny = {}) {
  tiny.edit_metadata = [](gguf_context* file) {
    gguf_set_val_str(file, "tokenizer.chat_template",
                     "{% for m in messages %}{% if m.role == 'assistant' %}A: (thought)\n"
                     "{% else %}Q: {{ m.content }}\n{% endif %}{% endfor %}"
                     "{% if add_generation_prompt %}A: {% endif %}");
  };
  return tiny.write(dir.path("forgetful.gguf"));
}

TEST(Chat, ATemplateThatShortensAnswersCostsTheAnswerOnly) {
  const TempDir dir;
  const std::string model = forgetful_model(dir), document(900, 'd');
  const std::string file = dir.file("document", document);
  for (const std::string kv : {"f16", "kivi-4", "klt", "sals-25"}) {
    const auto ask = [&](const std::string& input) {
      return run({"run", "-m", model, "--greedy", "--threads", "1", "--kv", kv, "-n", "20", "-f", file},
                 {.input = input});
    };
    const Finished one = ask("Why?\n"), three = ask("Why?\nWhen?\nWho?\n");
    ASSERT_EQ(three.exit_code, 0) << three.err;
    EXPECT_NE(three.err.find("rewritten"), std::string::npos) << three.err;
    // What is read again is some tens of tokens: the question, and up to a unit before the cut.
    const int64_t more = totals(three).prompt - totals(one).prompt;
    EXPECT_LT(more, 2 * (60 + 64)) << kv;
    EXPECT_GT(more, 20);
    if (kv != "f16") continue;
    // The answers are those to the whole conversation.
    const std::string whole = "Q: " + document + "\n\nWhy?\nA: (thought)\nQ: When?\nA: ";
    const Finished raw =
        run({"run", "-m", model, "--greedy", "--threads", "1", "--kv", kv, "-n", "20", "--raw", "-p", whole});
    EXPECT_EQ(three.out.substr(0, one.out.size() + raw.out.size()), one.out + raw.out);
  }
}

// A state cannot be turned back: the chat goes on from its last snapshot that has all in common.
TEST(Chat, AHybridReadsATurnsNewTokensAndFewMore) {
  const TempDir dir;
  testing::TinyModel hybrid;
  hybrid.architecture = "qwen35";
  hybrid.n_layer = 4;
  hybrid.attends_in = 4;
  hybrid.n_ctx = 8192;
  const std::string model = forgetful_model(dir, hybrid), file = dir.file("document", std::string(4000, 'd'));
  for (const std::string kv : {"f16", "klt"}) {
    std::string input;
    int64_t before = 0;
    for (int turn = 0; turn < 5; ++turn) {
      input += "Question " + std::to_string(turn) + "?\n";
      const Finished chat =
          run({"run", "-m", model, "--greedy", "--threads", "1", "--kv", kv, "-n", "300", "-f", file},
              {.input = input});
      ASSERT_EQ(chat.exit_code, 0) << chat.err;
      const int64_t read = totals(chat).prompt - before;
      before += read;
      if (turn == 0) continue;
      EXPECT_LE(read, 40 + 512) << kv << ", turn " << turn;  // "A: (thought)", the question
      EXPECT_NE(chat.err.find("rewritten"), std::string::npos);
    }
  }
}

TEST(Chat, ASignalEndsItWithItsSummary) {
  testing::Program program({"run", "-m", testing::model_path(), "--greedy", "--threads", "1"},
                           {.input = "Count from one to a thousand in words.\nNever asked.\n"});
  ASSERT_TRUE(program.wait_for_output(10));
  program.send(SIGTERM);
  const Finished finished = program.wait();
  EXPECT_EQ(finished.exit_code, 1) << finished.err;
  EXPECT_NE(finished.err.find("narrows: ended by a signal"), std::string::npos) << finished.err;
  EXPECT_NE(finished.err.find("stopped by a signal"), std::string::npos) << finished.err;
  EXPECT_NE(finished.err.find("[prompt "), std::string::npos) << finished.err;
}

}  // namespace
}  // namespace narrows
