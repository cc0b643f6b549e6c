// A model is shared by sessions on several threads, and a session computes on several threads: what
// ThreadSanitizer runs.
#include <gtest/gtest.h>

#include <thread>

#include "support/session.h"

namespace narrows::testing {
namespace {

std::vector<std::vector<float>> some_rows(const std::shared_ptr<const Model>& model, const std::string& kv,
                                          int n_threads) {
  auto session = make_session(model, {.kv = kv, .n_threads = n_threads});
  const auto tokens = random_tokens(540);
  EXPECT_TRUE(session->prefill(std::span(tokens).first(530)).ok());
  std::vector<std::vector<float>> rows = {copy(session->logits())};
  for (auto& row : decode_all(*session, std::span(tokens).subspan(530))) rows.push_back(std::move(row));
  return rows;
}

TEST(Concurrent, SessionsOfOneModelDoNotDisturbEachOther) {
  TinyModel m;
  m.n_layer = 4;
  const LoadedTiny tiny(m);
  const std::vector<std::string> profiles = {"f16", "sals-25", "kivi-2"};
  std::vector<std::vector<std::vector<float>>> alone, together(profiles.size());
  for (const std::string& kv : profiles) alone.push_back(some_rows(tiny.model, kv, 1));
  std::vector<std::thread> threads;
  for (size_t i = 0; i < profiles.size(); ++i) {
    threads.emplace_back([&, i] { together[i] = some_rows(tiny.model, profiles[i], 1); });
  }
  for (std::thread& t : threads) t.join();
  for (size_t i = 0; i < profiles.size(); ++i)
    EXPECT_EQ(max_difference(alone[i], together[i]), 0) << profiles[i];
}

TEST(Concurrent, OneSessionOnSeveralThreads) {
  TinyModel m;
  m.n_layer = 4;
  const LoadedTiny tiny(m);
  for (const std::string kv : {"f16", "sals-25", "kivi-4"}) {
    const auto one = some_rows(tiny.model, kv, 1), three = some_rows(tiny.model, kv, 3);
    EXPECT_EQ(max_difference(one, three), 0) << kv;
  }
}

TEST(Concurrent, WorkBetweenTheStepsOfABatch) {
  const LoadedTiny tiny{TinyModel{}};
  for (const int n_threads : {1, 3}) {
    auto batch = DecodeBatch::create(tiny.model, 4, n_threads);
    ASSERT_OK(batch.status());
    for (const int64_t n : {0, 1, 2, 50}) {
      std::vector<int> runs(static_cast<size_t>(n), 0);
      (*batch)->for_each(n, [&](int64_t i) { ++runs[static_cast<size_t>(i)]; });
      EXPECT_EQ(runs, std::vector<int>(static_cast<size_t>(n), 1));
    }
  }
}

TEST(Concurrent, ModelsLoadSideBySide) {
  TinyModel m;
  const TempDir dir;
  const std::string path = m.write(dir.path("tiny.gguf"));
  std::vector<std::thread> threads;
  std::vector<std::string> fingerprints(3);
  for (std::string& f : fingerprints) {
    threads.emplace_back([&] {
      auto model = Model::load(path);
      if (model.ok()) f = (*model)->info().fingerprint;
    });
  }
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(fingerprints[0].size(), 16U);
  EXPECT_EQ(fingerprints[0], fingerprints[1]);
  EXPECT_EQ(fingerprints[0], fingerprints[2]);
}

}  // namespace
}  // namespace narrows::testing
