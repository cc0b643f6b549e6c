// DecodeBatch: who takes part in a step, and the way back.
#include <fmt/format.h>

#include <algorithm>
#include <atomic>

#include "base/guarded.h"
#include "engine/session_impl.h"
#include "engine/step_program.h"

namespace narrows {

struct DecodeBatch::Impl {
  std::shared_ptr<const Model> model;
  int max_sessions;
  std::unique_ptr<ThreadPool> pool;
  std::unique_ptr<StepProgram> program;

  Impl(std::shared_ptr<const Model> m, int n) : model(std::move(m)), max_sessions(n) {}

  Status admit(const Session::Impl& session) const;
};

/// The step's threads work in the session's own scratch.
Status DecodeBatch::Impl::admit(const Session::Impl& session) const {
  if (session.model != model)
    return {StatusCode::invalid_argument, "the session is of another model than the batch"};
  if (session.runner.n_threads() != pool->n_threads()) {
    return {StatusCode::invalid_argument,
            fmt::format("the session has {} threads and the batch {}, they must be as many",
                        session.runner.n_threads(), pool->n_threads())};
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
  auto impl = std::make_unique<Impl>(std::move(model), max_sessions);
  Result<std::unique_ptr<ThreadPool>> pool = ThreadPool::create(*threads);
  if (!pool.ok()) return pool.status();
  impl->pool = std::move(*pool);
  Result<std::unique_ptr<StepProgram>> program =
      StepProgram::create(impl->model->weights(), max_sessions, *impl->pool);
  if (!program.ok()) return program.status();
  impl->program = std::move(*program);
  return std::unique_ptr<DecodeBatch>(new DecodeBatch(std::move(impl)));
}

void DecodeBatch::for_each(int64_t n, const std::function<void(int64_t)>& task) {
  if (n == 1) return task(0);
  struct Tasks {
    const int64_t n;
    const std::function<void(int64_t)>& task;
    std::atomic<int64_t> next{0};
  } tasks{n, task};
  impl_->pool->run(
      [](void* context, int /*ith*/, int /*n_threads*/) {
        Tasks& t = *static_cast<Tasks*>(context);
        for (int64_t i = t.next.fetch_add(1); i < t.n; i = t.next.fetch_add(1)) t.task(i);
      },
      &tasks);
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
  StepProgram& program = *impl_->program;
  std::vector<size_t> taking_part;
  std::vector<DecodeLane> lanes;
  taking_part.reserve(sessions.size());  // nothing is thrown once a session has begun
  lanes.reserve(sessions.size());
  for (size_t i = 0; i < sessions.size(); ++i) {
    Session::Impl& session = *sessions[i]->impl_;
    const auto before = sessions.first(i);
    each[i] = impl_->admit(session);
    if (std::find(before.begin(), before.end(), sessions[i]) != before.end())
      each[i] = Status(StatusCode::invalid_argument, "the session is twice in the batch");
    if (each[i].ok()) each[i] = session.begin_step(tokens[i], program.input(static_cast<int>(lanes.size())));
    if (!each[i].ok()) continue;
    taking_part.push_back(i);
    lanes.push_back(session.lane());
  }
  if (lanes.empty()) return {};
  program.run(lanes);
  for (const size_t i : taking_part) each[i] = sessions[i]->impl_->finish_step();
  for_each(static_cast<int64_t>(lanes.size()), [&](int64_t lane) {
    Session::Impl& session = *sessions[taking_part[static_cast<size_t>(lane)]]->impl_;
    const std::span<const float> logits = program.logits(static_cast<int>(lane));
    std::copy(logits.begin(), logits.end(), session.own_logits.begin());
    session.logits_from_program = false;
  });
  return {};
}

}  // namespace narrows
