// The file: magic, version, byte order; fingerprint of the model, profile, tokens, logits, layers; a checksum
// of all before it. Nothing is believed before the checksum fits, and nothing that the checksum cannot know
// (a file made with ill will) before it is within bounds.
#include "narrows/session_file.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/file.h"
#include "base/memory_ledger.h"
#include "base/utf8.h"
#include "engine/session_impl.h"
#include "kv/snapshot.h"

namespace narrows {

namespace {

constexpr std::string_view kMagic = "narrows session\n";
constexpr uint32_t kVersion = 1;
constexpr uint32_t kByteOrder = 0x01020304;
constexpr size_t kMaxName = 256;

/// What comes before the layers.
struct Head {
  std::string fingerprint;
  std::string profile;
  bool segments = false;
  int64_t sealed = 0;
  std::vector<Token> tokens;
  std::vector<float> logits;
  int64_t n_layer = 0;
};

Status wrong(const std::string& path, const std::string& what) {
  return {StatusCode::invalid_file, fmt::format("{} {}", quote(path), what)};
}

/// The bytes between the first three fields and the checksum.
Result<std::string_view> checked_payload(const std::string& path, std::string_view file) {
  if (file.substr(0, kMagic.size()) != kMagic) return wrong(path, "is not a saved session");
  SnapshotReader in(file.substr(kMagic.size()));
  const auto version = in.number<uint32_t>(), order = in.number<uint32_t>();
  if (!in.ok() || in.left() < sizeof(uint64_t)) return wrong(path, "is cut off");
  if (order != kByteOrder) return wrong(path, "was saved on a machine with another byte order");
  if (version != kVersion) {
    return wrong(path, fmt::format("is a saved session of version {}, this build reads version {}", version,
                                   kVersion));
  }
  const std::string_view before = file.substr(0, file.size() - sizeof(uint64_t));
  uint64_t stored = 0;
  std::memcpy(&stored, file.data() + before.size(), sizeof(stored));
  Checksum sum;
  sum.add(before.data(), before.size());
  if (sum.value() != stored) return wrong(path, "is cut off or damaged: its checksum does not fit");
  return before.substr(kMagic.size() + 2 * sizeof(uint32_t));
}

Result<Head> read_head(const std::string& path, const Model& model, SnapshotReader& in) {
  Head h;
  h.fingerprint = in.text(kMaxName);
  if (in.ok() && h.fingerprint != model.info().fingerprint) {
    return wrong(path, fmt::format("was saved with another model (fingerprint {}, this one has {})",
                                   quote(h.fingerprint, 32), model.info().fingerprint));
  }
  h.profile = in.text(kMaxName);
  h.segments = in.count(0, 1) != 0;
  const auto n_token = static_cast<uint64_t>(in.count(1, model.info().n_ctx_train));
  h.sealed = in.count(0, static_cast<int64_t>(n_token));
  h.tokens = in.array<Token>(n_token);
  h.logits = in.array<float>(static_cast<uint64_t>(model.info().n_vocab));
  h.n_layer = in.number<int64_t>();
  const auto known = [&](Token t) { return t >= 0 && t < model.info().n_vocab; };
  if (!in.ok() || h.n_layer != model.info().n_layer || !std::all_of(h.tokens.begin(), h.tokens.end(), known))
    return wrong(path, "holds impossible numbers");
  return h;
}

}  // namespace

Status save_session(const Session& session, std::span<const Token> tokens, const std::string& path) {
  const Session::Impl& m = Access::impl(session);
  if (Status s = m.check_usable(); !s.ok()) return s;
  if (tokens.empty() || static_cast<int64_t>(tokens.size()) != session.n_past()) {
    return {StatusCode::invalid_argument,
            fmt::format("{} tokens were given to save a session of {}", tokens.size(), session.n_past())};
  }
  return write_file_atomically(path, [&](std::FILE* file) -> Status {
    SnapshotWriter out(file);
    out.bytes(kMagic.data(), kMagic.size());
    out.number(kVersion);
    out.number(kByteOrder);
    out.text(m.model->info().fingerprint);
    out.text(m.options.kv.name);
    out.number(int64_t{m.options.segments});
    out.number(static_cast<int64_t>(tokens.size()));
    out.number(m.sealed);
    out.array(std::vector<Token>(tokens.begin(), tokens.end()));
    out.array(std::vector<float>(session.logits().begin(), session.logits().end()));
    out.number(m.cache->n_layer());
    for (int64_t i = 0; i < m.cache->n_layer(); ++i) m.cache->layer(i).save(out);
    out.number(out.checksum());
    if (m.cache->is_lost())
      return {StatusCode::internal, "the GPU does not give back the cache; the session is not saved"};
    return {};
  });
}

Result<SavedSession> load_session(std::shared_ptr<const Model> model, const SessionOptions& options,
                                  const std::string& path) {
  MemoryClaim claim(MemoryUse::file);
  Result<std::string> file = read_file(path, MemoryLedger::process().free_bytes(), /*regular=*/true);
  if (!file.ok()) return file.status();
  claim.resize(static_cast<int64_t>(file->size()));
  const Result<std::string_view> payload = checked_payload(path, *file);
  if (!payload.ok()) return payload.status();
  SnapshotReader in(*payload);
  Result<Head> head = read_head(path, *model, in);
  if (!head.ok()) return head.status();
  Result<KvProfile> profile = KvProfile::parse(head->profile);
  if (!profile.ok()) return wrong(path, "names a cache profile that this build does not have");

  SessionOptions wanted = options;
  wanted.kv = *profile;
  wanted.segments = head->segments;
  Result<std::unique_ptr<Session>> made = Session::create(model, wanted);
  if (!made.ok()) return made.status();
  SavedSession saved{std::move(*made), std::move(head->tokens)};
  Session::Impl& m = Access::impl(*saved.session);
  const auto n_token = static_cast<int64_t>(saved.tokens.size());
  if (n_token > m.n_ctx) {
    return Status(StatusCode::context_full,
                  fmt::format("{} holds {} tokens but the context holds {}; raise --ctx", quote(path),
                              n_token, m.n_ctx));
  }
  if (!m.claim_cache(n_token)) {
    return Status(StatusCode::out_of_memory,
                  fmt::format("no memory for the {} tokens of {}; end other work", n_token, quote(path)));
  }
  for (int64_t i = 0; i < m.cache->n_layer(); ++i) {
    const Status s = m.cache->layer(i).load(in);
    if (s.code() == StatusCode::out_of_memory) return s;
    if (!s.ok() || m.cache->layer(i).n_tokens() != n_token)
      return wrong(path, fmt::format("holds impossible numbers in layer {}", i));
  }
  if (in.left() != 0) return wrong(path, "is longer than what it says it holds");
  m.own_logits = std::move(head->logits);
  m.sealed = head->sealed;
  m.settle_claims();
  return saved;
}

}  // namespace narrows
