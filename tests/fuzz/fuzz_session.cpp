// A saved session of a tiny model, with a checksum that fits whatever the bytes: what the checksum lets
// through must be refused in words, or work.
#include <cstring>
#include <fstream>

#include "base/checksum.h"
#include "fuzz/fuzz.h"
#include "narrows/session_file.h"
#include "support/tiny_model.h"
#include "temp_dir.h"
#include "text/llama_log.h"

namespace narrows::fuzz {

namespace {

std::shared_ptr<const Model> model() {
  static const testing::TempDir dir;
  static const std::shared_ptr<const Model> loaded = [] {
    testing::TinyModel tiny;
    tiny.n_layer = 4;
    auto made = Model::load(tiny.write(dir.path("tiny.gguf")));
    check(made.ok(), made.status().message());
    return *made;
  }();
  return loaded;
}

SessionOptions options(const std::string& kv, bool segments) {
  SessionOptions o;
  o.kv = KvProfile::parse(kv).value();
  o.n_threads = 1;
  o.segments = segments;
  return o;
}

std::string file_bytes(const std::string& kv, bool segments, int64_t n) {
  auto session = Session::create(model(), options(kv, segments)).value();
  const auto tokens = testing::random_tokens(n);
  check(session->prefill(tokens).ok(), "the seed's prompt failed");
  const testing::TempDir dir;
  const Status s = save_session(*session, tokens, dir.path("s"));
  check(s.ok(), s.message());
  std::ifstream in(dir.path("s"), std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

}  // namespace

std::vector<Seed> seeds() {
  std::vector<Seed> all;
  // The head, tokens and logits, and the beginning of a layer.
  for (const char* kv : {"klt", "sals-25", "kivi-2", "f16"})
    all.push_back({file_bytes(kv, false, 600), 4200});
  all.push_back({file_bytes("klt", true, 300), 3000});
  return all;
}

}  // namespace narrows::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace narrows;
  silence_llama_log();
  std::vector<uint8_t> bytes(data, data + size);
  if (size > 64 && data[size - 1] % 16 != 0) {  // sometimes the checksum is wrong
    Checksum sum;
    sum.add(bytes.data(), size - sizeof(uint64_t));
    const uint64_t value = sum.value();
    std::memcpy(bytes.data() + size - sizeof(value), &value, sizeof(value));
  }
  const fuzz::MemoryFile file(bytes.data(), bytes.size());
  auto saved = load_session(fuzz::model(), fuzz::options("f16", false), file.path());
  if (!saved.ok()) {
    fuzz::check_sentence(saved.status());
    return 0;
  }
  ++fuzz::g_accepted;
  Session& s = *saved->session;
  fuzz::check(s.n_past() == static_cast<int64_t>(saved->tokens.size()), "tokens and cache differ");
  fuzz::check(s.logits().size() == 258, "logits of another vocabulary");
  // Numbers of the cache may be any; what is computed with them must stay within its arrays.
  if (const Status step = s.decode(5); !step.ok()) fuzz::check_sentence(step);
  const int64_t kept = s.kept_prefix(s.n_past());
  if (kept > 0) s.keep_prefix(kept);
  if (const Status prompt = s.prefill(testing::random_tokens(80)); !prompt.ok()) {
    fuzz::check_sentence(prompt);  // and the session waits for a reset
  } else if (const Status step = s.decode(6); !step.ok()) {
    fuzz::check_sentence(step);
  }
  return 0;
}
