// Each allocation of a served request fails in turn, on whichever thread it is: the request ends with its
// error or well, and the same request after it is answered with the same tokens. operator new of the whole
// program is replaced here; what C code takes with malloc does not count.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "server/scheduler.h"
#include "support/failing_new.h"
#include "support/session.h"

namespace narrows::server {
namespace {

using narrows::testing::g_failed;
using narrows::testing::g_left;
using narrows::testing::LoadedTiny;
using narrows::testing::random_tokens;
using narrows::testing::t_is_test;
using narrows::testing::TinyModel;

const LoadedTiny& tiny() {
  static const LoadedTiny loaded([] {
    TinyModel m;
    m.n_ctx = 8192;
    return m;
  }());
  return loaded;
}

struct Case {
  const char* name;
  const char* kv;
  int64_t n_prompt;
  double mass;  ///< below 1: a sparse prompt
  const char* grammar;
  bool cached;    ///< goes on from what the request before left
  int64_t dense;  ///< the first allocations of which each one fails; behind them steps grow with k / dense
  int n = 1;      ///< choices at once: with more than one, tokens are drawn on threads of the pool
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

std::shared_ptr<Job> job_of(const Case& c) {
  auto job = std::make_shared<Job>();
  job->id = "test";
  job->profile = narrows::testing::kv(c.kv);
  job->request.max_tokens = 6;
  job->request.sampling.temperature = 0;
  job->request.ignore_eos = true;
  job->request.stream = true;
  job->request.return_progress = true;
  job->request.logprobs = 2;
  job->request.stops = {"no such end"};
  job->request.grammar = c.grammar;
  job->request.cache_prompt = c.cached;
  job->request.n = c.n;
  job->request.prompts.emplace_back();
  job->prompts.push_back(random_tokens(c.n_prompt, 3));
  return job;
}

struct Answer {
  std::string text;
  bool failed = false;
  bool ended = false;
  ApiError error;
};

/// Until it has ended.
Answer wait_for(Job& job) {
  Answer a;
  std::vector<std::string> texts(static_cast<size_t>(job.n_choice()));
  for (int open = job.n_choice(); open > 0;) {
    const auto event = job.channel.pop(std::chrono::seconds(60));
    if (!event) return a;
    texts[static_cast<size_t>(event->choice)] += event->text;
    if (event->kind == Event::Kind::finished || event->kind == Event::Kind::failed) --open;
    if (event->kind != Event::Kind::failed) continue;
    a.failed = true;
    a.error = event->error;
  }
  a.ended = true;
  for (const std::string& text : texts) a.text += text + '\n';
  return a;
}

class AllocationFailure : public ::testing::TestWithParam<Case> {};

TEST_P(AllocationFailure, EndsOneRequestAtMost) {
  const Case c = GetParam();
  t_is_test = true;
  Metrics metrics;
  SchedulerOptions o;
  o.n_slots = 2;
  o.session.kv = narrows::testing::kv(c.kv);
  o.session.n_threads = 2;
  o.session.prompt.mass = c.mass;
  o.store_bytes = 0;
  auto made = Scheduler::create(tiny().model, o, &metrics);
  ASSERT_TRUE(made.ok()) << made.status().message();
  Scheduler& scheduler = **made;
  const auto serve = [&](const std::shared_ptr<Job>& job) {
    if (auto refused = scheduler.submit(job)) ADD_FAILURE() << refused->message;
    return wait_for(*job);
  };
  const Answer expected = serve(job_of(c));
  ASSERT_TRUE(expected.ended && !expected.failed) << expected.error.message;
  ASSERT_FALSE(expected.text.empty());

  int64_t n_failed = 0, n_well = 0;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  const int64_t dense = std::max<int64_t>(5, c.dense / 10);  // slow: fewer of them
#else
  const int64_t dense = c.dense;
#endif
  // A machine that is busy, or slow: the rest in larger steps.
  const auto late = Clock::now() + std::chrono::seconds(5);
  bool reached = true;
  for (int64_t k = 0; reached; k += 1 + k / (Clock::now() < late ? dense : 4)) {
    auto job = job_of(c);
    g_failed = false;
    g_left = k;
    const Answer a = serve(job);
    g_left = -1;
    reached = g_failed;
    ASSERT_TRUE(a.ended) << "no end, allocation " << k;
    ++(a.failed ? n_failed : n_well);
    if (a.failed) {
      EXPECT_EQ(a.error.http_code, 503) << a.error.message << ", allocation " << k;
    } else {
      EXPECT_EQ(a.text, expected.text) << "allocation " << k;
    }
    const Answer after = serve(job_of(c));
    ASSERT_TRUE(after.ended && !after.failed) << after.error.message << ", behind allocation " << k;
    ASSERT_EQ(after.text, expected.text) << "behind allocation " << k;
  }
  EXPECT_GT(n_failed, 10);
  RecordProperty("failed", static_cast<int>(n_failed));
  std::printf("%s: %lld requests failed, %lld ended well\n", c.name, static_cast<long long>(n_failed),
              static_cast<long long>(n_well));
  for (const SlotInfo& slot : scheduler.slots()) EXPECT_EQ(slot.state, SlotState::idle);
}

INSTANTIATE_TEST_SUITE_P(Requests, AllocationFailure,
                         ::testing::Values(Case{"f16", "f16", 40, 1, "", false, 150},
                                           Case{"grammar", "f16", 20, 1, "root ::= [a-z]+ (\" \" root)?",
                                                false, 100},
                                           Case{"klt", "klt", 900, 1, "", false, 60},
                                           Case{"klt_cached", "klt", 900, 1, "", true, 100},
                                           Case{"kivi", "kivi-4", 300, 1, "", false, 100},
                                           Case{"two", "f16", 40, 1, "", false, 40, 2},
                                           Case{"sparse", "f16", 1300, 0.9, "", false, 60}),
                         [](const auto& c) { return std::string(c.param.name); });

}  // namespace
}  // namespace narrows::server
