// Prefixes: a session with segments that goes back to the end of one, or shares it with another, and then
// reads another prompt, is to the last bit the session that has read that prompt alone; and reading in pieces
// is reading at once.
#include <gtest/gtest.h>

#include "engine/session_impl.h"
#include "support/refusal.h"
#include "support/sanitized.h"
#include "support/session.h"

namespace narrows::testing {
namespace {

const LoadedTiny& tiny() {
  static const LoadedTiny loaded([] {
    TinyModel m;
    m.n_layer = 4;
    m.n_ctx = 8192;
    return m;
  }());
  return loaded;
}

std::unique_ptr<Session> with_segments(const std::string& profile, const std::string& basis = {},
                                       double mass = 1) {
  SessionOptions options;
  options.kv = kv(profile);
  options.prompt.mass = mass;
  options.n_threads = 2;
  options.segments = true;
  options.basis_path = basis;
  auto session = Session::create(tiny().model, options);
  if (!session.ok()) {
    ADD_FAILURE() << session.status().message();
    std::abort();
  }
  return std::move(*session);
}

/// n tokens; the first n_common of them are the same for all tails.
std::vector<Token> prompt(int64_t n_common, int64_t n, uint32_t tail) {
  std::vector<Token> tokens = random_tokens(n_common, 5);
  for (const Token t : random_tokens(n - n_common, 100 + tail)) tokens.push_back(t);
  return tokens;
}

std::vector<float> cache_content(Session& session) {
  std::vector<float> all;
  KvCache& cache = *Access::impl(session).cache;
  const int64_t n = cache.n_tokens(), width = cache.layer(0).shape().width();
  std::vector<float> k(static_cast<size_t>(n * width)), v(k.size());
  for (int64_t l = 0; l < cache.n_layer(); ++l) {
    cache.layer(l).read(0, n, k.data(), v.data());
    all.insert(all.end(), k.begin(), k.end());
    all.insert(all.end(), v.begin(), v.end());
  }
  return all;
}

/// The prompt read, then 12 steps: logits of all, and the cache.
struct Outcome {
  std::vector<std::vector<float>> rows;
  std::vector<float> cache;
  int64_t bytes = 0;
};

Outcome read_on(Session& session, std::span<const Token> rest) {
  Outcome o;
  EXPECT_TRUE(session.prefill(rest).ok());
  o.rows.push_back(copy(session.logits()));
  for (auto& row : decode_all(session, random_tokens(12, 77))) o.rows.push_back(std::move(row));
  o.cache = cache_content(session);
  o.bytes = session.cache_stats().bytes;
  return o;
}

void expect_same(const Outcome& want, const Outcome& got, const std::string& note) {
  EXPECT_EQ(max_difference(want.rows, got.rows), 0) << note;
  EXPECT_EQ(max_difference(want.cache, got.cache), 0) << note;
  EXPECT_EQ(want.bytes, got.bytes) << note;
}

class PrefixOf : public ::testing::TestWithParam<std::string> {};

TEST(SegmentEnds, LeaveARestAndLieOnPages) {
  const KvProfile klt = kv("klt");
  EXPECT_EQ(Session::segment_end(klt, 0), 0);
  EXPECT_EQ(Session::segment_end(klt, 16 + 256 + 127), 0);
  EXPECT_EQ(Session::segment_end(klt, 16 + 256 + 128), 16 + 256);
  EXPECT_EQ(Session::segment_end(klt, 16 + 512 + 127), 16 + 256);
  EXPECT_EQ(Session::segment_end(klt, 5000), 16 + 256 * 18);
}

// Common parts below the first compressed token, around it, far above.
TEST_P(PrefixOf, GoingBackIsAsIfNothingHadBeen) {
  for (const int64_t common : thinned<int64_t>({300, 1000, 1400, 2050, 2100, 2700})) {
    const auto first = prompt(common, common + 450, 1), second = prompt(common, common + 333, 2);
    auto session = with_segments(GetParam());
    read_on(*session, first);
    const int64_t n =
        session->kept_prefix(std::min(common, Session::segment_end(session->profile(), common + 333)));
    auto fresh = with_segments(GetParam());
    const Outcome want = read_on(*fresh, second);
    if (n == 0) {
      // Only what was exact and is now compressed cannot come back.
      EXPECT_LT(common, exact_tokens(session->profile(), 32, false)) << common;
      session->reset();
    } else {
      EXPECT_GT(n, common - 256 - 1) << common;
      session->keep_prefix(n);
      EXPECT_EQ(session->n_past(), n);
    }
    expect_same(want, read_on(*session, std::span(second).subspan(static_cast<size_t>(n))),
                std::to_string(common));
  }
}

TEST_P(PrefixOf, SharingLeavesBothAsTheyWouldBeAlone) {
  for (const int64_t common : thinned<int64_t>({700, 1500, 2500})) {
    const auto first = prompt(common, common + 400, 1), second = prompt(common, common + 300, 2),
               third = prompt(common, common + 200, 3);
    auto fresh1 = with_segments(GetParam()), fresh2 = with_segments(GetParam()),
         fresh3 = with_segments(GetParam());
    const Outcome want1 = read_on(*fresh1, first), want2 = read_on(*fresh2, second),
                  want3 = read_on(*fresh3, third);

    auto one = with_segments(GetParam());
    ASSERT_OK(one->prefill(first));
    const int64_t n = one->kept_prefix(common);
    ASSERT_GT(n, common - 257);
    auto two = with_segments(GetParam()), three = with_segments(GetParam());
    ASSERT_OK(two->prefill(random_tokens(50)));  // forgotten
    ASSERT_OK(two->share_prefix(*one, n));
    ASSERT_OK(three->share_prefix(*two, n));
    // The steps of all three between each other.
    Outcome got1;
    got1.rows.push_back(copy(one->logits()));
    const auto fed = random_tokens(12, 77);
    ASSERT_OK(two->prefill(std::span(second).subspan(static_cast<size_t>(n))));
    Outcome got2;
    got2.rows.push_back(copy(two->logits()));
    for (size_t i = 0; i < fed.size(); ++i) {
      got1.rows.push_back(decode_all(*one, std::span(fed).subspan(i, 1)).front());
      got2.rows.push_back(decode_all(*two, std::span(fed).subspan(i, 1)).front());
    }
    const Outcome got3 = read_on(*three, std::span(third).subspan(static_cast<size_t>(n)));
    got1.cache = cache_content(*one);
    got2.cache = cache_content(*two);
    got1.bytes = one->cache_stats().bytes;
    got2.bytes = two->cache_stats().bytes;
    expect_same(want1, got1, "the source");
    expect_same(want2, got2, "the second");
    expect_same(want3, got3, "the third");
    one.reset();
    two.reset();
    EXPECT_EQ(max_difference(cache_content(*three), want3.cache), 0);
  }
}

TEST_P(PrefixOf, InPiecesBesideOthersIsAtOnce) {
  const auto tokens = prompt(0, 2600, 1);
  auto whole = with_segments(GetParam());
  const Outcome want = read_on(*whole, tokens);
  auto a = with_segments(GetParam()), b = with_segments(GetParam());
  ASSERT_OK(a->begin_prefill(tokens));
  expect_refusal(a->decode(1), StatusCode::internal, {"reading a prompt"});
  expect_refusal(a->begin_prefill(tokens), StatusCode::internal, {"reading a prompt"});
  ASSERT_OK(b->begin_prefill(std::span(tokens).first(400)));
  double done = -1;
  int n_step = 0;
  while (a->prefill_done() < 1) {
    EXPECT_GT(a->prefill_done(), done);
    done = a->prefill_done();
    ASSERT_OK(a->prefill_step());
    if (b->prefill_done() < 1) {
      ASSERT_OK(b->prefill_step());
    } else {
      ASSERT_OK(b->decode(3));
    }
    ++n_step;
  }
  EXPECT_GE(n_step, 4 * 10);  // four layers, ten segments
  Outcome got;
  got.rows.push_back(copy(a->logits()));
  for (auto& row : decode_all(*a, random_tokens(12, 77))) got.rows.push_back(std::move(row));
  got.cache = cache_content(*a);
  got.bytes = a->cache_stats().bytes;
  expect_same(want, got, "in pieces");
}

TEST_P(PrefixOf, GivenUpInTheMiddleIsForgotten) {
  const auto tokens = prompt(0, 900, 1);
  auto fresh = with_segments(GetParam());
  const Outcome want = read_on(*fresh, tokens);
  for (const int steps : {0, 1, 5, 9}) {
    auto session = with_segments(GetParam());
    ASSERT_OK(session->begin_prefill(random_tokens(1200, 9)));
    for (int i = 0; i < steps; ++i) ASSERT_OK(session->prefill_step());
    EXPECT_EQ(session->kept_prefix(1200), 0);
    session->reset();
    EXPECT_EQ(session->prefill_done(), 1);
    expect_same(want, read_on(*session, tokens), std::to_string(steps));
  }
}

/// After any number of its steps a prompt is given up; what the session held before is still there, and
/// reading on gives the bits of reading all.
void expect_kept_at_every_step(const std::string& profile, int64_t n_prefix, int64_t n_tokens, int stride) {
  const auto first = prompt(n_prefix, n_prefix + 200, 1), second = prompt(n_prefix, n_tokens, 2);
  auto before = with_segments(profile), fresh = with_segments(profile);
  ASSERT_OK(before->prefill(first));
  const int64_t n = before->kept_prefix(n_prefix);
  ASSERT_GT(n, 0);
  ASSERT_OK(fresh->prefill(second));
  const auto want = copy(fresh->logits());
  const auto want_cache = cache_content(*fresh);
  auto session = with_segments(profile);
  for (int steps = 0;; steps += kSanitized ? 4 * stride : stride) {
    ASSERT_OK(session->share_prefix(*before, n));
    ASSERT_OK(session->begin_prefill(std::span(second).subspan(static_cast<size_t>(n))));
    for (int i = 0; i < steps && session->prefill_done() < 1; ++i) ASSERT_OK(session->prefill_step());
    if (session->prefill_done() == 1) break;
    const int64_t kept = session->go_back(n_tokens);
    ASSERT_GE(kept, n) << profile << " " << steps;
    ASSERT_EQ(session->n_past(), kept);
    ASSERT_EQ(session->kept_prefix(n_tokens), kept);
    ASSERT_OK(session->prefill(std::span(second).subspan(static_cast<size_t>(kept))));
    ASSERT_EQ(max_difference(want, copy(session->logits())), 0) << profile << " " << steps;
    ASSERT_EQ(max_difference(want_cache, cache_content(*session)), 0) << profile << " " << steps;
  }
}

TEST_P(PrefixOf, GivenUpAtAnyStepKeepsWhatWasThere) {
  expect_kept_at_every_step(GetParam(), 600, 900, 1);
  expect_kept_at_every_step(GetParam(), 600, 2450, 11);  // compressed on the way: it was exact
  expect_kept_at_every_step(GetParam(), 2400, 2800, 3);
}

TEST_P(PrefixOf, GivenUpKeepsTheStripesThatAreDone) {
  const auto tokens = prompt(0, 7000, 1);
  auto session = with_segments(GetParam()), fresh = with_segments(GetParam());
  ASSERT_OK(fresh->prefill(tokens));
  ASSERT_OK(session->begin_prefill(tokens));
  while (session->prefill_done() < 0.7) ASSERT_OK(session->prefill_step());
  const int64_t kept = session->go_back(7000);
  EXPECT_EQ(kept, 16 + 4096);
  EXPECT_EQ(session->prefill_done(), 1);
  ASSERT_OK(session->prefill(std::span(tokens).subspan(static_cast<size_t>(kept))));
  EXPECT_EQ(max_difference(copy(fresh->logits()), copy(session->logits())), 0);
  EXPECT_EQ(max_difference(cache_content(*fresh), cache_content(*session)), 0);
}

TEST_P(PrefixOf, StoppedByItsProgressKeepsWhatWasThere) {
  auto session = with_segments(GetParam());
  ASSERT_OK(session->prefill(prompt(0, 700, 1)));
  int calls = 0;
  const auto stop = [&](double) { return ++calls < 3; };
  session->go_back(600);
  expect_refusal(session->prefill(prompt(0, 1000, 2), stop), StatusCode::cancelled, {});
  expect_refusal(session->decode(1), StatusCode::internal, {"reset"});
  EXPECT_EQ(session->go_back(5000), 16 + 512);
  ASSERT_OK(session->prefill(prompt(0, 200, 3)));
}

// Sessions without segments, as a chat has them: tokens up to the cut stay as they were, whatever came of
// those behind it.
TEST_P(PrefixOf, WithoutSegmentsItGoesBackToo) {
  for (const int64_t n_prompt : {100, 1500}) {
    for (const int64_t cut : {n_prompt - 30, n_prompt / 2, int64_t{10}}) {
      auto session = make_session(tiny().model, {.kv = GetParam(), .n_threads = 2});
      ASSERT_OK(session->prefill(prompt(0, n_prompt, 1)));
      decode_all(*session, random_tokens(20, 7));
      const int64_t held = session->n_past();
      const auto before = cache_content(*session);
      const int64_t n = session->go_back(cut);
      ASSERT_LE(n, cut);
      ASSERT_GT(n, std::min(cut - 64, cut <= 16 ? cut - 1 : int64_t{15})) << n_prompt << " " << cut;
      ASSERT_EQ(session->n_past(), n);
      // The first n of each layer's keys and values.
      const auto after = cache_content(*session);
      const int64_t width = Access::impl(*session).cache->layer(0).shape().width();
      for (int64_t part = 0; part < 2 * Access::impl(*session).cache->n_layer(); ++part) {
        const auto a = std::span(before).subspan(static_cast<size_t>(part * held * width)),
                   b = std::span(after).subspan(static_cast<size_t>(part * n * width));
        ASSERT_TRUE(std::equal(b.begin(), b.begin() + n * width, a.begin())) << n_prompt << " " << cut;
      }
      ASSERT_OK(session->prefill(prompt(0, 300, 3)));
      decode_all(*session, random_tokens(5, 8));
      EXPECT_EQ(session->n_past(), n + 305);
      // Given up in the middle of another prompt.
      const auto stop = [](double done) { return done < 0.4; };
      expect_refusal(session->prefill(prompt(0, 900, 4), stop), StatusCode::cancelled, {});
      const int64_t m = session->go_back(9000);
      EXPECT_GT(m, n + 305 - 64);
      EXPECT_LE(m, n + 305);
      decode_all(*session, random_tokens(5, 8));
    }
  }
}

// A long answer to a short prompt is compressed in the end; then nothing can be kept, and that is said.
TEST_P(PrefixOf, ALongAnswerMayCostThePrefix) {
  auto session = with_segments(GetParam());
  ASSERT_OK(session->prefill(prompt(0, 700, 1)));
  EXPECT_EQ(session->kept_prefix(700), 16 + 512);
  EXPECT_EQ(session->kept_prefix(527), 16 + 256);
  EXPECT_EQ(session->kept_prefix(271), 0);
  const int64_t begins = 2 * exact_tokens(session->profile(), 32, false);
  const auto fed = random_tokens(std::max<int64_t>(100, begins + 70 - 700), 3);
  for (const Token t : fed) ASSERT_OK(session->decode(t));
  const bool compresses = session->profile().kind != KvKind::f16;
  EXPECT_EQ(session->cache_stats().bytes_pages > 0, compresses);
  // Exact first tokens of a profile that encodes a segment at a time can come back in whole units.
  const bool early = exact_tokens(session->profile(), 32, false) == 16 + 256;
  EXPECT_EQ(session->kept_prefix(700), !compresses || early ? 16 + 512 : 0);
}

/// All named profiles; with a sanitizer one of each family.
std::vector<std::string> profiles() {
  return kSanitized ? std::vector<std::string>{"f16", "kivi-4", "sals-25", "klt"} : KvProfile::names();
}

INSTANTIATE_TEST_SUITE_P(Profiles, PrefixOf, ::testing::ValuesIn(profiles()), [](const auto& p) {
  std::string name = p.param;
  for (char& c : name) c = std::isalnum(static_cast<unsigned char>(c)) != 0 ? c : '_';
  return name;
});

TEST(Prefix, RefusesWhatDiffers) {
  auto klt = with_segments("klt"), f16 = with_segments("f16"), other = with_segments("klt");
  auto plain = make_session(tiny().model, {.kv = "klt", .n_threads = 2});
  for (Session* s : {klt.get(), plain.get()}) ASSERT_OK(s->prefill(prompt(0, 700, 1)));
  EXPECT_EQ(plain->kept_prefix(700), 0);
  expect_refusal(f16->share_prefix(*klt, 528), StatusCode::invalid_argument, {"differ"});
  expect_refusal(other->share_prefix(*klt, 500), StatusCode::invalid_argument, {"segment"});
  expect_refusal(other->share_prefix(*klt, 0), StatusCode::invalid_argument, {});
  expect_refusal(other->share_prefix(*plain, 528), StatusCode::invalid_argument, {});
  expect_refusal(other->share_prefix(*other, 528), StatusCode::invalid_argument, {});
  EXPECT_EQ(other->n_past(), 0);
}

// What a block of a sparse prompt reads does not depend on where reading began.
TEST(Prefix, SparsePromptsGoOnAsIfReadAtOnce) {
  const auto first = prompt(2700, 3000, 1), second = prompt(2700, 3300, 2);
  auto session = with_segments("klt", {}, 0.6), fresh = with_segments("klt", {}, 0.6),
       dense = with_segments("klt");
  read_on(*session, first);
  const int64_t n = session->kept_prefix(2700);
  ASSERT_GT(n, 2000);
  session->keep_prefix(n);
  const Outcome want = read_on(*fresh, second);
  expect_same(want, read_on(*session, std::span(second).subspan(static_cast<size_t>(n))), "sparse");
  EXPECT_GT(max_difference(read_on(*dense, second).rows, want.rows), 0) << "it does leave tiles out";
}

// Reading a prompt in segments costs no more than the cache costs anyhow (klt, which needs keys with
// structure: model_test.cpp).
TEST(Prefix, SegmentsReadAlmostAsWellAsOnePiece) {
  const auto tokens = prompt(0, 2900, 1);
  auto exact = make_session(tiny().model, {.kv = "f16", .n_threads = 2});
  ASSERT_OK(exact->prefill(tokens));
  for (const std::string profile : {"f16", "kivi-4"}) {
    auto session = with_segments(profile);
    ASSERT_OK(session->prefill(tokens));
    EXPECT_LT(kl_divergence(exact->logits(), session->logits()), profile == "f16" ? 1e-4 : 0.2) << profile;
  }
}

}  // namespace
}  // namespace narrows::testing
