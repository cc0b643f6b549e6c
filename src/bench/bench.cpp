// The measurement loop. The text decides the tokens, so that every engine does the same work.
#include "bench/bench.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>

#include "base/memory.h"
#include "engine/session_impl.h"
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
  std::function<void(bool)> measure;  ///< of the stages of a step; null for others' engines
  std::function<Executor::Times()> times;
  std::vector<double> prefill, decoded;  ///< tokens per second, a round each
};

/// Everything measured at one depth. The engines' sessions live as long as it.
class Depth {
 public:
  Depth(std::shared_ptr<const Model> model, std::span<const Token> text, const BenchOptions& options,
        int64_t context, const std::function<bool(const std::string&)>& progress)
      : model_(std::move(model)),
        text_(text),
        options_(options),
        context_(context),
        depth_(std::max<int64_t>(1, context)),
        progress_(progress) {}

  Status run(BenchReport& report) {
    if (Status s = make_ours(); !s.ok()) return s;
    if (Status s = make_peers(); !s.ok()) return s;
    if (Status s = prefill(); !s.ok()) return s;
    if (Status s = decode(); !s.ok()) return s;
    finish(report);
    return {};
  }

 private:
  int64_t room() const { return depth_ + int64_t{options_.rounds + 1} * options_.tokens; }
  std::span<const Token> prompt() const { return text_.first(static_cast<size_t>(depth_)); }
  Contestant* peer() { return peers_.empty() ? nullptr : &all_[sessions_.size()]; }

  Status announce(const std::string& what) {
    return progress_(what) ? Status() : Status(StatusCode::cancelled, "bench was cancelled");
  }

  Status make_ours() {
    for (const KvProfile& p : options_.profiles) {
      SessionOptions so;
      so.kv = p;
      so.n_ctx = room();
      so.n_threads = options_.n_threads;
      so.prompt = options_.prompt;
      if (p.takes_basis()) so.basis_path = options_.basis_path;
      Result<std::unique_ptr<Session>> made = Session::create(model_, so);
      if (!made.ok()) return made.status();
      Session* s = made->get();
      sessions_.push_back(std::move(*made));
      pointers_.push_back(s);
      Contestant c;
      c.row.engine = "narrows";
      c.row.kv = p.name;
      c.decode = [s](Token t) { return s->decode(t); };
      c.kv_bytes = [s] { return s->cache_stats().bytes; };
      c.measure = [s](bool on) { Access::impl(*s).measure_steps(on); };
      c.times = [s] { return Access::impl(*s).step_times; };
      all_.push_back(std::move(c));
    }
    return {};
  }

  Status make_peers() {
    if (!options_.with_llama_cpp) return {};
    for (const std::string& kv : options_.peer_kv) {
      LlamaPeerOptions po;
      po.n_ctx = room();
      po.n_threads = pointers_.front()->n_threads();
      po.kv = kv;
      po.rope = model_->info().rope;
      Result<std::unique_ptr<LlamaPeer>> made = LlamaPeer::create(model_->path(), po);
      if (!made.ok()) return made.status();
      LlamaPeer* p = made->get();
      peers_.push_back(std::move(*made));
      Contestant c;
      c.row.engine = "llama.cpp";
      c.row.kv = kv;
      c.decode = [p](Token t) { return p->decode(t); };
      c.kv_bytes = [p] { return p->kv_bytes(); };
      all_.push_back(std::move(c));
    }
    return {};
  }

  Status prefill() {
    for (int round = 0; round < options_.prefill_rounds; ++round) {
      const std::string which =
          options_.prefill_rounds > 1 ? fmt::format(", {} of {}", round + 1, options_.prefill_rounds) : "";
      if (Status s = announce(fmt::format("narrows: prefill of {} tokens{}", depth_, which)); !s.ok())
        return s;
      for (Session* s : pointers_) s->reset();
      auto start = Clock::now();
      if (Status s = Session::prefill_together(pointers_, prompt()); !s.ok()) return s;
      const double ours = static_cast<double>(depth_) / seconds_since(start);
      for (size_t i = 0; i < pointers_.size(); ++i) all_[i].prefill.push_back(ours);
      for (size_t i = 0; i < peers_.size(); ++i) {
        Contestant& c = all_[pointers_.size() + i];
        const std::string what = fmt::format("llama.cpp {}: prefill of {} tokens{}", c.row.kv, depth_, which);
        if (Status s = announce(what); !s.ok()) return s;
        peers_[i]->clear();
        start = Clock::now();
        if (Status s = peers_[i]->prefill(prompt()); !s.ok()) return s;
        c.prefill.push_back(static_cast<double>(depth_) / seconds_since(start));
      }
    }
    return {};
  }

  Status decode() {
    for (int round = -1; round < options_.rounds; ++round) {
      const std::string what =
          fmt::format("depth {}: decode round {} of {}", context_, round + 1, options_.rounds);
      if (Status s = announce(what); !s.ok()) return s;
      const auto tokens = text_.subspan(static_cast<size_t>(depth_ + (round + 1) * options_.tokens),
                                        static_cast<size_t>(options_.tokens));
      for (Contestant& c : all_) {
        const auto start = Clock::now();
        for (const Token t : tokens) {
          if (Status s = c.decode(t); !s.ok()) return s;
        }
        const double rate = static_cast<double>(tokens.size()) / seconds_since(start);
        if (round >= 0) {
          c.decoded.push_back(rate);
        } else if (c.measure) {
          c.measure(true);
        }
      }
    }
    return {};
  }

  static BenchSpeed speed(const std::vector<double>& own, const std::vector<double>* peer) {
    BenchSpeed out;
    out.median = median(own);
    out.min = *std::min_element(own.begin(), own.end());
    out.max = *std::max_element(own.begin(), own.end());
    if (peer == nullptr) return out;
    std::vector<double> ratios;
    for (size_t i = 0; i < own.size(); ++i) ratios.push_back(own[i] / (*peer)[i]);
    out.vs_peer = median(ratios);
    return out;
  }

  StepMs step_ms(const Contestant& c) const {
    const double n = static_cast<double>(options_.rounds) * options_.tokens;
    const Executor::Times times = c.times();
    const auto ms = [&](RunStage s) { return static_cast<double>(times[static_cast<size_t>(s)]) / n / 1e6; };
    StepMs out;
    double measured = 0;
    for (size_t i = 0; i < kRunStages; ++i) {
      const auto stage = static_cast<RunStage>(i);
      measured += ms(stage);
      if (is_product(stage)) out.products += ms(stage);
    }
    out.score = ms(RunStage::score);
    out.select = ms(RunStage::select);
    out.rebuild = ms(RunStage::rebuild);
    out.attend = ms(RunStage::attend);
    double all = 0;
    for (const double rate : c.decoded) all += 1e3 / rate / options_.rounds;
    out.rest = std::max(0.0, all - measured);
    return out;
  }

  void finish(BenchReport& report) {
    const ModelWork work = work_of(parts_of(*model_).plan);
    report.weight_bytes = work.weight_bytes;
    const Contestant* other = peer();
    for (Contestant& c : all_) {
      const bool compared = other != nullptr && c.row.engine != other->row.engine;
      BenchRow& row = c.row;
      row.context = context_;
      if (context_ > 0) {
        row.prefill = speed(c.prefill, compared ? &other->prefill : nullptr);
        row.prefill.share = work.prompt_flops(depth_) * row.prefill.median / static_cast<double>(depth_) /
                            report.machine.flops_s;
      }
      row.decode = speed(c.decoded, compared ? &other->decoded : nullptr);
      row.decode.share =
          static_cast<double>(work.weight_bytes) * row.decode.median / report.machine.read_bytes_s;
      if (c.times) row.step = step_ms(c);
      row.kv_bytes = c.kv_bytes();
      row.peak_rss_bytes = peak_resident_bytes();
      report.rows.push_back(row);
    }
  }

  std::shared_ptr<const Model> model_;
  std::span<const Token> text_;
  const BenchOptions& options_;
  int64_t context_;
  int64_t depth_;  ///< depth 0 begins with one token
  const std::function<bool(const std::string&)>& progress_;
  std::vector<std::unique_ptr<Session>> sessions_;
  std::vector<Session*> pointers_;
  std::vector<std::unique_ptr<LlamaPeer>> peers_;
  std::vector<Contestant> all_;  ///< ours, then the peers
};

Status check(const BenchOptions& options, size_t n_text) {
  if (options.rounds < 1 || options.tokens < 1 || options.prefill_rounds < 1 || options.contexts.empty() ||
      options.profiles.empty() || (options.with_llama_cpp && options.peer_kv.empty())) {
    return {StatusCode::invalid_argument,
            "bench needs at least one context, profile, peer's cache, round and token"};
  }
  for (const std::string& kv : options.peer_kv) {
    if (Status s = LlamaPeer::check_kv(kv); !s.ok()) return s;
  }
  const int64_t decoded = int64_t{options.rounds} * options.tokens + options.tokens;  // the warm-up round too
  const int64_t deepest = *std::max_element(options.contexts.begin(), options.contexts.end());
  if (static_cast<int64_t>(n_text) < deepest + decoded + 1) {
    return {StatusCode::invalid_argument,
            fmt::format("the text has {} tokens but depth {} and {} decoded tokens need {}; give a longer -f",
                        n_text, deepest, decoded, deepest + decoded + 1)};
  }
  return {};
}

}  // namespace

Result<BenchReport> run_bench(std::shared_ptr<const Model> model, std::span<const Token> text,
                              const BenchOptions& options,
                              const std::function<bool(const std::string&)>& progress) {
  if (Status s = check(options, text.size()); !s.ok()) return s;
  Result<int> n_threads = threads_to_use(options.n_threads);
  if (!n_threads.ok()) return n_threads.status();
  if (!progress("the machine's limits")) return Status(StatusCode::cancelled, "bench was cancelled");
  BenchReport report;
  Result<MachineLimits> machine = measure_machine(*n_threads);
  if (!machine.ok()) return machine.status();
  report.machine = *machine;
  forget_peak_resident_bytes();  // what that took is not the engines'
  for (const int64_t context : options.contexts) {
    if (Status s = Depth(model, text, options, context, progress).run(report); !s.ok()) return s;
  }
  return report;
}

}  // namespace narrows
