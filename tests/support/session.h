// Short ways to a model and a session, for tests that are about what comes after.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "narrows/engine.h"
#include "support/compare.h"
#include "support/tiny_model.h"
#include "temp_dir.h"

namespace narrows::testing {

/// A tiny model's file and the model, alive together.
struct LoadedTiny {
  TempDir dir;
  std::string path;
  std::shared_ptr<const Model> model;

  explicit LoadedTiny(const TinyModel& tiny, const LoadOptions& options = {})
      : path(tiny.write(dir.path("tiny.gguf"))) {
    auto loaded = Model::load(path, options);
    if (!loaded.ok()) {
      ADD_FAILURE() << loaded.status().message();
      std::abort();  // nothing below could run
    }
    model = *loaded;
  }
};

inline KvProfile kv(const std::string& text) {
  auto p = KvProfile::parse(text);
  EXPECT_TRUE(p.ok()) << p.status().message();
  return p.ok() ? *p : KvProfile();
}

struct SessionSetup {
  std::string kv = "f16";
  int n_threads = 1;
  int64_t n_ctx = 0;
  std::string basis_path = {};
  /// Most tests are about what else happens, against libllama, which rounds the same factors.
  PromptOptions prompt = {PrefillProducts::int8, PrefillAttention::f32};
  bool segments = false;
};

inline std::unique_ptr<Session> make_session(const std::shared_ptr<const Model>& model,
                                             const SessionSetup& setup = {}) {
  SessionOptions options;
  options.kv = testing::kv(setup.kv);
  options.n_threads = setup.n_threads;
  options.n_ctx = setup.n_ctx;
  options.basis_path = setup.basis_path;
  options.prompt = setup.prompt;
  options.segments = setup.segments;
  auto session = Session::create(model, options);
  if (!session.ok()) {
    ADD_FAILURE() << session.status().message();
    std::abort();
  }
  return std::move(*session);
}

inline std::vector<float> copy(std::span<const float> x) { return {x.begin(), x.end()}; }

/// Feeds tokens one by one; the logits after each.
inline std::vector<std::vector<float>> decode_all(Session& session, std::span<const Token> tokens) {
  std::vector<std::vector<float>> rows;
  for (const Token t : tokens) {
    const Status s = session.decode(t);
    EXPECT_TRUE(s.ok()) << s.message();
    rows.push_back(copy(session.logits()));
  }
  return rows;
}

/// The n most likely tokens one after another, from what session.logits() says on.
inline std::vector<Token> greedy(Session& session, int n) {
  std::vector<Token> tokens;
  for (int i = 0; i < n; ++i) {
    tokens.push_back(static_cast<Token>(argmax(session.logits())));
    const Status s = session.decode(tokens.back());
    EXPECT_TRUE(s.ok()) << s.message();
  }
  return tokens;
}

#define EXPECT_OK(expression)                       \
  do {                                              \
    const ::narrows::Status status_ = (expression); \
    EXPECT_TRUE(status_.ok()) << status_.message(); \
  } while (false)
#define ASSERT_OK(expression)                       \
  do {                                              \
    const ::narrows::Status status_ = (expression); \
    ASSERT_TRUE(status_.ok()) << status_.message(); \
  } while (false)

/// Sessions of some prompts, two of each: one to step alone, one in a batch.
struct SessionsTwice {
  std::vector<std::unique_ptr<Session>> alone, together;
  std::vector<Session*> all;  ///< those of `together`

  SessionsTwice(const std::vector<std::vector<Token>>& prompts,
                const std::function<std::unique_ptr<Session>()>& make) {
    for (const std::vector<Token>& prompt : prompts) {
      for (auto* to : {&alone, &together}) {
        to->push_back(make());
        EXPECT_OK(to->back()->prefill(prompt));
      }
      all.push_back(together.back().get());
    }
  }

  /// A token for each: a step of the batch gives the bits of the steps alone.
  void step(DecodeBatch& batch, std::span<const Token> tokens) {
    std::vector<Status> each(all.size());
    ASSERT_OK(batch.decode(all, tokens, each));
    for (size_t i = 0; i < all.size(); ++i) {
      ASSERT_OK(each[i]);
      ASSERT_OK(alone[i]->decode(tokens[i]));
      ASSERT_EQ(copy(alone[i]->logits()), copy(all[i]->logits())) << i;
    }
  }
};

}  // namespace narrows::testing
