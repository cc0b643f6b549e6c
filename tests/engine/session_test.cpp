// What Session promises beside numbers: limits, refusals that leave it as it was, cancelling, reset, sharing
// a prefill, repeatable results, errors that name the layer.
#include "support/session.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <thread>

#include "base/cgroup.h"
#include "calibrate/key_statistics.h"
#include "engine/session_impl.h"
#include "support/refusal.h"

namespace narrows::testing {
namespace {

/// Layers 0, 1 and 3 of SALS profiles are dense, layer 2 is compressed.
TinyModel four_layers() {
  TinyModel m;
  m.n_layer = 4;
  return m;
}

const LoadedTiny& tiny() {
  static const LoadedTiny loaded(four_layers());
  return loaded;
}

const std::vector<Token>& tokens() {
  static const std::vector<Token> all = random_tokens(1500);
  return all;
}

std::span<const Token> part(int64_t from, int64_t to) {
  return std::span(tokens()).subspan(static_cast<size_t>(from), static_cast<size_t>(to - from));
}

/// Keys and values of every layer as readers see them.
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

Status creation(const std::shared_ptr<const Model>& model, const SessionSetup& setup) {
  SessionOptions options;
  options.kv = kv(setup.kv);
  options.n_threads = setup.n_threads;
  options.n_ctx = setup.n_ctx;
  options.basis_path = setup.basis_path;
  auto made = Session::create(model, options);
  return made.ok() ? Status() : made.status();
}

// --- limits
// -------------------------------------------------------------------------------------------------------

TEST(SessionLimits, ContextAndThreadsOutOfRange) {
  for (const int64_t n_ctx : {int64_t{-1}, int64_t{2049}, int64_t{1} << 40}) {
    expect_refusal(creation(tiny().model, {.n_ctx = n_ctx}), StatusCode::invalid_argument,
                   {std::to_string(n_ctx), "2048"});
  }
  for (const int n : {-1, 513, 1 << 30}) {
    expect_refusal(creation(tiny().model, {.n_threads = n}), StatusCode::invalid_argument,
                   {std::to_string(n), "512"});
  }
  EXPECT_EQ(make_session(tiny().model)->n_ctx(), 2048);
  EXPECT_EQ(make_session(tiny().model, {.n_ctx = 7})->n_ctx(), 7);
  EXPECT_EQ(make_session(tiny().model, {.n_threads = 0})->n_threads(), usable_cores());
}

TEST(SessionLimits, ACacheThatCannotFitIsRefusedAtOnce) {
  TinyModel wide = four_layers();  // a token takes 64 kB
  wide.n_ctx = 5'000'000;
  wide.n_head = wide.n_head_kv = 16;
  wide.head_dim = 256;
  const LoadedTiny loaded(wide);
  expect_refusal(creation(loaded.model, {.n_ctx = wide.n_ctx}), StatusCode::out_of_memory,
                 {"5000000", "f16", "GB", "--ctx"});
  // The model's own limit is not a demand.
  auto session = make_session(loaded.model);
  EXPECT_EQ(session->n_ctx(), wide.n_ctx);
  ASSERT_OK(session->prefill(part(0, 3)));
}

// --- refusals
// -----------------------------------------------------------------------------------------------------

TEST(SessionRefusals, AnEmptyPrompt) {
  auto session = make_session(tiny().model);
  expect_refusal(session->prefill({}), StatusCode::invalid_argument, {"empty"});
  expect_refusal(Session::prefill_together({}, part(0, 3)), StatusCode::invalid_argument, {});
  ASSERT_OK(session->prefill(part(0, 3)));
}

TEST(SessionRefusals, AFullContextLeavesTheSessionAsItWas) {
  for (const std::string kv : {"f16", "kivi-4", "sals-25"}) {
    auto reference = make_session(tiny().model, {.kv = kv});
    ASSERT_OK(reference->prefill(part(0, 60)));
    auto session = make_session(tiny().model, {.kv = kv, .n_ctx = 100});
    expect_refusal(session->prefill(part(0, 101)), StatusCode::context_full, {"101", "100", "--ctx", "2048"});
    EXPECT_EQ(session->n_past(), 0);
    ASSERT_OK(session->prefill(part(0, 60)));
    expect_refusal(session->prefill(part(60, 101)), StatusCode::context_full, {"41", "60", "100"});
    EXPECT_EQ(session->n_past(), 60);
    EXPECT_EQ(max_difference(reference->logits(), session->logits()), 0);
    EXPECT_EQ(max_difference(cache_content(*reference), cache_content(*session)), 0);

    ASSERT_OK(session->prefill(part(60, 95)));
    decode_all(*session, part(95, 100));  // to the last token
    EXPECT_EQ(session->n_past(), 100);
    const auto before = copy(session->logits());
    expect_refusal(session->decode(5), StatusCode::context_full, {"100"});
    expect_refusal(session->prefill(part(0, 1)), StatusCode::context_full, {"100"});
    EXPECT_EQ(max_difference(session->logits(), before), 0);
    session->reset();
    ASSERT_OK(session->prefill(part(0, 60)));
    EXPECT_EQ(max_difference(reference->logits(), session->logits()), 0) << kv;
  }
}

TEST(SessionRefusals, ATokenOutsideTheVocabularyLeavesTheSessionAsItWas) {
  auto reference = make_session(tiny().model);
  auto session = make_session(tiny().model);
  ASSERT_OK(reference->prefill(part(0, 70)));
  ASSERT_OK(session->prefill(part(0, 70)));
  for (const Token bad : {-1, static_cast<Token>(kTinyVocab), 1 << 30}) {
    expect_refusal(session->decode(bad), StatusCode::invalid_argument, {std::to_string(bad), "258"});
  }
  EXPECT_EQ(session->n_past(), 70);
  EXPECT_EQ(max_difference(decode_all(*reference, part(70, 80)), decode_all(*session, part(70, 80))), 0);
}

TEST(SessionRefusals, AFileThatWasCutMeanwhile) {
  const LoadedTiny own(four_layers());
  auto session = make_session(own.model);
  ASSERT_OK(session->prefill(part(0, 5)));
  ASSERT_EQ(::truncate(own.path.c_str(), 8000), 0);  // the embedding is read row by row
  expect_refusal(session->decode(200), StatusCode::io_error, {own.path, "shorter"});
}

// --- cancel and reset
// ---------------------------------------------------------------------------------------------

TEST(SessionCancel, AnywhereThenResetIsAsNew) {
  for (const std::string kv : {"f16", "kivi-2", "sals-25"}) {
    auto fresh = make_session(tiny().model, {.kv = kv});
    ASSERT_OK(fresh->prefill(part(0, 700)));
    const auto wanted = decode_all(*fresh, part(700, 705));
    for (const int allowed : {0, 1, 3, 6}) {  // calls of progress; a layer has two chunks
      auto session = make_session(tiny().model, {.kv = kv});
      int left = allowed;
      const Status s = session->prefill(part(100, 800), [&](double) { return left-- > 0; });
      expect_refusal(s, StatusCode::cancelled, {});
      // Layers hold different numbers of tokens now: nothing but reset() may follow.
      EXPECT_FALSE(session->decode(1).ok());
      EXPECT_FALSE(session->prefill(part(0, 5)).ok());
      session->reset();
      EXPECT_EQ(session->n_past(), 0);
      ASSERT_OK(session->prefill(part(0, 700)));
      EXPECT_EQ(max_difference(decode_all(*session, part(700, 705)), wanted), 0)
          << kv << ", cancelled after " << allowed;
    }
  }
}

TEST(SessionCancel, SharedPrefillCancelsAll) {
  auto a = make_session(tiny().model), b = make_session(tiny().model, {.kv = "kivi-4"});
  const std::vector<Session*> both = {a.get(), b.get()};
  expect_refusal(Session::prefill_together(both, part(0, 600), [](double done) { return done < 0.3; }),
                 StatusCode::cancelled, {});
  EXPECT_FALSE(a->decode(1).ok());
  EXPECT_FALSE(b->decode(1).ok());
  a->reset();
  b->reset();
  ASSERT_OK(Session::prefill_together(both, part(0, 600)));
}

class EveryProfile : public ::testing::TestWithParam<std::string> {};

TEST_P(EveryProfile, ResetForgetsEverything) {
  auto session = make_session(tiny().model, {.kv = GetParam()});
  auto other = make_session(tiny().model, {.kv = GetParam()});
  ASSERT_OK(other->prefill(part(700, 1400)));  // its own basis, if it has one, is of another text
  decode_all(*other, part(1400, 1420));
  other->reset();
  EXPECT_EQ(other->n_past(), 0);
  EXPECT_EQ(other->cache_stats().bytes, 0);
  for (Session* s : {session.get(), other.get()}) ASSERT_OK(s->prefill(part(0, 640)));
  EXPECT_EQ(max_difference(session->logits(), other->logits()), 0);
  EXPECT_EQ(max_difference(decode_all(*session, part(640, 660)), decode_all(*other, part(640, 660))), 0);
  EXPECT_EQ(max_difference(cache_content(*session), cache_content(*other)), 0);
}

// Work is cut by the tokens, not by the threads.
TEST_P(EveryProfile, EqualRunsAreBitIdenticalOnAnyNumberOfThreads) {
  std::vector<std::vector<float>> first;
  for (const int n_threads : {1, 1, 2, 2, 3}) {
    auto session = make_session(tiny().model, {.kv = GetParam(), .n_threads = n_threads});
    ASSERT_OK(session->prefill(part(0, 600)));
    std::vector<std::vector<float>> run = {copy(session->logits())};
    for (auto& row : decode_all(*session, part(600, 606))) run.push_back(std::move(row));
    if (first.empty()) first = run;
    EXPECT_EQ(max_difference(first, run), 0) << n_threads << " threads";
  }
}

TEST_P(EveryProfile, SharedPrefillIsItsOwnPrefill) {
  std::vector<std::unique_ptr<Session>> sessions;
  std::vector<Session*> pointers;
  for (const std::string& kv : KvProfile::names()) {
    sessions.push_back(make_session(tiny().model, {.kv = kv}));
    pointers.push_back(sessions.back().get());
  }
  ASSERT_OK(Session::prefill_together(pointers, part(0, 620)));
  auto alone = make_session(tiny().model, {.kv = GetParam()});
  ASSERT_OK(alone->prefill(part(0, 620)));
  for (const Session* s : pointers) {
    EXPECT_EQ(max_difference(s->logits(), alone->logits()),
              0);  // a prompt's own logits are exact whatever the profile
  }
  for (Session* s : pointers) {
    if (s->profile().name != GetParam()) continue;
    EXPECT_EQ(max_difference(cache_content(*s), cache_content(*alone)), 0);
    EXPECT_EQ(max_difference(decode_all(*s, part(620, 640)), decode_all(*alone, part(620, 640))), 0);
  }
}

std::string profile_name(const ::testing::TestParamInfo<std::string>& info) {
  std::string name = info.param;
  for (char& c : name) {
    if (std::isalnum(static_cast<unsigned char>(c)) == 0) c = '_';
  }
  return name;
}

INSTANTIATE_TEST_SUITE_P(Profiles, EveryProfile, ::testing::ValuesIn(KvProfile::names()), profile_name);

TEST(SharedPrefill, RefusesWhatCannotShareAndTouchesNothing) {
  auto a = make_session(tiny().model), b = make_session(tiny().model, {.n_ctx = 50});
  const LoadedTiny own(four_layers());
  auto stranger = make_session(own.model);
  auto used = make_session(tiny().model);
  ASSERT_OK(used->prefill(part(0, 3)));
  expect_refusal(Session::prefill_together(std::vector<Session*>{a.get(), b.get()}, part(0, 60)),
                 StatusCode::context_full, {"60", "50"});
  expect_refusal(Session::prefill_together(std::vector<Session*>{a.get(), stranger.get()}, part(0, 10)),
                 StatusCode::invalid_argument, {"one model"});
  expect_refusal(Session::prefill_together(std::vector<Session*>{a.get(), used.get()}, part(0, 10)),
                 StatusCode::invalid_argument, {"empty"});
  expect_refusal(Session::prefill_together(std::vector<Session*>{used.get(), a.get()}, part(0, 10)),
                 StatusCode::invalid_argument, {"empty"});
  EXPECT_EQ(a->n_past(), 0);
  EXPECT_EQ(b->n_past(), 0);
  EXPECT_EQ(stranger->n_past(), 0);
  EXPECT_EQ(used->n_past(), 3);
  ASSERT_OK(Session::prefill_together(std::vector<Session*>{a.get(), b.get()}, part(0, 50)));
}

TEST(Session, KeepsItsModelAlive) {
  auto loaded = std::make_unique<LoadedTiny>(four_layers());
  auto session = make_session(loaded->model);
  loaded.reset();  // the file is gone too, but open
  ASSERT_OK(session->prefill(part(0, 80)));
  auto reference = make_session(tiny().model);
  ASSERT_OK(reference->prefill(part(0, 80)));
  EXPECT_EQ(max_difference(session->logits(), reference->logits()), 0);
}

// --- numbers that are none
// ----------------------------------------------------------------------------------------

/// A model with one number of one tensor changed.
TinyModel spoilt(const std::string& name, float value) {
  TinyModel m = four_layers();
  m.edit_tensors = [=](std::vector<TinyTensor>& all) { tensor(all, name).data[5] = value; };
  return m;
}

TEST(NonFinite, PrefillNamesTheLayer) {
  const float nan = std::nanf(""), inf = std::numeric_limits<float>::infinity();
  struct {
    const char* tensor;
    float value;
    const char* layer;
  } cases[] = {
      {"blk.0.attn_k.weight", nan, "layer 0"},
      {"blk.2.attn_k.weight", nan, "layer 2"},
      {"blk.3.attn_v.weight", inf, "layer 3"},
      {"blk.1.attn_k.weight", 1e30F, "layer 1"},  // finite, but beyond f16
      {"blk.1.ffn_down.weight", nan, "layer 2"},  // seen where the next keys are made
      {"blk.0.attn_norm.weight", nan, "layer 0"},
  };
  for (const auto& c : cases) {
    const LoadedTiny bad(spoilt(c.tensor, c.value));
    for (const std::string kv : {"f16", "sals-25", "kivi-2"}) {
      auto session = make_session(bad.model, {.kv = kv});
      expect_refusal(session->prefill(part(0, 600)), StatusCode::non_finite, {c.layer, "token 0"});
      EXPECT_FALSE(session->decode(1).ok()) << c.tensor;  // until reset
    }
  }
}

TEST(NonFinite, ABadStepIsNamedAtTheNext) {
  // Token 77 alone has an embedding that is no number.
  TinyModel m = four_layers();
  m.edit_tensors = [](std::vector<TinyTensor>& all) {
    tensor(all, "token_embd.weight").data[77 * 64 + 3] = std::nanf("");
  };
  const LoadedTiny bad(m);
  for (const std::string& kv : KvProfile::names()) {
    auto session = make_session(bad.model, {.kv = kv});
    const std::vector<Token> prompt(30, 5);
    ASSERT_OK(session->prefill(prompt));
    EXPECT_TRUE(all_finite(session->logits()));
    const Status step = session->decode(77);
    if (step.ok()) {
      EXPECT_FALSE(all_finite(session->logits()));  // whoever samples from them is told by the sampler
    }
    expect_refusal(session->decode(5), StatusCode::non_finite, {"layer 0", "token 30"});
    session->reset();
    ASSERT_OK(session->prefill(prompt));
    ASSERT_OK(session->decode(5));
    EXPECT_TRUE(all_finite(session->logits())) << kv;
  }
}

// --- a basis from a file
// ------------------------------------------------------------------------------------------

struct Calibrated {
  TempDir dir;
  std::string path = dir.path("basis.gguf");

  explicit Calibrated(const Model& model) {
    auto basis = calibrate(model, part(0, 900), "test", 1);
    EXPECT_TRUE(basis.ok()) << basis.status().message();
    EXPECT_TRUE(write_basis_file(path, *basis, model.info()).ok());
  }
};

TEST(Basis, LetsShortPromptsBeCompressed) {
  const Calibrated basis(*tiny().model);
  auto with = make_session(tiny().model, {.kv = "sals-25", .basis_path = basis.path});
  auto without = make_session(tiny().model, {.kv = "sals-25"});
  ASSERT_OK(with->prefill(part(0, 300)));
  ASSERT_OK(without->prefill(part(0, 300)));
  EXPECT_GT(with->cache_stats().bytes_pages, 0);
  EXPECT_EQ(without->cache_stats().bytes_pages, 0);
  EXPECT_LT(with->cache_stats().bytes, without->cache_stats().bytes);
  decode_all(*with, part(300, 320));
  EXPECT_TRUE(all_finite(with->logits()));
  with->reset();  // a basis from a file stays
  ASSERT_OK(with->prefill(part(0, 300)));
  EXPECT_GT(with->cache_stats().bytes_pages, 0);
}

TEST(Basis, OfAnotherModelIsRefused) {
  const Calibrated basis(*tiny().model);
  TinyModel m = four_layers();
  m.seed = 2;  // the same shapes
  const LoadedTiny other(m);
  ASSERT_NE(other.model->info().fingerprint, tiny().model->info().fingerprint);
  SessionSetup options = {.kv = "sals-25", .basis_path = basis.path};
  expect_refusal(
      creation(other.model, options), StatusCode::invalid_file,
      {basis.path, other.model->info().fingerprint, tiny().model->info().fingerprint, "calibrate"});
  options.basis_path = basis.dir.path("none.gguf");
  expect_refusal(creation(tiny().model, options), StatusCode::invalid_file, {"none.gguf"});
  options.basis_path = basis.dir.path("");
  expect_refusal(creation(tiny().model, options), StatusCode::invalid_file, {"folder"});
  options.basis_path = tiny().path;
  expect_refusal(creation(tiny().model, options), StatusCode::invalid_file, {"not a basis"});
}

// Prompts and steps read rows of the embedding, and prompts in bfloat16 all weights, from the file again: not
// from another model that lies there by now.
TEST(SessionFile, AModelFileOverwrittenInPlaceIsNoticed) {
  for (const PrefillProducts products : {PrefillProducts::int8, PrefillProducts::automatic}) {
    TinyModel tiny, other;
    tiny.type = other.type = GGML_TYPE_Q8_0;
    other.seed = 2;
    const LoadedTiny loaded(tiny);
    auto session = make_session(loaded.model, {.prompt = {products, PrefillAttention::f32}});
    ASSERT_OK(session->prefill(random_tokens(150)));
    ASSERT_OK(session->decode(3));
    const auto want = copy(session->logits());
    std::this_thread::sleep_for(std::chrono::milliseconds(20));  // clocks of file systems are coarse
    other.write(loaded.path);
    expect_refusal(session->decode(3), StatusCode::io_error, {"tiny.gguf", "overwritten", "start again"});
    expect_refusal(session->prefill(random_tokens(150)), StatusCode::io_error, {"overwritten"});
    expect_refusal(session->begin_prefill(random_tokens(150)), StatusCode::io_error, {"overwritten"});
    session->reset();
    expect_refusal(session->prefill(random_tokens(150)), StatusCode::io_error, {"overwritten"});
    session->reset();
    // Cut off: an error too, no signal.
    ASSERT_EQ(::truncate(loaded.path.c_str(), 1000), 0);
    expect_refusal(session->prefill(random_tokens(150)), StatusCode::io_error, {"tiny.gguf"});
  }
}

TEST(SessionFile, AModelFileReplacedByRenamingDoesNoHarm) {
  TinyModel other;
  other.seed = 2;
  const LoadedTiny loaded{TinyModel()};
  auto fresh = make_session(loaded.model), session = make_session(loaded.model);
  ASSERT_OK(fresh->prefill(random_tokens(150)));
  ASSERT_EQ(::rename(other.write(loaded.dir.path("other.gguf")).c_str(), loaded.path.c_str()), 0);
  ASSERT_OK(session->prefill(random_tokens(150)));
  EXPECT_EQ(max_difference(copy(fresh->logits()), copy(session->logits())), 0);
}

// --- executors
// ----------------------------------------------------------------------------------------------------

TEST(Executors, TheOneThatWasGivenBackLastIsTaken) {
  ExecutorPool& pool = parts_of(*tiny().model).executors;
  auto first = pool.take(3), second = pool.take(3);
  ASSERT_TRUE(first.ok() && second.ok());
  Executor* const a = first->get();
  Executor* const b = second->get();
  ASSERT_NE(a, b);
  pool.give_back(std::move(*second));
  pool.give_back(std::move(*first));
  for (int turn = 0; turn < 3; ++turn) {  // steps that follow each other: its threads are awake
    auto again = pool.take(3);
    ASSERT_TRUE(again.ok());
    EXPECT_EQ(again->get(), a);
    pool.give_back(std::move(*again));
  }
  auto both = pool.take(3), other = pool.take(3);
  ASSERT_TRUE(both.ok() && other.ok());
  EXPECT_EQ(other->get(), b);
  pool.give_back(std::move(*both));
  pool.give_back(std::move(*other));
}

}  // namespace
}  // namespace narrows::testing
