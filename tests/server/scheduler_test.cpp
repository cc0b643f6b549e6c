// The scheduler on a tiny model, without HTTP: text does not depend on who runs beside it or on what was
// cached, limits refuse with figures, clients that go away free their slots, the end is orderly.
#include "server/scheduler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <random>
#include <thread>

#include "kv/kv_cache.h"
#include "server/prefix_store.h"
#include "support/session.h"

namespace narrows::server {
namespace {

using narrows::testing::LoadedTiny;
using narrows::testing::random_tokens;
using narrows::testing::TinyModel;
using ::testing::HasSubstr;

const LoadedTiny& tiny() {
  static const LoadedTiny loaded([] {
    TinyModel m;
    m.n_layer = 4;
    m.n_ctx = 8192;
    return m;
  }());
  return loaded;
}

struct Setup {
  int n_slots = 4;
  int64_t n_ctx = 0;
  int64_t memory_bytes = 0;
  int max_waiting = 64;
  std::string kv = "klt";
  const LoadedTiny* model = &tiny();
};

struct Engine {
  Metrics metrics;
  std::unique_ptr<Scheduler> scheduler;

  explicit Engine(const Setup& setup = {}) {
    SchedulerOptions o;
    o.n_slots = setup.n_slots;
    o.max_waiting = setup.max_waiting;
    o.memory_bytes = setup.memory_bytes;
    o.session.kv = narrows::testing::kv(setup.kv);
    o.session.n_ctx = setup.n_ctx;
    o.session.n_threads = 2;
    auto made = Scheduler::create(setup.model->model, o, &metrics);
    if (!made.ok()) {
      ADD_FAILURE() << made.status().message();
      std::abort();
    }
    scheduler = std::move(*made);
  }
};

std::shared_ptr<Job> job_of(std::vector<Token> prompt, int64_t max_tokens, const std::string& kv = "klt") {
  auto job = std::make_shared<Job>();
  job->id = "test";
  job->profile = narrows::testing::kv(kv);
  job->request.max_tokens = max_tokens;
  job->request.sampling.temperature = 0;
  job->request.ignore_eos = true;
  job->request.prompts.emplace_back();
  job->prompts.push_back(std::move(prompt));
  return job;
}

struct Answer {
  std::string text;
  ChoiceResult result;
  std::optional<ApiError> error;
  std::vector<TokenLogprob> logprobs;
  int n_progress = 0;
};

/// All choices of a job, which must end.
std::vector<Answer> wait_for(Job& job) {
  std::vector<Answer> answers(static_cast<size_t>(job.n_choice()));
  for (int open = job.n_choice(); open > 0;) {
    auto event = job.channel.pop(std::chrono::seconds(60));
    if (!event) {
      ADD_FAILURE() << "no event";
      return answers;
    }
    Answer& a = answers[static_cast<size_t>(event->choice)];
    switch (event->kind) {
      case Event::Kind::progress:
        ++a.n_progress;
        break;
      case Event::Kind::text:
        a.text += event->text;
        for (auto& l : event->logprobs) a.logprobs.push_back(std::move(l));
        break;
      case Event::Kind::finished:
        a.result = event->result;
        --open;
        break;
      case Event::Kind::failed:
        a.error = event->error;
        --open;
        break;
    }
  }
  return answers;
}

Answer run(Engine& engine, const std::shared_ptr<Job>& job) {
  if (const auto refused = engine.scheduler->submit(job)) {
    Answer a;
    a.error = refused;
    return a;
  }
  return wait_for(*job).front();
}

std::vector<Token> prompt_with(int64_t n_common, int64_t n, uint32_t tail) {
  std::vector<Token> tokens = random_tokens(n_common, 5);
  for (const Token t : random_tokens(n - n_common, 100 + tail)) tokens.push_back(t);
  return tokens;
}

TEST(Scheduler, TextDoesNotDependOnTheOthers) {
  std::vector<std::string> alone;
  const std::vector<std::string> profiles = {"klt", "f16", "kivi-4"};
  const auto job = [&](int i) {
    return job_of(random_tokens(5 + 190 * i, static_cast<uint32_t>(i)), 30 + i,
                  profiles[static_cast<size_t>(i) % 3]);
  };
  for (int i = 0; i < 9; ++i) {
    Engine engine({.n_slots = 1});
    const Answer a = run(engine, job(i));
    ASSERT_FALSE(a.error) << a.error->message;
    EXPECT_EQ(a.result.n_generated, 30 + i);
    EXPECT_STREQ(a.result.finish_reason, "length");
    alone.push_back(a.text);
  }
  Engine engine({.n_slots = 4});
  std::vector<std::shared_ptr<Job>> jobs;
  for (int i = 0; i < 9; ++i) {
    jobs.push_back(job(i));
    ASSERT_FALSE(engine.scheduler->submit(jobs.back()));
  }
  for (int i = 0; i < 9; ++i) {
    const Answer a = wait_for(*jobs[static_cast<size_t>(i)]).front();
    ASSERT_FALSE(a.error) << a.error->message;
    EXPECT_EQ(a.text, alone[static_cast<size_t>(i)]) << i;
  }
  EXPECT_EQ(engine.metrics.requests, 9U);
  EXPECT_EQ(engine.metrics.generated_tokens, 9U * 30 + 36);
}

TEST(Scheduler, CachedIsUncached) {
  for (const std::string kv : {"klt", "f16", "sals-25", "kivi-2"}) {
    Engine engine({.kv = kv});
    const auto first = run(engine, job_of(prompt_with(2500, 2900, 1), 20, kv));
    EXPECT_EQ(first.result.n_cached, 0);
    for (const bool cache : {true, false, true}) {
      auto job = job_of(prompt_with(2500, 2800, 2), 40, kv);
      job->request.cache_prompt = cache;
      const Answer got = run(engine, job);
      Engine fresh({.kv = kv});
      const Answer want = run(fresh, job_of(prompt_with(2500, 2800, 2), 40, kv));
      EXPECT_EQ(got.text, want.text) << kv;
      EXPECT_EQ(want.result.n_cached, 0);
      if (cache) {
        EXPECT_GT(got.result.n_cached, 2500 - 257);
      }
      if (!cache) {
        EXPECT_EQ(got.result.n_cached, 0);
      }
    }
    // The first one again, after the others: its own cache is still somewhere.
    const auto again = run(engine, job_of(prompt_with(2500, 2900, 1), 20, kv));
    EXPECT_EQ(again.text, first.text);
    EXPECT_GT(again.result.n_cached, 2900 - 128 - 257);
    EXPECT_GT(engine.metrics.cached_tokens, 0U);
  }
}

const LoadedTiny& hybrid() {
  static const LoadedTiny loaded([] {
    TinyModel m;
    m.architecture = "qwen35";
    m.n_layer = 4;
    m.attends_in = 4;
    m.n_ctx = 16384;
    return m;
  }());
  return loaded;
}

// Five turns about a long text on a model with recurrent layers, whose template drops half of each answer
// once it is history; another conversation about the same text comes in between.
TEST(Scheduler, AChatOnAHybridReadsNewTokensAndFewMore) {
  for (const std::string kv : {"f16", "klt"}) {
    Engine engine({.n_slots = 2, .kv = kv, .model = &hybrid()});
    const std::vector<Token> text = random_tokens(12000, 5);
    std::vector<Token> history = text, last;
    for (uint32_t turn = 0; turn < 5; ++turn) {
      for (const Token t : random_tokens(40, 200 + turn)) history.push_back(t);
      const auto n = static_cast<int64_t>(history.size());
      const int64_t n_new = n - static_cast<int64_t>(last.size());
      const Answer a = run(engine, job_of(history, 60, kv));
      ASSERT_FALSE(a.error);
      if (turn > 0) {
        EXPECT_LE(n - a.result.n_cached, n_new + 512) << kv << ", turn " << turn;
      }
      if (turn == 4) {
        Engine fresh({.kv = kv, .model = &hybrid()});
        EXPECT_EQ(run(fresh, job_of(history, 60, kv)).text, a.text) << kv;
      }
      last = history;
      for (const Token t : random_tokens(30, 300 + turn)) history.push_back(t);
      if (turn != 2) continue;
      std::vector<Token> other = text;
      for (const Token t : random_tokens(80, 999)) other.push_back(t);
      EXPECT_GT(run(engine, job_of(other, 10, kv)).result.n_cached, 12000 - 512) << kv;
    }
  }
}

// A longer conversation stands for a shorter one that it begins with, if it can go back to where that ends.
TEST(PrefixStore, AHybridsLongerConversationLeavesTheShorterOne) {
  const std::vector<Token> text = random_tokens(2400, 3), next = random_tokens(40, 4);
  const auto held = [&](const LoadedTiny& loaded, int64_t n) {
    Held made{testing::make_session(loaded.model, {.segments = true}), {text.begin(), text.begin() + n}};
    EXPECT_OK(made.session->prefill(made.tokens));
    return made;
  };
  std::vector<Token> prompt(text.begin(), text.begin() + 600);
  prompt.insert(prompt.end(), next.begin(), next.end());
  const KvProfile f16 = testing::kv("f16");
  for (const bool recurrent : {false, true}) {
    const LoadedTiny& loaded = recurrent ? hybrid() : tiny();
    const int64_t of_shorter = held(loaded, 600).usable(prompt, f16);
    EXPECT_GT(of_shorter, 0);
    for (const bool longer_first : {false, true}) {
      PrefixStore store(int64_t{1} << 30);
      for (const int64_t n : {600, 2400}) store.put(held(loaded, longer_first ? 3000 - n : n));
      EXPECT_EQ(store.size(), recurrent ? 2 : 1) << longer_first;
      int64_t n = 0;
      store.best(prompt, f16, n);
      EXPECT_EQ(n, of_shorter) << recurrent << longer_first;
    }
  }
}

// More conversations than slots: those without a slot are kept in the store.
TEST(Scheduler, ConversationsTakeTurns) {
  Engine engine({.n_slots = 2});
  std::vector<std::vector<Token>> talks;
  for (uint32_t i = 0; i < 5; ++i) talks.push_back(random_tokens(900, 20 + i));
  for (int round = 0; round < 3; ++round) {
    for (auto& talk : talks) {
      const auto n_before = static_cast<int64_t>(talk.size());
      const Answer a = run(engine, job_of(talk, 10));
      ASSERT_FALSE(a.error);
      if (round > 0) {
        EXPECT_GT(a.result.n_cached, n_before - 300 - 128 - 256);
      }
      for (const Token t : random_tokens(290, static_cast<uint32_t>(n_before))) talk.push_back(t);
    }
  }
  EXPECT_GT(engine.scheduler->gauges().n_stored, 0);
}

TEST(Scheduler, ChoicesOfOnePromptReadItOnce) {
  Engine engine;
  auto job = job_of(random_tokens(1500), 12);
  job->request.n = 3;
  job->request.sampling.temperature = 1.5F;
  job->request.sampling.seed = 7;
  ASSERT_FALSE(engine.scheduler->submit(job));
  const auto answers = wait_for(*job);
  int64_t n_read = 0;
  for (int i = 0; i < 3; ++i) {
    const Answer& a = answers[static_cast<size_t>(i)];
    ASSERT_FALSE(a.error);
    n_read += a.result.n_prompt - a.result.n_cached;
    auto solo = job_of(random_tokens(1500), 12);
    solo->request.sampling = job->request.sampling;
    solo->request.sampling.seed = 7 + static_cast<uint32_t>(i);
    Engine other;
    EXPECT_EQ(run(other, solo).text, a.text) << i;
  }
  EXPECT_LT(n_read, 1500 + 2 * (128 + 256));
  EXPECT_NE(answers[0].text, answers[1].text);
}

TEST(Scheduler, SeveralPrompts) {
  Engine engine({.n_slots = 2});
  auto job = job_of(random_tokens(50, 1), 5);
  job->prompts.push_back(random_tokens(60, 2));
  job->prompts.push_back(random_tokens(70, 3));
  ASSERT_FALSE(engine.scheduler->submit(job));
  const auto answers = wait_for(*job);
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(answers[i].result.n_prompt, 50 + 10 * static_cast<int64_t>(i));
    EXPECT_EQ(answers[i].text, run(engine, job_of(job->prompts[i], 5)).text);
  }
}

TEST(Scheduler, StopsLogprobsAndGrammar) {
  Engine engine;
  const Answer all = run(engine, job_of(random_tokens(40), 40));
  ASSERT_GT(all.text.size(), 10U);
  auto job = job_of(random_tokens(40), 40);
  const std::string stop = all.text.substr(all.text.size() / 2, 3);
  job->request.stops = {stop};
  const Answer cut = run(engine, job);
  EXPECT_EQ(cut.text, all.text.substr(0, all.text.find(stop)));
  EXPECT_STREQ(cut.result.finish_reason, "stop");

  job = job_of(random_tokens(40), 8);
  job->request.logprobs = 2;
  const Answer with = run(engine, job);
  ASSERT_EQ(with.logprobs.size(), 8U);
  for (const TokenLogprob& l : with.logprobs) {
    EXPECT_LE(l.logprob, 0);
    ASSERT_EQ(l.top.size(), 2U);
    EXPECT_EQ(l.top[0].logprob, l.logprob);  // greedy
    EXPECT_GE(l.top[0].logprob, l.top[1].logprob);
  }

  job = job_of(random_tokens(40), 40);
  job->request.ignore_eos = false;
  job->request.grammar = R"(root ::= [0-9]{3} "!")";
  const Answer bound = run(engine, job);
  EXPECT_THAT(bound.text, ::testing::MatchesRegex("[0-9]{3}!"));
  EXPECT_STREQ(bound.result.finish_reason, "stop");
  job = job_of(random_tokens(40), 40);
  job->request.grammar = "no grammar";
  EXPECT_EQ(run(engine, job).error->http_code, 400);

  EXPECT_EQ(run(engine, job_of(random_tokens(40), 0)).text, "");
}

TEST(Scheduler, PromptsThatDoNotFit) {
  Engine engine({.n_ctx = 600});
  const Answer a = run(engine, job_of(random_tokens(601), 1));
  ASSERT_TRUE(a.error);
  EXPECT_EQ(a.error->type, "exceed_context_size_error");
  EXPECT_EQ(a.error->n_prompt_tokens, 601);
  EXPECT_EQ(a.error->n_ctx, 600);
  EXPECT_EQ(run(engine, job_of({}, 1)).error->http_code, 400);
  const Answer full = run(engine, job_of(random_tokens(595), 100));
  ASSERT_FALSE(full.error);
  EXPECT_STREQ(full.result.finish_reason, "length");
  EXPECT_EQ(full.result.n_generated, 6);  // the last one needs no room
  EXPECT_EQ(run(engine, job_of(random_tokens(600), 5)).result.n_generated, 1);
  EXPECT_EQ(engine.metrics.refused, 2U);
}

// docs/server_api.md: "A request gets one of --slots slots when one is free and its cache fits"
TEST(Scheduler, MemoryRefusesWithFiguresAndMakesOthersWait) {
  // Room for one cache of 1,000 tokens and a half.
  const int64_t one = cache_bytes_estimate(*tiny().model, narrows::testing::kv("klt"), 1000, true);
  Engine engine({.n_slots = 4, .memory_bytes = one * 3 / 2});
  const Answer large = run(engine, job_of(random_tokens(2000), 10));
  ASSERT_TRUE(large.error);
  EXPECT_EQ(large.error->http_code, 503);
  EXPECT_THAT(large.error->message, HasSubstr("2000"));
  EXPECT_THAT(large.error->message, HasSubstr("MB"));
  std::vector<std::shared_ptr<Job>> jobs;
  for (uint32_t i = 0; i < 4; ++i) {
    jobs.push_back(job_of(random_tokens(900, i), 100));
    ASSERT_FALSE(engine.scheduler->submit(jobs.back()));
  }
  int most_busy = 0;
  std::atomic<bool> over{false};
  std::thread watcher([&] {
    while (!over) {
      int busy = 0;
      for (const SlotInfo& s : engine.scheduler->slots()) busy += s.state != SlotState::idle ? 1 : 0;
      most_busy = std::max(most_busy, busy);
      EXPECT_LE(engine.scheduler->gauges().cache_bytes, engine.scheduler->memory_limit());
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  for (auto& job : jobs) EXPECT_FALSE(wait_for(*job).front().error);
  over = true;
  watcher.join();
  EXPECT_EQ(most_busy, 1);
}

TEST(Scheduler, AFullQueueRefuses) {
  Engine engine({.n_slots = 1, .max_waiting = 2});
  std::vector<std::shared_ptr<Job>> jobs;
  std::optional<ApiError> refused;
  for (int i = 0; i < 8 && !refused; ++i) {
    auto job = job_of(random_tokens(3000, static_cast<uint32_t>(i)), 200);
    refused = engine.scheduler->submit(job);
    if (!refused) jobs.push_back(job);
  }
  ASSERT_TRUE(refused);
  EXPECT_EQ(refused->http_code, 429);
  for (auto& job : jobs) job->channel.cancel();
  // The queue is free again as soon as the engine has had a turn.
  Answer answer = run(engine, job_of(random_tokens(10), 3));
  for (const auto begin = Clock::now(); answer.error && seconds_since(begin) < 5;)
    answer = run(engine, job_of(random_tokens(10), 3));
  EXPECT_FALSE(answer.error);
}

TEST(Scheduler, AClientThatGoesFreesItsSlotAtOnce) {
  Engine engine({.n_slots = 1});
  for (const int64_t n_prompt : {20, 8000}) {  // while writing, while reading
    auto job = job_of(random_tokens(n_prompt), 8000 - n_prompt);
    ASSERT_FALSE(engine.scheduler->submit(job));
    if (n_prompt == 20) {
      EXPECT_TRUE(job->channel.pop(std::chrono::seconds(20)));
    }
    job->channel.cancel();
    const auto begin = Clock::now();
    EXPECT_FALSE(run(engine, job_of(random_tokens(5), 2)).error);
    EXPECT_LT(seconds_since(begin), 2);
  }
  EXPECT_GE(engine.metrics.cancelled, 1U);
}

// What was cached before a question is there after it, though it was given up while its prompt was read; and
// of that prompt the stripes that were done.
// docs/server_api.md: "what the slot held of the conversation before stays cached"
TEST(Scheduler, AQuestionGivenUpLeavesTheDocumentCached) {
  for (const int64_t n_document : {900, 2700}) {
    const auto document = random_tokens(n_document);
    const auto with = [&](int64_t n, uint32_t seed) {
      auto all = document;
      for (const Token t : random_tokens(n, seed)) all.push_back(t);
      return all;
    };
    Engine engine({.n_slots = 1}), solo({.n_slots = 1});
    EXPECT_FALSE(run(engine, job_of(with(200, 5), 3)).error);
    const auto n_cancelled = engine.metrics.cancelled.load();
    const uint64_t before = engine.metrics.prefill_us;
    auto dropped = job_of(with(5000, 6), 3);
    ASSERT_FALSE(engine.scheduler->submit(dropped));
    while (engine.metrics.prefill_us == before) std::this_thread::yield();
    dropped->channel.cancel();
    const Answer next = run(engine, job_of(with(200, 7), 10));
    EXPECT_FALSE(next.error);
    EXPECT_EQ(engine.metrics.cancelled, n_cancelled + 1);
    EXPECT_GT(next.result.n_cached, n_document - 257) << "the document is still there";
    EXPECT_EQ(next.text, run(solo, job_of(with(200, 7), 10)).text);
  }
  const auto tokens = random_tokens(7500);
  Engine engine({.n_slots = 1}), solo({.n_slots = 1});
  auto dropped = job_of(tokens, 3);
  ASSERT_FALSE(engine.scheduler->submit(dropped));
  const auto far = [](const SlotInfo& s) { return s.state == SlotState::reading && s.prefill_done > 0.6; };
  while (!far(engine.scheduler->slots().front())) std::this_thread::yield();
  dropped->channel.cancel();
  const Answer next = run(engine, job_of(tokens, 10));
  EXPECT_GT(next.result.n_cached, 4000);
  EXPECT_EQ(next.text, run(solo, job_of(tokens, 10)).text);
}

// A short prompt while a long one is read; and the long one goes on.
// docs/server_api.md: "Of several prompts the one that came first and the one that has least left take turns"
TEST(Scheduler, AShortPromptPassesALongOne) {
  Engine engine({.n_slots = 2});
  auto long_job = job_of(random_tokens(8000), 5);
  long_job->request.return_progress = true;
  ASSERT_FALSE(engine.scheduler->submit(long_job));
  while (engine.metrics.prefill_us == 0) std::this_thread::yield();
  const Answer brief = run(engine, job_of(random_tokens(10), 5));
  EXPECT_FALSE(brief.error);
  bool reading = false;
  for (const SlotInfo& s : engine.scheduler->slots()) reading = reading || s.state == SlotState::reading;
  EXPECT_TRUE(reading);
  const Answer a = wait_for(*long_job).front();
  EXPECT_FALSE(a.error);
  EXPECT_GE(a.n_progress, 1);
}

TEST(Scheduler, SlotsAreHeldAndGivenBack) {
  Engine engine({.n_slots = 2});
  EXPECT_FALSE(run(engine, job_of(random_tokens(700), 5)).error);
  ApiError error;
  EXPECT_FALSE(engine.scheduler->hold(2, error));
  EXPECT_EQ(error.http_code, 404);
  EXPECT_FALSE(engine.scheduler->hold(-1, error));
  int used = -1;
  for (const SlotInfo& s : engine.scheduler->slots()) used = s.n_tokens > 0 ? s.id : used;
  ASSERT_GE(used, 0);
  auto held = engine.scheduler->hold(used, error);
  ASSERT_TRUE(held);
  EXPECT_EQ(held->tokens.size(), 704U);  // the last token is drawn, not computed
  EXPECT_EQ(held->session->n_past(), 704);
  EXPECT_FALSE(engine.scheduler->hold(used, error));
  EXPECT_EQ(error.http_code, 409);
  EXPECT_FALSE(run(engine, job_of(random_tokens(20), 5)).error);  // the other slot
  engine.scheduler->release(used, std::move(*held));
  EXPECT_GT(run(engine, job_of(random_tokens(900), 5)).result.n_cached, 0);
}

TEST(Scheduler, EndsWhileMuchIsGoingOn) {
  for (const int patience_ms : {0, 20'000}) {
    Engine engine({.n_slots = 2});
    std::vector<std::shared_ptr<Job>> jobs;
    for (uint32_t i = 0; i < 5; ++i) {
      jobs.push_back(job_of(random_tokens(400, i), patience_ms == 0 ? 5000 : 20));
      ASSERT_FALSE(engine.scheduler->submit(jobs.back()));
    }
    engine.scheduler->stop(std::chrono::milliseconds(patience_ms));
    for (auto& job : jobs) {
      const Answer a = wait_for(*job).front();
      EXPECT_EQ(a.error.has_value(), patience_ms == 0);
      if (a.error) {
        EXPECT_EQ(a.error->http_code, 503);
      }
    }
    EXPECT_EQ(engine.scheduler->submit(job_of(random_tokens(5), 1))->http_code, 503);
    EXPECT_EQ(engine.scheduler->slots().size(), 2U);
  }
}

// Everything at once from several threads, as ThreadSanitizer wants to see it.
TEST(Scheduler, ManyClients) {
  Engine engine({.n_slots = 3});
  std::vector<std::string> want;
  for (uint32_t i = 0; i < 6; ++i) {
    Engine solo({.n_slots = 1});
    want.push_back(run(solo, job_of(random_tokens(40 + 150 * i, i), 15)).text);
  }
  std::vector<std::thread> clients;
  for (int c = 0; c < 5; ++c) {
    clients.emplace_back([&, c] {
      std::mt19937 random(static_cast<uint32_t>(c));
      for (int k = 0; k < 8; ++k) {
        const auto i = static_cast<uint32_t>(random() % 6);
        auto job = job_of(random_tokens(40 + 150 * i, i), 15);
        const bool leaves = random() % 3 == 0;
        if (engine.scheduler->submit(job)) continue;
        if (leaves) {
          job->channel.cancel();
          continue;
        }
        const Answer a = wait_for(*job).front();
        EXPECT_FALSE(a.error);
        EXPECT_EQ(a.text, want[i]);
        (void)engine.scheduler->slots();
        (void)engine.scheduler->gauges();
      }
    });
  }
  for (std::thread& t : clients) t.join();
  for (const SlotInfo& s : engine.scheduler->slots()) EXPECT_EQ(s.job_id, "");
}

}  // namespace
}  // namespace narrows::server
