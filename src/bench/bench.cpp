// The measurement loop. The text decides the tokens, so that every engine does the same work.
#include "bench/bench.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>

#include "base/memory.h"
#include "peer/llama_peer.h"

namespace narrows {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

double median(std::vector<double> x) {
  std::sort(x.begin(), x.end());
  const size_t n = x.size();
  return n % 2 == 1 ? x[n / 2] : 0.5 * (x[n / 2 - 1] + x[n / 2]);
}

/// One engine with one cache at one depth.
struct Contestant {
  BenchRow row;
  std::function<Status(Token)> decode;
  std::function<int64_t()> kv_bytes;
  std::vector<double> rates;  ///< tokens per second, a round each
};

Status run_round(Contestant& c, std::span<const Token> tokens) {
  const auto start = Clock::now();
  for (const Token t : tokens) {
    if (Status s = c.decode(t); !s.ok()) return s;
  }
  c.rates.push_back(static_cast<double>(tokens.size()) / seconds_since(start));
  return {};
}

void finish(std::vector<Contestant>& all, std::vector<BenchRow>& rows) {
  const Contestant* peer = nullptr;
  for (const Contestant& c : all) {
    if (c.row.engine == "llama.cpp") peer = &c;
  }
  for (Contestant& c : all) {
    c.row.decode_tok_s = median(c.rates);
    c.row.decode_tok_s_min = *std::min_element(c.rates.begin(), c.rates.end());
    c.row.decode_tok_s_max = *std::max_element(c.rates.begin(), c.rates.end());
    if (peer != nullptr && peer != &c) {
      std::vector<double> ratios;
      for (size_t i = 0; i < c.rates.size(); ++i) ratios.push_back(c.rates[i] / peer->rates[i]);
      c.row.decode_vs_peer = median(ratios);
    }
    c.row.kv_bytes = c.kv_bytes();
    c.row.peak_rss_bytes = peak_resident_bytes();
    rows.push_back(c.row);
  }
}

}  // namespace

Result<std::vector<BenchRow>> run_bench(std::shared_ptr<const Model> model, std::span<const Token> text,
                                        const BenchOptions& options,
                                        const std::function<bool(const std::string&)>& progress) {
  if (options.rounds < 1 || options.tokens < 1 || options.contexts.empty() || options.profiles.empty()) {
    return Status(StatusCode::invalid_argument, "bench needs at least one context, profile, round and token");
  }
  const int64_t decoded = int64_t{options.rounds} * options.tokens + options.tokens;  // the warm-up round too
  const int64_t deepest = *std::max_element(options.contexts.begin(), options.contexts.end());
  if (static_cast<int64_t>(text.size()) < deepest + decoded + 1) {
    return Status(
        StatusCode::invalid_argument,
        fmt::format("the text has {} tokens but depth {} and {} decoded tokens need {}; give a longer -f",
                    text.size(), deepest, decoded, deepest + decoded + 1));
  }
  std::vector<BenchRow> rows;
  for (const int64_t context : options.contexts) {
    const int64_t depth = std::max<int64_t>(1, context);  // depth 0 begins with one token
    const auto prompt = text.first(static_cast<size_t>(depth));
    std::vector<std::unique_ptr<Session>> sessions;
    std::vector<Session*> pointers;
    std::vector<Contestant> all;
    for (const KvProfile& p : options.profiles) {
      SessionOptions so;
      so.kv = p;
      so.n_ctx = depth + decoded;
      so.n_threads = options.n_threads;
      so.products = options.products;
      so.attention = options.attention;
      if (p.kind == KvKind::sals || p.kind == KvKind::klt) so.basis_path = options.basis_path;
      Result<std::unique_ptr<Session>> made = Session::create(model, so);
      if (!made.ok()) return made.status();
      sessions.push_back(std::move(*made));
      pointers.push_back(sessions.back().get());
    }
    if (!progress(fmt::format("narrows: prefill of {} tokens", depth)))
      return Status(StatusCode::cancelled, "bench was cancelled");
    auto start = Clock::now();
    if (Status s = Session::prefill_together(pointers, prompt); !s.ok()) return s;
    const double ours = static_cast<double>(depth) / seconds_since(start);
    for (size_t i = 0; i < sessions.size(); ++i) {
      Session* s = pointers[i];
      Contestant c;
      c.row.engine = "narrows";
      c.row.kv = options.profiles[i].name;
      c.row.prefill_tok_s = context > 0 ? ours : 0;
      c.decode = [s](Token t) { return s->decode(t); };
      c.kv_bytes = [s] { return s->cache_stats().bytes; };
      all.push_back(std::move(c));
    }
    std::unique_ptr<LlamaPeer> peer;
    if (options.with_llama_cpp) {
      Result<std::unique_ptr<LlamaPeer>> made =
          LlamaPeer::create(model->path(), {depth + decoded, pointers.front()->n_threads(), false});
      if (!made.ok()) return made.status();
      peer = std::move(*made);
      if (!progress(fmt::format("llama.cpp: prefill of {} tokens", depth)))
        return Status(StatusCode::cancelled, "bench was cancelled");
      start = Clock::now();
      if (Status s = peer->prefill(prompt); !s.ok()) return s;
      Contestant c;
      c.row.engine = "llama.cpp";
      c.row.kv = "f16";
      c.row.prefill_tok_s = context > 0 ? static_cast<double>(depth) / seconds_since(start) : 0;
      c.decode = [p = peer.get()](Token t) { return p->decode(t); };
      c.kv_bytes = [p = peer.get()] { return p->kv_bytes(); };
      all.push_back(std::move(c));
    }
    for (Contestant& c : all) c.row.context = context;
    for (int round = -1; round < options.rounds; ++round) {
      if (!progress(fmt::format("depth {}: decode round {} of {}", context, round + 1, options.rounds))) {
        return Status(StatusCode::cancelled, "bench was cancelled");
      }
      const auto tokens = text.subspan(static_cast<size_t>(depth + (round + 1) * options.tokens),
                                       static_cast<size_t>(options.tokens));
      for (Contestant& c : all) {
        if (Status s = run_round(c, tokens); !s.ok()) return s;
        if (round < 0) c.rates.clear();  // warm-up
      }
    }
    finish(all, rows);
  }
  return rows;
}

}  // namespace narrows
