// Saved sessions: they go on to the last bit, and a file that is anything else is refused with a sentence.
#include "narrows/session_file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>

#include "base/checksum.h"
#include "calibrate/key_statistics.h"
#include "engine/session_impl.h"
#include "support/refusal.h"
#include "support/sanitized.h"
#include "support/session.h"

namespace narrows::testing {
namespace {

TinyModel four_layers() {
  TinyModel m;
  m.n_layer = 4;
  m.n_ctx = 8192;
  return m;
}

const LoadedTiny& tiny() {
  static const LoadedTiny loaded(four_layers());
  return loaded;
}

SessionOptions options_of(const std::string& profile, bool segments) {
  SessionOptions options;
  options.kv = kv(profile);
  options.n_threads = 2;
  options.segments = segments;
  return options;
}

std::unique_ptr<Session> make(const SessionOptions& options) {
  auto session = Session::create(tiny().model, options);
  EXPECT_TRUE(session.ok()) << session.status().message();
  return std::move(*session);
}

std::string read_all(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

void write_all(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

/// The same bytes with a checksum that fits.
std::string signed_again(std::string bytes) {
  Checksum sum;
  sum.add(bytes.data(), bytes.size() - 8);
  const uint64_t value = sum.value();
  std::memcpy(bytes.data() + bytes.size() - 8, &value, 8);
  return bytes;
}

Status loading(const std::string& path, int64_t n_ctx = 0) {
  SessionOptions options;
  options.n_threads = 1;
  options.n_ctx = n_ctx;
  return status_of(load_session(tiny().model, options, path));
}

/// A session of n tokens, the last three of them from steps, saved.
struct Saved {
  TempDir dir;
  std::string path = dir.path("a.session");
  std::vector<Token> tokens;
  std::unique_ptr<Session> session;

  Saved(const SessionOptions& options, int64_t n) : tokens(random_tokens(n, 4)), session(make(options)) {
    EXPECT_TRUE(session->prefill(std::span(tokens).first(static_cast<size_t>(n - 3))).ok());
    decode_all(*session, std::span(tokens).last(3));
    const Status s = save_session(*session, tokens, path);
    EXPECT_TRUE(s.ok()) << s.message();
  }
};

/// Rebuilt keys are a cache of the pages, not saved with them.
int64_t bytes_kept(const Session& session) {
  const CacheStats stats = session.cache_stats();
  return stats.bytes - stats.bytes_hot;
}

class SessionFile : public ::testing::TestWithParam<std::string> {};

// Before anything is encoded, with pages, and a prompt that makes the transforms only after the restore.
// docs/server_api.md: "A session from a file is as large as the cache was"
TEST_P(SessionFile, GoesOnToTheLastBit) {
  for (const bool segments : {false, true}) {
    for (const int64_t n : {20, 300, 490, 900, 2700}) {
      const Saved saved(options_of(GetParam(), segments), n);
      auto loaded = load_session(tiny().model, options_of("f16", false), saved.path);
      ASSERT_TRUE(loaded.ok()) << loaded.status().message();
      Session& again = *loaded->session;
      EXPECT_EQ(loaded->tokens, saved.tokens);
      EXPECT_EQ(again.n_past(), n);
      EXPECT_EQ(again.profile().name, GetParam());
      EXPECT_EQ(max_difference(saved.session->logits(), again.logits()), 0);
      EXPECT_EQ(bytes_kept(*saved.session), bytes_kept(again));
      EXPECT_EQ(saved.session->kept_prefix(n), again.kept_prefix(n));
      const auto more = random_tokens(150, 8);
      for (Session* s : {saved.session.get(), &again}) ASSERT_OK(s->prefill(std::span(more).first(130)));
      EXPECT_EQ(max_difference(saved.session->logits(), again.logits()), 0) << n;
      EXPECT_EQ(max_difference(decode_all(*saved.session, std::span(more).last(20)),
                               decode_all(again, std::span(more).last(20))),
                0)
          << n << (segments ? " with segments" : "");
      EXPECT_EQ(bytes_kept(*saved.session), bytes_kept(again));
    }
  }
}

TEST_P(SessionFile, GoesBackToAPrefixAsBefore) {
  const Saved saved(options_of(GetParam(), true), 2800);
  auto loaded = load_session(tiny().model, options_of("f16", false), saved.path);
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  const int64_t n = loaded->session->kept_prefix(2500);
  ASSERT_GT(n, 2000);
  const auto rest = random_tokens(200, 9);
  for (Session* s : {saved.session.get(), loaded->session.get()}) {
    s->keep_prefix(n);
    ASSERT_OK(s->prefill(rest));
  }
  EXPECT_EQ(max_difference(saved.session->logits(), loaded->session->logits()), 0);
}

// The whole file, byte by byte in its head and at many places after it: with the old checksum, and with one
// that fits. Then it may be taken, but must work or fail in words.
TEST_P(SessionFile, DamageIsRefusedInWords) {
  const Saved saved(options_of(GetParam(), true), GetParam() == "klt" ? 2500 : 700);
  const std::string good = read_all(saved.path);
  const std::string path = saved.dir.path("b.session");
  for (size_t at = 0; at < good.size(); at += at < 120 ? 1 : good.size() / 60) {
    std::string bad = good;
    bad[at] = static_cast<char>(bad[at] ^ 0x41);
    write_all(path, bad);
    const Status s = loading(path);
    EXPECT_EQ(s.code(), StatusCode::invalid_file) << at;
    expect_sentence(s);
    if (at + 8 >= good.size()) continue;
    write_all(path, signed_again(bad));
    auto taken = load_session(tiny().model, options_of("f16", false), path);
    if (!taken.ok()) {
      expect_sentence(taken.status());
      continue;
    }
    (void)taken->session->decode(3);
    (void)taken->session->prefill(random_tokens(70)).ok();
  }
  for (size_t size = 0; size < good.size(); size += size < 200 ? 1 : good.size() / 40) {
    write_all(path, good.substr(0, size));
    EXPECT_EQ(loading(path).code(), StatusCode::invalid_file) << size;
    if (size < 40) continue;
    write_all(path, signed_again(good.substr(0, size)));
    const Status s = loading(path);
    EXPECT_EQ(s.code(), StatusCode::invalid_file) << size;
    expect_sentence(s);
  }
  write_all(path, signed_again(good + "12345678"));
  expect_refusal(loading(path), StatusCode::invalid_file, {"longer"});
}

INSTANTIATE_TEST_SUITE_P(Profiles, SessionFile, ::testing::ValuesIn(thinned(KvProfile::names())),
                         [](const auto& p) {
                           std::string name = p.param;
                           for (char& c : name)
                             c = std::isalnum(static_cast<unsigned char>(c)) != 0 ? c : '_';
                           return name;
                         });

// docs/server_api.md: "A file of another model, version or byte order"
TEST(SessionFiles, RefusesForeignAndMissingOnes) {
  const Saved saved(options_of("klt", false), 100);
  const LoadedTiny other([] {
    TinyModel m = four_layers();
    m.seed = 2;
    return m;
  }());
  SessionOptions options;
  expect_refusal(status_of(load_session(other.model, options, saved.path)), StatusCode::invalid_file,
                 {saved.path, other.model->info().fingerprint, tiny().model->info().fingerprint});
  expect_refusal(loading(saved.dir.path("none")), StatusCode::invalid_file, {"none", "no such file"});
  expect_refusal(loading(saved.dir.path("")), StatusCode::invalid_file, {"folder"});
  expect_refusal(loading(tiny().path), StatusCode::invalid_file, {"not a saved session"});
  write_all(saved.dir.path("empty"), "");
  expect_refusal(loading(saved.dir.path("empty")), StatusCode::invalid_file, {"not a saved session"});
  std::string bytes = read_all(saved.path);
  bytes[16] = 9;
  write_all(saved.dir.path("newer"), signed_again(bytes));
  expect_refusal(loading(saved.dir.path("newer")), StatusCode::invalid_file, {"version 9"});
  expect_refusal(loading(saved.path, 50), StatusCode::context_full, {"100", "50", "--ctx"});
}

TEST(SessionFiles, RefusesToSaveWhatIsNoSession) {
  const TempDir dir;
  auto session = make(options_of("klt", true));
  expect_refusal(save_session(*session, {}, dir.path("a")), StatusCode::invalid_argument, {"0"});
  const auto tokens = random_tokens(900);
  ASSERT_OK(session->prefill(tokens));
  expect_refusal(save_session(*session, std::span(tokens).first(899), dir.path("a")),
                 StatusCode::invalid_argument, {"899", "900"});
  expect_refusal(save_session(*session, tokens, dir.path("no/a")), StatusCode::invalid_argument, {"folder"});
  session->reset();
  ASSERT_OK(session->begin_prefill(tokens));
  EXPECT_FALSE(save_session(*session, tokens, dir.path("a")).ok());
  EXPECT_TRUE(std::filesystem::is_empty(dir.path("")));
}

// docs/server_api.md: "The profile is the file's."
TEST(SessionFiles, AFileOnTheDiskIsReplacedWhole) {
  const Saved saved(options_of("klt", false), 600);
  ASSERT_OK(saved.session->decode(7));
  std::vector<Token> tokens = saved.tokens;
  tokens.push_back(7);
  ASSERT_OK(save_session(*saved.session, tokens, saved.path));
  auto loaded = load_session(tiny().model, options_of("f16", false), saved.path);
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  EXPECT_EQ(loaded->tokens.size(), 601U);
  size_t n_file = 0;
  for (const auto& entry : std::filesystem::directory_iterator(saved.dir.path("")))
    n_file += entry.exists() ? 1 : 0;
  EXPECT_EQ(n_file, 1U);
}

TEST(SessionFiles, KeepsTheTransformsOfABasisFile) {
  const TempDir dir;
  auto basis = calibrate(*tiny().model, random_tokens(900, 3), "test", 1);
  ASSERT_TRUE(basis.ok()) << basis.status().message();
  ASSERT_OK(write_basis_file(dir.path("basis.gguf"), *basis, tiny().model->info()));
  for (const std::string profile : {"klt", "sals-25"}) {
    SessionOptions options = options_of(profile, false);
    options.basis_path = dir.path("basis.gguf");
    const Saved saved(options, 300);
    EXPECT_GT(saved.session->cache_stats().bytes_pages, 0);
    auto loaded = load_session(tiny().model, options_of("f16", false), saved.path);  // without the file
    ASSERT_TRUE(loaded.ok()) << loaded.status().message();
    const auto fed = random_tokens(100, 8);
    EXPECT_EQ(max_difference(decode_all(*saved.session, fed), decode_all(*loaded->session, fed)), 0)
        << profile;
  }
}

}  // namespace
}  // namespace narrows::testing
