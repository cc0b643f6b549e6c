// DecodeBatch: who takes part in a step, and the way back.
#include <fmt/format.h>

#include <algorithm>

#include "base/guarded.h"
#include "engine/session_impl.h"
#include "engine/step_mixer.h"

namespace narrows {

struct DecodeBatch::Impl {
  std::shared_ptr<const Model> model;
  int max_sessions;
  ExecutorLease executor;  ///< goes before the model
  StepMixer mixer;
  AlignedArray<float> x;       ///< [max_sessions, n_embd]
  AlignedArray<float> logits;  ///< [max_sessions, n_vocab]
  MemoryClaim claim{MemoryUse::scratch};

  Impl(std::shared_ptr<const Model> m, int n, ExecutorLease e)
      : model(std::move(m)),
        max_sessions(n),
        executor(std::move(e)),
        mixer(n, executor->n_threads()),
        x(n * model->info().n_embd),
        logits(n * model->info().n_vocab) {}

  Status admit(const Session::Impl& session) const;
};

/// The step's threads work in the session's own scratch.
Status DecodeBatch::Impl::admit(const Session::Impl& session) const {
  if (session.model != model)
    return {StatusCode::invalid_argument, "the session is of another model than the batch"};
  if (session.n_threads != executor->n_threads()) {
    return {StatusCode::invalid_argument,
            fmt::format("the session has {} threads and the batch {}, they must be as many",
                        session.n_threads, executor->n_threads())};
  }
  return {};
}

DecodeBatch::DecodeBatch(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
DecodeBatch::~DecodeBatch() = default;

Result<std::unique_ptr<DecodeBatch>> DecodeBatch::create(std::shared_ptr<const Model> model, int max_sessions,
                                                         int n_threads) {
  if (max_sessions < 1 || max_sessions > kMaxSessions) {
    return Status(
        StatusCode::invalid_argument,
        fmt::format("{} sessions at once are out of range, give 1 to {}", max_sessions, kMaxSessions));
  }
  Result<int> threads = threads_to_use(n_threads);
  if (!threads.ok()) return threads.status();
  Result<ExecutorLease> executor = ExecutorLease::take(parts_of(*model).executors, *threads);
  if (!executor.ok()) return executor.status();
  if (Status s = (*executor)->reserve(max_sessions, false); !s.ok()) return s;
  auto impl = std::make_unique<Impl>(std::move(model), max_sessions, std::move(*executor));
  const int64_t floats = impl->x.size() + impl->logits.size();
  if (!impl->x.ok() || !impl->logits.ok() || !impl->claim.resize(floats * int64_t{sizeof(float)}))
    return Status(StatusCode::out_of_memory, "no memory for the activations of a step");
  return std::unique_ptr<DecodeBatch>(new DecodeBatch(std::move(impl)));
}

void DecodeBatch::for_each(int64_t n, const std::function<void(int64_t)>& task) {
  impl_->executor->for_each(n, task);
}

int DecodeBatch::max_sessions() const { return impl_->max_sessions; }

Status DecodeBatch::decode(std::span<Session* const> sessions, std::span<const Token> tokens,
                           std::span<Status> each) {
  if (sessions.size() != tokens.size() || sessions.size() != each.size() ||
      sessions.size() > static_cast<size_t>(impl_->max_sessions)) {
    return {StatusCode::invalid_argument,
            fmt::format("{} sessions, {} tokens and {} results do not go together in a batch of {} at most",
                        sessions.size(), tokens.size(), each.size(), impl_->max_sessions)};
  }
  const int64_t n_embd = impl_->model->info().n_embd, n_vocab = impl_->model->info().n_vocab;
  std::vector<size_t> taking_part;
  std::vector<StepSequence> sequences;
  taking_part.reserve(sessions.size());  // nothing is thrown once a session has begun
  sequences.reserve(sessions.size());
  for (size_t i = 0; i < sessions.size(); ++i) {
    Session::Impl& session = *sessions[i]->impl_;
    const auto before = sessions.first(i);
    each[i] = impl_->admit(session);
    if (std::find(before.begin(), before.end(), sessions[i]) != before.end())
      each[i] = Status(StatusCode::invalid_argument, "the session is twice in the batch");
    if (each[i].ok() && !sequences.empty() && !sequences.front().cache->lies_like(*session.cache))
      each[i] = Status(StatusCode::invalid_argument,
                       "sessions whose caches lie on the GPU in different ways, or not there, cannot take a "
                       "step together");
    float* x = impl_->x.data() + static_cast<int64_t>(sequences.size()) * n_embd;
    if (each[i].ok()) each[i] = session.begin_step(tokens[i], x, *impl_->executor);
    if (!each[i].ok()) continue;
    taking_part.push_back(i);
    sequences.push_back(session.sequence());
  }
  if (sequences.empty()) return {};
  impl_->mixer.begin(sequences);
  const Plan& plan = parts_of(*impl_->model).plan;
  const Status run =
      impl_->executor->run({plan.layers, impl_->x.data(), static_cast<int64_t>(sequences.size()), 0,
                            &impl_->mixer, &plan.output, impl_->logits.data()});
  for (const size_t i : taking_part) {
    Session::Impl& session = *sessions[i]->impl_;
    session.broken = !run.ok();
    each[i] = run.ok() ? session.finish_step(*impl_->executor) : run;
  }
  if (!run.ok()) return {};
  for_each(static_cast<int64_t>(sequences.size()), [&](int64_t sequence) {
    Session::Impl& session = *sessions[taking_part[static_cast<size_t>(sequence)]]->impl_;
    std::copy_n(impl_->logits.data() + sequence * n_vocab, n_vocab, session.own_logits.begin());
  });
  return {};
}

}  // namespace narrows
