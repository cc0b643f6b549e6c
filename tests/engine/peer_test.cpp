// The peer itself: what bench and eval believe of it.
#include <gtest/gtest.h>

#include <limits>

#include "peer/llama_peer.h"
#include "support/refusal.h"
#include "support/session.h"

namespace narrows::testing {
namespace {

std::unique_ptr<LlamaPeer> make_peer(const LoadedTiny& tiny, const LlamaPeerOptions& options) {
  auto made = LlamaPeer::create(tiny.path, options);
  EXPECT_TRUE(made.ok()) << made.status().message();
  return std::move(*made);
}

TEST(Peer, CountsItsTokensAndForgetsThem) {
  const LoadedTiny tiny{TinyModel()};
  const auto tokens = random_tokens(300);
  auto peer = make_peer(tiny, {512, 1});
  ASSERT_OK(peer->prefill(std::span(tokens).first(200)));
  EXPECT_EQ(peer->n_past(), 200);
  const auto first = copy(peer->logits());
  EXPECT_EQ(first.size(), static_cast<size_t>(kTinyVocab));
  const int64_t bytes = peer->kv_bytes();
  EXPECT_GE(bytes, 200 * 2 * 2 * 32 * 2);  // f16 keys and values of two layers
  ASSERT_OK(peer->decode(tokens[200]));
  EXPECT_EQ(peer->n_past(), 201);
  EXPECT_GT(peer->kv_bytes(), bytes);
  EXPECT_GT(max_difference(peer->logits(), first), 0.1);
  peer->clear();
  EXPECT_EQ(peer->n_past(), 0);
  ASSERT_OK(peer->prefill(std::span(tokens).first(200)));
  EXPECT_EQ(max_difference(peer->logits(), first), 0);
}

TEST(Peer, AnEightBitCacheIsSmallerAndNear) {
  TinyModel m;
  m.head_dim = 32;  // q8_0 takes heads of whole blocks
  m.n_embd = 128;
  const LoadedTiny tiny(m);
  const auto tokens = random_tokens(300);
  auto f16 = make_peer(tiny, {512, 1}), q8 = make_peer(tiny, {512, 1, "q8_0"});
  ASSERT_OK(f16->prefill(tokens));
  ASSERT_OK(q8->prefill(tokens));
  EXPECT_LT(q8->kv_bytes(), f16->kv_bytes() * 6 / 10);
  const double kl = kl_divergence(f16->logits(), q8->logits());
  EXPECT_GT(kl, 1e-9);
  EXPECT_LT(kl, 1e-2);
}

TEST(Peer, KeysAndValuesMayBeKeptDifferently) {
  TinyModel m;
  m.head_dim = 32;
  m.n_embd = 128;
  const LoadedTiny tiny(m);
  const auto tokens = random_tokens(300);
  int64_t before = std::numeric_limits<int64_t>::max();
  for (const char* kv : {"f16", "f16/q8_0", "q8_0", "q8_0/q4_0", "q4_0"}) {
    auto peer = make_peer(tiny, {512, 1, kv});
    ASSERT_OK(peer->prefill(tokens));
    EXPECT_LT(peer->kv_bytes(), before) << kv;
    before = peer->kv_bytes();
  }
}

TEST(Peer, CachesThatItDoesNotHave) {
  const LoadedTiny tiny{TinyModel()};
  for (const char* kv : {"q3_K", "", "f16/", "/f16", "f16/f16/f16"}) {
    EXPECT_FALSE(LlamaPeer::check_kv(kv).ok()) << kv;
    expect_refusal(status_of(LlamaPeer::create(tiny.path, {64, 1, kv})), StatusCode::invalid_argument,
                   {"q8_0"});
  }
  for (const std::string& kv : LlamaPeer::kv_types()) EXPECT_OK(LlamaPeer::check_kv(kv));
  // Heads of 16 are no whole block of q8_0.
  expect_refusal(status_of(LlamaPeer::create(tiny.path, {64, 1, "q8_0"})), StatusCode::unsupported,
                 {"q8_0", "16"});
}

TEST(Peer, MoreThanItsContextIsAnError) {
  const LoadedTiny tiny{TinyModel()};
  auto peer = make_peer(tiny, {256, 1});
  const Status s = peer->prefill(random_tokens(300));
  EXPECT_FALSE(s.ok());
  expect_sentence(s);
}

TEST(Peer, NamesTheFileThatItRefusesAndItsOwnReason) {
  const TempDir dir;
  const Status none = status_of(LlamaPeer::create(dir.path("none.gguf"), {64, 1}));
  expect_refusal(none, StatusCode::invalid_file, {dir.path("none.gguf")});
  const Status text =
      status_of(LlamaPeer::create(dir.file("text.gguf", "no model, but long enough to look at"), {64, 1}));
  expect_refusal(text, StatusCode::invalid_file, {dir.path("text.gguf")});
  EXPECT_EQ(text.message().find("none.gguf"), std::string::npos)
      << "the reason of the file before: " << text.message();
}

// libllama runs no such RoPE and asserts: that must not end our process.
TEST(Peer, WhatLibllamaAssertsIsAnError) {
  TinyModel half;
  half.architecture = "qwen2";
  half.n_rot = 8;
  const LoadedTiny tiny(half);  // ours runs it
  expect_refusal(status_of(LlamaPeer::create(tiny.path, {64, 1})), StatusCode::unsupported,
                 {tiny.path, "n_rot"});
}

}  // namespace
}  // namespace narrows::testing
