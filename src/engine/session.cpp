// Session: prompt -> prefill -> steps. Owns the cache; knows the limits (n_ctx, memory) and refuses before
// any work.
#include <fmt/format.h>

#include <algorithm>

#include "base/cgroup.h"
#include "base/guarded.h"
#include "base/memory_ledger.h"
#include "engine/session_impl.h"
#include "engine/value_weight.h"
#include "prompt/attention.h"

namespace narrows {

namespace {

/// More threads than this is a typing error, not a machine.
constexpr int kMaxThreads = 512;

/// Tokens that a prompt keeps for its last segment: enough exact ones for the recent window, and more than
/// make Prefill leave its products to another kernel.
constexpr int64_t kLeastRest = 128;

Status check_prompt_options(const PromptOptions& options) {
  if (!(options.mass > 0 && options.mass <= 1)) {
    return {
        StatusCode::invalid_argument,
        fmt::format("the share of the attention that a prompt reads must be above 0 and at most 1, not {}",
                    options.mass)};
  }
  if (options.mass < 1 && !can_be_sparse(options.attention)) {
    return {
        StatusCode::invalid_argument,
        fmt::format("--prefill sparse does not work with --attention {}; take auto, f32, bf16 or bf16-shift",
                    attention_name(options.attention))};
  }
  return {};
}

}  // namespace

Result<int> threads_to_use(int n_threads) {
  if (n_threads < 0 || n_threads > kMaxThreads) {
    return {StatusCode::invalid_argument,
            fmt::format("{} threads are out of range, give 1 to {}", n_threads, kMaxThreads)};
  }
  return n_threads > 0 ? n_threads : std::min(kMaxThreads, usable_cores());
}

Session::Impl::Impl(std::shared_ptr<const Model> m, const SessionOptions& o, int threads, int64_t ctx)
    : model(std::move(m)),
      options(o),
      n_ctx(ctx),
      n_threads(threads),
      ropes(rope_tables(parts_of(*model).spec(), ctx)),
      workers(parts_of(*model).executors, threads),
      mixer(1, threads),
      x(parts_of(*model).spec().n_embd) {}

Status Session::Impl::init(std::shared_ptr<const BasisFile> basis) {
  const ModelSpec& spec = parts_of(*model).spec();
  if (!x.ok()) return {StatusCode::out_of_memory, "no memory for the activations of a step"};
  Result<std::unique_ptr<KvCache>> made = KvCache::create(
      kv_layers(spec, ropes), options.kv, std::move(basis),
      [this](int64_t layer, std::vector<double>& w) -> Status {
        const ModelParts& parts = parts_of(*model);
        if (parts.value_weights.get(layer, w)) return {};
        const Status s = value_weight(*parts.weights, layer, w, &workers);
        if (s.ok()) parts.value_weights.put(layer, w);
        return s;
      },
      options.segments, place_for(*model, options));
  if (!made.ok()) return made.status();
  cache = std::move(*made);
  cache->use_workers(&workers);
  std::vector<AttentionShape> shapes;
  for (int64_t i = 0; i < spec.n_layer(); ++i) shapes.push_back(attention_shape(spec, i));
  if (!claim_cache(0)) return {StatusCode::out_of_memory, "no memory for what a step works in"};
  scratch = std::make_unique<StepScratch>(shapes, n_threads);
  own_logits.assign(static_cast<size_t>(spec.n_vocab), 0.0F);
  return {};
}

Status Session::Impl::check_usable() const {
  if (prefill != nullptr) return {StatusCode::internal, "the session is still reading a prompt"};
  if (!broken) return {};
  return {StatusCode::internal, "the session failed in an earlier step and must be reset"};
}

Session::Session(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Session::~Session() = default;

Result<std::unique_ptr<Session>> Session::create(std::shared_ptr<const Model> model,
                                                 const SessionOptions& options) {
  const ModelInfo& info = model->info();
  if (options.n_ctx < 0 || options.n_ctx > info.n_ctx_train) {
    return Status(StatusCode::invalid_argument,
                  fmt::format("a context of {} tokens is out of range, the model allows 1 to {}",
                              options.n_ctx, info.n_ctx_train));
  }
  const Result<int> n_threads = threads_to_use(options.n_threads);
  if (!n_threads.ok()) return n_threads.status();
  if (Status s = check_prompt_options(options.prompt); !s.ok()) return s;
  if (Status s = Impl::check_device(*model, options); !s.ok()) return s;
  const int64_t n_ctx = options.n_ctx > 0 ? options.n_ctx : info.n_ctx_train;
  if (options.n_ctx > 0) {
    if (Status s = Impl::check_context(*model, options); !s.ok()) return s;
  }
  std::shared_ptr<const BasisFile> basis;
  if (!options.basis_path.empty()) {
    Result<std::shared_ptr<const BasisFile>> read = read_basis_file(options.basis_path, info);
    if (!read.ok()) return read.status();
    basis = std::move(*read);
  }
  auto impl = std::make_unique<Impl>(std::move(model), options, *n_threads, n_ctx);
  if (Status s = impl->init(std::move(basis)); !s.ok()) return s;
  return std::unique_ptr<Session>(new Session(std::move(impl)));
}

Status Session::prefill(std::span<const Token> tokens, const ProgressFn& progress) {
  if (Status s = begin_prefill(tokens); !s.ok()) return s;
  while (impl_->prefill != nullptr) {
    if (progress && !progress(prefill_done())) {
      impl_->stop_reading();
      impl_->broken = true;
      return {StatusCode::cancelled, "the prompt was cancelled"};
    }
    if (Status s = prefill_step(); !s.ok()) return s;
  }
  if (progress) progress(1.0);
  return {};
}

Status Session::prefill_together(std::span<Session* const> sessions, std::span<const Token> tokens,
                                 const ProgressFn& progress) {
  if (sessions.empty() || tokens.empty()) {
    return {StatusCode::invalid_argument, "the prompt is empty, give at least one token"};
  }
  Impl& lead = *sessions.front()->impl_;
  const int64_t n_past = lead.cache->n_tokens();
  for (Session* s : sessions) {
    if (Status st = s->impl_->check_usable(); !st.ok()) return st;
    if (s->impl_->model != lead.model || (sessions.size() > 1 && s->n_past() != 0)) {
      return {StatusCode::invalid_argument, "sessions that share a prefill must be empty and of one model"};
    }
  }
  const auto n_new = static_cast<int64_t>(tokens.size());
  const auto give_back = [&] {
    for (Session* s : sessions) {
      s->impl_->prompt_claim.resize(0);
      s->impl_->settle_claims();
    }
  };
  Status claimed;
  for (size_t i = 0; claimed.ok() && i < sessions.size(); ++i) {
    claimed = sessions[i]->impl_->claim_prompt(n_new);
    if (i > 0) sessions[i]->impl_->prompt_claim.resize(0);  // they share the work
  }
  if (claimed.ok()) claimed = lead.take_executor();
  if (!claimed.ok()) {
    give_back();
    return claimed;
  }
  Prefill prefill(*parts_of(*lead.model).weights, parts_of(*lead.model).plan, lead.ropes, *lead.executor,
                  lead.options.prompt);
  const Status status = guarded("the prompt", [&] {
    return prefill.run(tokens, n_past, lead.hooks_for(sessions, n_new), progress, lead.own_logits.data());
  });
  lead.give_executor_back();
  give_back();
  for (Session* s : sessions) {
    if (s != sessions.front()) s->impl_->own_logits = lead.own_logits;
    s->impl_->broken = !status.ok();
    s->impl_->stripe_past = n_past;
    if (status.ok()) s->impl_->note_prompt(n_past, prefill.read_share());
  }
  return status;
}

void Session::Impl::note_prompt(int64_t n_past, double read_share) {
  prompt_read = read_share;
  if (in_segments(n_past)) sealed = segment_end(options.kv, cache->n_tokens());
}

int64_t Session::Impl::stripe_tokens(int64_t n_past, int64_t n_left) const {
  if (!in_segments(n_past)) return n_left;
  const int64_t n = std::max(n_past, options.kv.n_sink) + kStripeTokens - n_past;
  return n_left >= n + kStripeTokens / 2 ? n : n_left;
}

void Session::Impl::keep_spare(int64_t n_new) {
  const ModelSpec& spec = parts_of(*model).spec();
  const int64_t n_exact = exact_tokens(options.kv, spec.most_width_kv(), !options.basis_path.empty());
  const bool begins_to_encode = stripe_past < n_exact && stripe_past + n_new > n_exact;
  if (!in_segments(stripe_past) || stripe_past == 0 || (!begins_to_encode && cache->goes_back_anywhere()))
    return;
  Result<std::unique_ptr<KvCache>> made = KvCache::create(kv_layers(spec, ropes), options.kv, nullptr, {},
                                                          options.segments, place_for(*model, options));
  if (made.ok() && (*made)->share(*cache, stripe_past).ok()) spare = std::move(*made);
}

Status Session::Impl::begin_stripe(Session* self) {
  const auto n_all = static_cast<int64_t>(prefill_tokens.size());
  const int64_t past = cache->n_tokens();
  const int64_t n = stripe_tokens(past, n_all - stripe_begin);
  const auto tokens = std::span<const Token>(prefill_tokens)
                          .subspan(static_cast<size_t>(stripe_begin), static_cast<size_t>(n));
  stripe_end = stripe_begin + n;
  stripe_past = past;
  keep_spare(n);
  return prefill->begin(tokens, past, hooks_for({&self, 1}, n, stripe_end < n_all), own_logits.data());
}

Status Session::begin_prefill(std::span<const Token> tokens, PromptRows rows) {
  Impl& m = *impl_;
  const bool was_reading = m.prefill != nullptr;
  Status status = guarded("the prompt", [&] { return m.begin_prefill(this, tokens, std::move(rows)); });
  if (!status.ok() && !was_reading) {
    m.stop_reading();
    m.spare.reset();
    m.settle_claims();
  }
  return status;
}

Status Session::Impl::begin_prefill(Session* self, std::span<const Token> tokens, PromptRows rows) {
  Impl& m = *this;
  if (tokens.empty()) return {StatusCode::invalid_argument, "the prompt is empty, give at least one token"};
  if (Status s = m.check_usable(); !s.ok()) return s;
  if ((rows.hidden || rows.logits) && !model->info().device.empty())
    return {StatusCode::unsupported,
            "embeddings and the log probabilities of a prompt are not computed on a GPU; take --device cpu"};
  m.prompt_rows = std::move(rows);
  if (Status s = m.claim_prompt(static_cast<int64_t>(tokens.size())); !s.ok()) return s;
  m.prefill_tokens.assign(tokens.begin(), tokens.end());
  m.stripe_begin = 0;
  if (Status s = m.take_executor(); !s.ok()) return s;
  m.prefill = std::make_unique<Prefill>(*parts_of(*m.model).weights, parts_of(*m.model).plan, m.ropes,
                                        *m.executor, m.options.prompt);
  return m.begin_stripe(self);
}

Status Session::prefill_step() {
  Impl& m = *impl_;
  if (m.prefill == nullptr) return {StatusCode::internal, "the session is not reading a prompt"};
  Status status = guarded("a part of the prompt", [&] {
    Status s = m.prefill->step();
    // Pages that are there now count themselves.
    if (!m.prefill->leaves_work()) m.claim_cache(m.n_claimed);
    return s;
  });
  if (status.ok() && !m.prefill->done()) return {};
  if (status.ok() && m.stripe_end < static_cast<int64_t>(m.prefill_tokens.size())) {
    m.spare.reset();
    m.sealed = n_past();
    m.stripe_begin = m.stripe_end;
    status = guarded("a part of the prompt", [&] { return m.begin_stripe(this); });
    if (status.ok()) return {};
  }
  const double read_share = m.prefill->read_share();
  m.stop_reading();
  m.broken = !status.ok();
  if (!status.ok()) return status;
  m.spare.reset();
  m.settle_claims();
  m.note_prompt(m.stripe_past, read_share);
  return {};
}

double Session::prompt_read() const { return impl_->prompt_read; }

double Session::prefill_done() const {
  const Impl& m = *impl_;
  if (m.prefill == nullptr) return 1.0;
  const auto n_stripe = static_cast<double>(m.stripe_end - m.stripe_begin);
  return (static_cast<double>(m.stripe_begin) + n_stripe * m.prefill->progress()) /
         static_cast<double>(m.prefill_tokens.size());
}

int64_t Session::segment_end(const KvProfile& profile, int64_t n_tokens) {
  const int64_t n = n_tokens - kLeastRest - profile.n_sink;
  return n >= kSegmentTokens ? profile.n_sink + n / kSegmentTokens * kSegmentTokens : 0;
}

int64_t Session::kept_prefix(int64_t n) const {
  const Impl& m = *impl_;
  if (m.prefill != nullptr || m.broken || !m.options.segments) return 0;
  const int64_t n_sink = m.options.kv.n_sink;
  const int64_t most = std::min(n, m.sealed);
  if (most < n_sink + kSegmentTokens) return 0;
  // Layers with a window hold what they need at some ends of segments.
  int64_t end = n_sink + (most - n_sink) / kSegmentTokens * kSegmentTokens;
  while (end > n_sink && !m.cache->can_keep(end)) end -= kSegmentTokens;
  return end > n_sink ? end : 0;
}

void Session::keep_prefix(int64_t n) {
  impl_->cache->keep(n);
  impl_->sealed = n;
  impl_->settle_claims();
}

int64_t Session::go_back(int64_t n) {
  Impl& m = *impl_;
  if (m.prefill != nullptr || m.broken) {
    // Layers hold different numbers of tokens: what was there before is in all of them.
    n = std::min(n, m.stripe_past);
    m.stop_reading();
    m.broken = false;
    if (m.spare != nullptr && !m.cache->share(*m.spare, m.stripe_past).ok()) n = 0;
    m.spare.reset();
  }
  n = std::clamp<int64_t>(n, 0, n_past());
  if (m.options.segments) {
    n = kept_prefix(n);
  } else {
    while (n > 0 && !m.cache->can_keep(n)) --n;
  }
  if (n == 0) {
    reset();
  } else {
    m.cache->keep(n);
    if (m.options.segments) m.sealed = n;
    m.settle_claims();
  }
  return n;
}

Status Session::share_prefix(const Session& from, int64_t n) {
  Impl& m = *impl_;
  const Impl& other = *from.impl_;
  const bool alike = this != &from && m.model == other.model && m.options.segments &&
                     other.options.segments && m.options.kv.name == other.options.kv.name &&
                     m.options.basis_path == other.options.basis_path;
  if (!alike || n <= 0 || from.kept_prefix(n) != n)
    return {StatusCode::invalid_argument, "sessions that differ, or a prefix that is no segment's end"};
  reset();
  const Status shared = guarded("the shared beginning", [&] {
    Status s = m.cache->share(*other.cache, n);
    if (s.ok() && !m.claim_cache(n)) s = {StatusCode::out_of_memory, "no memory for a shared beginning"};
    return s;
  });
  if (!shared.ok()) {
    reset();
    return shared;
  }
  m.sealed = n;
  return {};
}

Status Session::Impl::begin_step(Token token, float* embedding, Executor& by) {
  const LentWorkers::While lent(workers, by);
  Status status;
  try {
    status = prepare_step(token, embedding);
  } catch (...) {
    status = status_of_exception("a step");
    broken = true;
  }
  return status;
}

Status Session::Impl::prepare_step(Token token, float* embedding) {
  if (Status s = check_usable(); !s.ok()) return s;
  if (cache->n_tokens() >= n_ctx) {
    return {StatusCode::context_full, fmt::format("the context of {} tokens is full", n_ctx)};
  }
  if (Status s = parts_of(*model).weights->embed({&token, 1}, embedding); !s.ok()) return s;
  if (Status s = claim_step(); !s.ok()) return s;
  cache->encode_together(workers);
  scratch->may_convert = true;
  for (int64_t i = 0; i < cache->n_layer(); ++i) {
    if (Status s = cache->layer(i).begin_step(*scratch); !s.ok()) {
      return {s.code(), fmt::format("layer {}: {}", i, s.message())};
    }
  }
  return {};
}

Status Session::Impl::finish_step(Executor& by) {
  const LentWorkers::While lent(workers, by);
  Status status = guarded("the end of a step", [this] {
    for (int64_t i = 0; i < cache->n_layer(); ++i) cache->layer(i).end_step();
  });
  if (!status.ok()) broken = true;
  return status;
}

/// What begin_step() has begun.
Status Session::Impl::run_step() {
  const StepSequence own = sequence();
  mixer.begin({&own, 1});
  executor->measure(measures);
  const Plan& plan = parts_of(*model).plan;
  const Status status = executor->run({plan.layers, x.data(), 1, 0, &mixer, &plan.output, own_logits.data()});
  for (size_t i = 0; measures && i < step_times.size(); ++i) step_times[i] += executor->times()[i];
  if (!status.ok()) {
    broken = true;
    return status;
  }
  return finish_step(*executor);
}

void Session::Impl::stop_reading() {
  prefill.reset();
  prompt_rows = {};
  give_executor_back();
  prompt_claim.resize(0);
}

Status Session::Impl::take_executor() {
  Result<ExecutorLease> taken = ExecutorLease::take(parts_of(*model).executors, n_threads);
  if (!taken.ok()) return taken.status();
  executor = std::move(*taken);
  workers.lend(&*executor);
  return {};
}

void Session::Impl::give_executor_back() {
  workers.lend(nullptr);
  executor.give_back();
}

Status Session::decode(Token token) {
  Impl& m = *impl_;
  Status status = m.check_usable();
  if (status.ok()) status = guarded("a step", [&] { return m.take_executor(); });
  if (status.ok()) status = m.executor->reserve(1, false);
  if (status.ok()) status = m.begin_step(token, m.x.data(), *m.executor);
  if (status.ok()) status = m.run_step();
  if (m.prefill == nullptr) m.give_executor_back();
  return status;
}

std::span<const float> Session::logits() const { return impl_->own_logits; }

int64_t Session::n_past() const {
  if (impl_->prefill != nullptr) impl_->prefill->wait();
  return impl_->cache->n_tokens();
}
int64_t Session::n_ctx() const { return impl_->n_ctx; }
int Session::n_threads() const { return impl_->n_threads; }
const Model& Session::model() const { return *impl_->model; }
const KvProfile& Session::profile() const { return impl_->options.kv; }
CacheStats Session::cache_stats() const {
  if (impl_->prefill != nullptr) impl_->prefill->wait();
  return impl_->cache->stats();
}

void Session::reset() {
  impl_->stop_reading();
  impl_->spare.reset();
  impl_->cache->clear();
  impl_->sealed = 0;
  impl_->broken = false;
  impl_->settle_claims();
}

}  // namespace narrows
