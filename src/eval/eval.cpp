// All profiles step in lockstep, so only one row of reference logits is held at a time.
#include "eval/eval.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "engine/session_impl.h"
#include "eval/divergence.h"
#include "eval/mass_kept.h"
#include "peer/llama_peer.h"

namespace narrows {

namespace {

double ratio(int64_t whole, int64_t part) {
  return part > 0 ? static_cast<double>(whole) / static_cast<double>(part) : 1.0;
}

/// What a row gathers over the steps.
struct Tally {
  double log_prob = 0;
  int64_t n_same_top = 0;
  std::vector<double> kl;

  void add(const std::vector<double>& lp, const std::vector<double>& ref, Token target) {
    log_prob += lp[static_cast<size_t>(target)];
    kl.push_back(divergence(ref, lp));
    n_same_top += same_top(ref, lp) ? 1 : 0;
  }

  EvalRow row(const std::string& name) {
    EvalRow r;
    const auto n = static_cast<double>(kl.size());
    r.kv = name;
    r.ppl = std::exp(-log_prob / n);
    for (const double d : kl) r.kl_mean += d / n;
    std::sort(kl.begin(), kl.end());
    // Linear interpolation between order statistics, as numpy.quantile does.
    const double at = 0.99 * (n - 1);
    const auto low = static_cast<size_t>(at);
    const size_t high = std::min(low + 1, kl.size() - 1);
    r.kl_p99 = kl[low] + (at - static_cast<double>(low)) * (kl[high] - kl[low]);
    r.top1 = static_cast<double>(n_same_top) / n;
    return r;
  }
};

/// llama.cpp's caches, each fed the same tokens. The first is its f16 with flash attention, which the others
/// are compared with.
class Peers {
 public:
  Status open(const Model& model, const EvalOptions& options, int n_threads) {
    both_ways_ = options.with_llama_cpp;
    asked_ = options.peer_kv;
    std::vector<std::pair<std::string, bool>> wanted;  // cache, flash
    if (both_ways_ || !asked_.empty()) wanted.emplace_back("f16", true);
    if (both_ways_) wanted.emplace_back("f16", false);
    for (const std::string& kv : asked_) {
      if (kv != "f16") wanted.emplace_back(kv, true);
    }
    for (const auto& [kv, flash] : wanted) {
      Result<std::unique_ptr<LlamaPeer>> made = LlamaPeer::create(
          model.path(), {options.context + options.tokens, n_threads, kv, flash, model.info().rope});
      if (!made.ok()) return made.status();
      peers_.push_back({std::move(*made), kv, {}, {}});
    }
    return {};
  }

  Status prefill(std::span<const Token> prompt) {
    for (Peer& p : peers_) {
      if (Status s = p.engine->prefill(prompt); !s.ok()) return s;
    }
    return {};
  }

  Status step(Token fed, Token target, const std::vector<double>& ours) {
    for (Peer& p : peers_) {
      if (Status s = p.engine->decode(fed); !s.ok()) return s;
      if (!log_softmax(p.engine->logits(), lp_)) return logits_not_finite("llama.cpp with " + p.kv);
      if (&p == &peers_.front()) own_ = lp_;
      p.to_ours.add(lp_, ours, target);
      p.to_own.add(lp_, own_, target);
    }
    return {};
  }

  void add_rows(const CacheStats& f16, std::vector<EvalRow>& rows) {
    if (both_ways_) {
      rows.push_back(Tally(peers_[0].to_ours).row("llama.cpp f16 flash"));
      rows.push_back(peers_[1].to_ours.row("llama.cpp f16 plain"));
      rows.push_back(peers_[1].to_own.row("llama.cpp plain to flash"));
      rows.back().reference = "llama.cpp f16";
    }
    const size_t first = both_ways_ ? 2 : 1;
    size_t next = first;
    for (const std::string& kv : asked_) {
      Peer& p = kv == "f16" ? peers_.front() : peers_[next++];
      EvalRow row = kv == "f16" ? Tally(p.to_ours).row("llama.cpp f16") : p.to_own.row("llama.cpp " + kv);
      if (kv != "f16") row.reference = "llama.cpp f16";
      row.cache = f16;  // what as many tokens take, all layers
      row.cache.bytes_f16_compressed_layers = row.cache.bytes_f16_pages = f16.bytes_f16;
      row.cache.bytes = row.cache.bytes_compressed_layers = row.cache.bytes_pages = p.engine->kv_bytes();
      rows.push_back(std::move(row));
    }
  }

 private:
  struct Peer {
    std::unique_ptr<LlamaPeer> engine;
    std::string kv;
    Tally to_ours, to_own;
  };
  std::vector<Peer> peers_;
  std::vector<std::string> asked_;
  bool both_ways_ = false;
  std::vector<double> lp_, own_;
};

}  // namespace

double EvalRow::compression() const { return ratio(cache.bytes_f16, cache.bytes); }
double EvalRow::compression_layers() const {
  return ratio(cache.bytes_f16_compressed_layers, cache.bytes_compressed_layers);
}
double EvalRow::compression_pages() const { return ratio(cache.bytes_f16_pages, cache.bytes_pages); }
double EvalRow::bytes_per_token() const {
  if (cache.n_tokens == 0) return 0;
  const auto n = static_cast<double>(cache.n_tokens);
  const auto exact = static_cast<double>(cache.bytes_f16 - cache.bytes_f16_compressed_layers);
  return (exact + static_cast<double>(cache.bytes_f16_compressed_layers) / compression_pages()) / n;
}
double EvalRow::bytes_per_token_f16() const {
  return cache.n_tokens == 0 ? 0 : static_cast<double>(cache.bytes_f16) / static_cast<double>(cache.n_tokens);
}

Result<std::vector<EvalRow>> evaluate(std::shared_ptr<const Model> model, std::span<const Token> text,
                                      const EvalOptions& options, const ProgressFn& progress) {
  const int64_t need = options.context + options.tokens + 1;
  if (options.context < 1 || options.tokens < 1) {
    return Status(StatusCode::invalid_argument, "context and tokens must be at least 1");
  }
  if (static_cast<int64_t>(text.size()) < need) {
    return Status(
        StatusCode::invalid_argument,
        fmt::format(
            "the text has {} tokens but context {} and {} judged tokens need {}; give a longer text or "
            "lower --context",
            text.size(), options.context, options.tokens, need));
  }
  std::vector<std::unique_ptr<Session>> sessions;
  std::vector<Session*> pointers;
  std::vector<KvProfile> profiles = {KvProfile{}};  // the reference comes first
  profiles.insert(profiles.end(), options.profiles.begin(), options.profiles.end());
  // An attention that was asked for is judged too: the reference then has a prefill of its own.
  const PrefillAttention attention = options.prompt.attention;
  const bool apart = options.prompt.mass < 1 ||
                     (attention != PrefillAttention::automatic && attention != PrefillAttention::f32);
  for (const KvProfile& p : profiles) {
    SessionOptions so;
    so.prompt = options.prompt;
    if (apart && sessions.empty()) {
      so.prompt.attention = PrefillAttention::f32;
      so.prompt.mass = 1;
    }
    so.kv = p;
    so.n_ctx = options.context + options.tokens;
    so.n_threads = options.n_threads;
    if (p.takes_basis()) so.basis_path = options.basis_path;
    Result<std::unique_ptr<Session>> made = Session::create(model, so);
    if (!made.ok()) return made.status();
    sessions.push_back(std::move(*made));
    pointers.push_back(sessions.back().get());
  }
  Peers peers;
  if (Status s = peers.open(*model, options, sessions.front()->n_threads()); !s.ok()) return s;

  // The prompt is about as much work as the steps of a few profiles: half of the bar each.
  const auto prompt = text.first(static_cast<size_t>(options.context));
  const std::span<Session* const> all(pointers);
  const size_t n_apart = apart ? 1 : 0;
  double done_before = 0;
  for (const std::span<Session* const> group : {all.first(n_apart), all.subspan(n_apart)}) {
    if (group.empty()) continue;
    const double share = apart ? 0.25 : 0.5;
    const auto part = [&](double done) { return !progress || progress(done_before + share * done); };
    if (Status s = Session::prefill_together(group, prompt, part); !s.ok()) return s;
    done_before += share;
  }
  if (Status s = peers.prefill(prompt); !s.ok()) return s;

  const ExactKeys keys(Access::impl(*sessions.front()));
  std::vector<std::unique_ptr<MassKept>> mass;
  for (Session* s : pointers) mass.push_back(std::make_unique<MassKept>(keys, Access::impl(*s)));

  std::vector<Tally> tallies(sessions.size());
  std::vector<double> ref, lp;
  for (int64_t i = 0; i < options.tokens; ++i) {
    const Token fed = text[static_cast<size_t>(options.context + i)];
    const Token target = text[static_cast<size_t>(options.context + i + 1)];
    for (size_t s = 0; s < sessions.size(); ++s) {
      if (Status st = sessions[s]->decode(fed); !st.ok()) return st;
      if (!log_softmax(sessions[s]->logits(), lp)) return logits_not_finite("--kv " + profiles[s].name);
      if (s == 0) ref = lp;
      tallies[s].add(lp, ref, target);
      mass[s]->observe();
    }
    if (Status s = peers.step(fed, target, ref); !s.ok()) return s;
    if (progress && !progress(0.5 + 0.5 * static_cast<double>(i + 1) / static_cast<double>(options.tokens))) {
      return Status(StatusCode::cancelled, "eval was cancelled");
    }
  }

  std::vector<EvalRow> rows;
  for (size_t s = 1; s < sessions.size(); ++s) {
    rows.push_back(tallies[s].row(profiles[s].name));
    rows.back().prompt_read = sessions[s]->prompt_read();
    rows.back().mass_kept = mass[s]->mean();
    rows.back().mass_best = mass[s]->best();
    rows.back().cache = sessions[s]->cache_stats();
  }
  peers.add_rows(sessions.front()->cache_stats(), rows);
  return rows;
}

}  // namespace narrows
