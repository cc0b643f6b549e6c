// capi_fixture FOLDER: writes tiny.gguf there, and on standard output, as JSON, what the C++ API makes of it:
// for the tests of the C API and of the examples in other languages.
#include <cstdio>
#include <fstream>

#include "support/session.h"

namespace narrows::testing {
namespace {

constexpr int kSteps = 24;

void print(const char* name, std::span<const Token> tokens, const char* end = ",\n") {
  std::printf("\"%s\": [", name);
  for (size_t i = 0; i < tokens.size(); ++i) std::printf("%s%d", i > 0 ? ", " : "", tokens[i]);
  std::printf("]%s", end);
}

int make(const std::string& folder) {
  TinyModel tiny;
  tiny.n_layer = 4;
  tiny.n_ctx = 4096;
  const std::string path = tiny.write(folder + "/tiny.gguf");
  auto model = Model::load(path);
  if (!model.ok()) return 1;
  const auto prompt = random_tokens(900);
  std::printf("{\"path\": \"%s\", \"n_vocab\": %d,\n", path.c_str(),
              static_cast<int>((*model)->info().n_vocab));
  print("prompt", prompt);
  for (const char* kv : {"f16", "klt"}) {
    auto session = make_session(*model, {.kv = kv, .n_threads = 2});
    if (!session->prefill(prompt).ok()) return 1;
    const auto logits = copy(session->logits());
    print(kv, greedy(*session, kSteps));
    std::printf("\"%s_logit\": %.9g,\n", kv,
                static_cast<double>(logits[static_cast<size_t>(argmax(logits))]));
  }
  // As the examples do it: their defaults, until the text ends.
  const std::string text = "The quick brown fox";
  SessionOptions options;
  options.kv = kv(kDefaultProfile);
  auto session = Session::create(*model, options);
  const auto tokens = (*model)->tokenizer().encode(text, true, false);
  if (!session.ok() || !tokens.ok() || !(*session)->prefill(*tokens).ok()) return 1;
  std::vector<Token> said;
  for (const Token t : greedy(**session, kSteps)) {
    if ((*model)->tokenizer().is_end(t)) break;
    said.push_back(t);
  }
  std::printf("\"text\": \"%s\",\n", text.c_str());
  print("text_tokens", *tokens);
  print("said", said, "}\n");
  return 0;
}

}  // namespace
}  // namespace narrows::testing

int main(int argc, char** argv) { return argc == 2 ? narrows::testing::make(argv[1]) : 2; }
