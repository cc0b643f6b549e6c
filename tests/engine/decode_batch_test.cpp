// Sessions that decode together: each has the bits that it has alone, for every weight type, whoever else is
// there; one that fails does not take the others with it.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <thread>

#include "support/refusal.h"
#include "support/sanitized.h"
#include "support/session.h"
#include "support/tiny_cases.h"

namespace narrows::testing {
namespace {

using Rows = std::vector<std::vector<float>>;

TinyModel four_layers() {
  TinyModel m;
  m.n_layer = 4;
  return m;
}

const LoadedTiny& tiny() {
  static const LoadedTiny loaded(four_layers());
  return loaded;
}

std::unique_ptr<DecodeBatch> make_batch(const std::shared_ptr<const Model>& model, int n, int n_threads = 1) {
  auto batch = DecodeBatch::create(model, n, n_threads);
  if (!batch.ok()) {
    ADD_FAILURE() << batch.status().message();
    std::abort();
  }
  return std::move(*batch);
}

/// One stream: a session with a prompt of its own, and the tokens that it is fed afterwards.
struct Stream {
  std::unique_ptr<Session> session;
  std::vector<Token> prompt, fed;
};

/// Prompts of growing length, so that positions, windows and pages differ; profiles in turn.
std::vector<Stream> make_streams(const std::shared_ptr<const Model>& model, int n,
                                 const std::vector<std::string>& profiles, int n_fed, int n_threads = 1) {
  std::vector<Stream> streams;
  for (int i = 0; i < n; ++i) {
    Stream s;
    const std::string& kv = profiles[static_cast<size_t>(i) % profiles.size()];
    s.session = make_session(model, {.kv = kv, .n_threads = n_threads});
    const auto all = random_tokens(3 + 61 * i + n_fed, static_cast<uint32_t>(10 + i));
    s.prompt.assign(all.begin(), all.end() - n_fed);
    s.fed.assign(all.end() - n_fed, all.end());
    EXPECT_TRUE(s.session->prefill(s.prompt).ok());
    streams.push_back(std::move(s));
  }
  return streams;
}

/// Rows of logits of every stream, decoded alone.
std::vector<Rows> alone(const std::shared_ptr<const Model>& model, int n,
                        const std::vector<std::string>& profiles, int n_fed) {
  std::vector<Rows> all;
  for (Stream& s : make_streams(model, n, profiles, n_fed)) all.push_back(decode_all(*s.session, s.fed));
  return all;
}

/// One step of the streams listed, their tokens `at`; the rows are appended.
void step(DecodeBatch& batch, std::vector<Stream>& streams, const std::vector<size_t>& who,
          const std::vector<size_t>& at, std::vector<Rows>& rows) {
  std::vector<Session*> sessions;
  std::vector<Token> tokens;
  for (const size_t i : who) {
    sessions.push_back(streams[i].session.get());
    tokens.push_back(streams[i].fed[at[i]]);
  }
  std::vector<Status> each(who.size());
  const Status s = batch.decode(sessions, tokens, each);
  ASSERT_TRUE(s.ok()) << s.message();
  for (size_t k = 0; k < who.size(); ++k) {
    ASSERT_TRUE(each[k].ok()) << each[k].message();
    rows[who[k]].push_back(copy(sessions[k]->logits()));
  }
}

std::vector<Rows> together(const std::shared_ptr<const Model>& model, int n,
                           const std::vector<std::string>& profiles, int n_fed, int n_threads = 1) {
  auto streams = make_streams(model, n, profiles, n_fed, n_threads);
  auto batch = make_batch(model, n, n_threads);
  std::vector<Rows> rows(streams.size());
  std::vector<size_t> who;
  for (size_t i = 0; i < streams.size(); ++i) who.push_back(i);
  for (int k = 0; k < n_fed; ++k)
    step(*batch, streams, who, std::vector<size_t>(streams.size(), static_cast<size_t>(k)), rows);
  return rows;
}

class EveryWeightType : public ::testing::TestWithParam<TinyCase> {};

// Nine sessions: more than any of ggml's limits between two kernels, and odd.
TEST_P(EveryWeightType, TogetherIsAloneToTheLastBit) {
  const LoadedTiny loaded(GetParam().model);
  const std::vector<std::string> profiles = {"f16", "klt"};
  const auto want = alone(loaded.model, 9, profiles, 3);
  for (const int n : thinned<int>({1, 2, 4, 5, 9})) {
    const auto got = together(loaded.model, n, profiles, 3);
    for (size_t i = 0; i < got.size(); ++i)
      EXPECT_EQ(max_difference(want[i], got[i]), 0) << "session " << i << " of " << n;
  }
  // Some attend on a thread each, the longest on all threads.
  const auto got = together(loaded.model, 5, profiles, 3, 2);
  for (size_t i = 0; i < got.size(); ++i)
    EXPECT_EQ(max_difference(want[i], got[i]), 0) << "session " << i << " on two threads";
}

std::string case_name(const ::testing::TestParamInfo<TinyCase>& info) { return info.param.name; }

INSTANTIATE_TEST_SUITE_P(Cases, EveryWeightType, ::testing::ValuesIn(thinned(all_cases())), case_name);

TEST(DecodeBatch, EveryProfileBesideEveryOtherThroughItsThresholds) {
  const std::vector<std::string> profiles = KvProfile::names();
  const int n = static_cast<int>(profiles.size()) * 2;  // prompts to 800 tokens: pages, bases, selection
  const auto want = alone(tiny().model, n, profiles, 70);
  const auto got = together(tiny().model, n, profiles, 70, 3);
  for (size_t i = 0; i < got.size(); ++i)
    EXPECT_EQ(max_difference(want[i], got[i]), 0) << profiles[i % profiles.size()];
}

// klt's transforms are made from the queries of steps too: each layer's own, whoever takes part.
TEST(DecodeBatch, WhatStepsTeachACacheIsItsOwn) {
  const std::vector<Token> tokens = random_tokens(640);
  auto own = make_session(tiny().model, {.kv = "klt"});
  auto together = make_session(tiny().model, {.kv = "klt"}),
       other = make_session(tiny().model, {.kv = "f16"});
  auto batch = make_batch(tiny().model, 2);
  for (const Token t : tokens) {
    Session* const sessions[] = {together.get(), other.get()};
    const Token both[] = {t, t};
    Status each[2];
    ASSERT_OK(batch->decode(sessions, both, each));
    ASSERT_OK(each[0]);
    ASSERT_OK(own->decode(t));
    ASSERT_EQ(max_difference(own->logits(), together->logits()), 0) << own->n_past();
  }
  EXPECT_GT(own->cache_stats().bytes_pages, 0);
}

TEST(DecodeBatch, SessionsComeAndGo) {
  const std::vector<std::string> profiles = {"klt", "f16", "kivi-4"};
  const auto want = alone(tiny().model, 5, profiles, 8);
  auto streams = make_streams(tiny().model, 5, profiles, 8);
  auto batch = make_batch(tiny().model, 4);
  std::vector<Rows> rows(5);
  std::vector<size_t> at(5, 0);
  const std::vector<std::vector<size_t>> schedule = {{0},       {0, 1}, {4, 2, 1, 0}, {3},
                                                     {1, 3, 4}, {2, 4}, {3, 2, 1}};
  for (const auto& who : schedule) {
    step(*batch, streams, who, at, rows);
    for (const size_t i : who) ++at[i];
  }
  // In between, steps of their own.
  ASSERT_OK(streams[0].session->decode(streams[0].fed[at[0]]));
  rows[0].push_back(copy(streams[0].session->logits()));
  ++at[0];
  step(*batch, streams, {1, 0}, at, rows);
  for (size_t i = 0; i < 5; ++i) {
    const Rows prefix(want[i].begin(), want[i].begin() + static_cast<std::ptrdiff_t>(rows[i].size()));
    EXPECT_GT(rows[i].size(), 1U);
    EXPECT_EQ(max_difference(prefix, rows[i]), 0) << i;
  }
}

TEST(DecodeBatch, OneThatCannotIsLeftOutAsItWas) {
  const std::vector<std::string> profiles = {"klt", "f16"};
  const auto want = alone(tiny().model, 2, profiles, 3);
  auto streams = make_streams(tiny().model, 2, profiles, 3);
  auto full = make_session(tiny().model, {.n_ctx = 5});
  ASSERT_OK(full->prefill(random_tokens(5)));
  auto broken = make_session(tiny().model);
  EXPECT_FALSE(broken->prefill(random_tokens(5), [](double) { return false; }).ok());
  const LoadedTiny other(four_layers());
  auto stranger = make_session(other.model);
  auto threads = make_session(tiny().model, {.n_threads = 2});
  for (Session* s : {stranger.get(), threads.get()}) ASSERT_OK(s->prefill(random_tokens(5)));
  const auto before = copy(full->logits());

  auto batch = make_batch(tiny().model, 8);
  Rows rows[2];
  for (size_t k = 0; k < 3; ++k) {
    const std::vector<Session*> all = {full.get(),
                                       streams[0].session.get(),
                                       broken.get(),
                                       stranger.get(),
                                       threads.get(),
                                       streams[1].session.get(),
                                       streams[1].session.get(),
                                       streams[0].session.get()};
    const std::vector<Token> tokens = {1, streams[0].fed[k], 1, 1, 1, streams[1].fed[k], 1, -5};
    std::vector<Status> each(all.size());
    ASSERT_OK(batch->decode(all, tokens, each));
    expect_refusal(each[0], StatusCode::context_full, {"5", "full"});
    expect_refusal(each[2], StatusCode::internal, {"reset"});
    expect_refusal(each[3], StatusCode::invalid_argument, {"another model"});
    expect_refusal(each[4], StatusCode::invalid_argument, {"2", "1", "threads"});
    expect_refusal(each[6], StatusCode::invalid_argument, {"twice"});
    expect_refusal(each[7], StatusCode::invalid_argument, {"twice"});
    ASSERT_OK(each[1]);
    ASSERT_OK(each[5]);
    rows[0].push_back(copy(streams[0].session->logits()));
    rows[1].push_back(copy(streams[1].session->logits()));
  }
  for (size_t i = 0; i < 2; ++i) EXPECT_EQ(max_difference(want[i], rows[i]), 0);
  EXPECT_EQ(full->n_past(), 5);
  EXPECT_EQ(max_difference(full->logits(), before), 0);
}

TEST(DecodeBatch, ATokenOutsideTheVocabularyIsThatSessionsAlone) {
  auto streams = make_streams(tiny().model, 2, {"f16"}, 2);
  const auto want = alone(tiny().model, 2, {"f16"}, 2);
  auto batch = make_batch(tiny().model, 2);
  const std::vector<Session*> both = {streams[0].session.get(), streams[1].session.get()};
  std::vector<Status> each(2);
  ASSERT_OK(batch->decode(both, std::vector<Token>{static_cast<Token>(kTinyVocab), streams[1].fed[0]}, each));
  expect_refusal(each[0], StatusCode::invalid_argument, {"258"});
  ASSERT_OK(each[1]);
  EXPECT_EQ(max_difference(want[1][0], copy(both[1]->logits())), 0);
  ASSERT_OK(batch->decode(both, std::vector<Token>{streams[0].fed[0], streams[1].fed[1]}, each));
  EXPECT_EQ(max_difference(want[0][0], copy(both[0]->logits())), 0);
  EXPECT_EQ(max_difference(want[1][1], copy(both[1]->logits())), 0);
}

// Token 77 alone has an embedding that is no number.
TEST(DecodeBatch, NumbersThatAreNoneStayInTheirSession) {
  TinyModel m = four_layers();
  m.edit_tensors = [](std::vector<TinyTensor>& all) {
    tensor(all, "token_embd.weight").data[77 * 64 + 3] = std::nanf("");
  };
  const LoadedTiny loaded(m);
  const std::vector<Token> prompt(30, 5);
  for (const std::string& kv : KvProfile::names()) {
    auto good = make_session(loaded.model, {.kv = kv}), bad = make_session(loaded.model, {.kv = kv}),
         reference = make_session(loaded.model, {.kv = kv});
    for (Session* s : {good.get(), bad.get(), reference.get()}) ASSERT_OK(s->prefill(prompt));
    auto batch = make_batch(loaded.model, 2);
    const std::vector<Session*> both = {bad.get(), good.get()};
    std::vector<Status> each(2);
    ASSERT_OK(batch->decode(both, std::vector<Token>{77, 6}, each));
    ASSERT_OK(batch->decode(both, std::vector<Token>{5, 7}, each));
    expect_refusal(each[0], StatusCode::non_finite, {"layer 0", "token 30"});
    ASSERT_OK(each[1]);
    const auto want = decode_all(*reference, std::vector<Token>{6, 7});
    EXPECT_EQ(max_difference(want.back(), copy(good->logits())), 0) << kv;
  }
}

TEST(DecodeBatch, RefusesWhatDoesNotFit) {
  for (const int n : {-1, 0, DecodeBatch::kMaxSessions + 1}) {
    expect_refusal(status_of(DecodeBatch::create(tiny().model, n, 1)), StatusCode::invalid_argument,
                   {std::to_string(n)});
  }
  expect_refusal(status_of(DecodeBatch::create(tiny().model, 1, 513)), StatusCode::invalid_argument, {"513"});
  auto streams = make_streams(tiny().model, 3, {"f16"}, 1);
  auto batch = make_batch(tiny().model, 2);
  EXPECT_EQ(batch->max_sessions(), 2);
  std::vector<Session*> all;
  for (Stream& s : streams) all.push_back(s.session.get());
  std::vector<Status> each(3);
  const std::vector<Token> tokens = {1, 2, 3};
  expect_refusal(batch->decode(all, tokens, each), StatusCode::invalid_argument, {"3", "2"});
  expect_refusal(batch->decode(std::span(all).first(2), std::span(tokens).first(1), std::span(each).first(2)),
                 StatusCode::invalid_argument, {"2", "1"});
  for (Stream& s : streams) EXPECT_EQ(s.session->n_past(), static_cast<int64_t>(s.prompt.size()));
  ASSERT_OK(batch->decode({}, {}, {}));
}

}  // namespace
}  // namespace narrows::testing
