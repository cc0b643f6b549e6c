// DecodeBatch: who takes part in a step, one graph a number of sessions, and the way back.
#include <fmt/format.h>

#include <algorithm>

#include "engine/decode_graph.h"
#include "engine/session_impl.h"

namespace narrows {

struct DecodeBatch::Impl {
  std::shared_ptr<const Model> model;
  GraphRunner runner;
  std::vector<std::unique_ptr<DecodeGraph>> graphs;  ///< [max_sessions]: of 1, 2, .. lanes; made when needed

  Impl(std::shared_ptr<const Model> m, int max_sessions, int n_threads)
      : model(std::move(m)), runner(n_threads), graphs(static_cast<size_t>(max_sessions)) {}

  Status admit(const Session::Impl& session) const;
  Result<DecodeGraph*> graph_for(std::span<const DecodeLane> lanes);
};

/// The step's threads work in the session's own scratch.
Status DecodeBatch::Impl::admit(const Session::Impl& session) const {
  if (session.model != model)
    return {StatusCode::invalid_argument, "the session is of another model than the batch"};
  if (session.runner.n_threads() != runner.n_threads()) {
    return {StatusCode::invalid_argument,
            fmt::format("the session has {} threads and the batch {}, they must be as many",
                        session.runner.n_threads(), runner.n_threads())};
  }
  return {};
}

Result<DecodeGraph*> DecodeBatch::Impl::graph_for(std::span<const DecodeLane> lanes) {
  std::unique_ptr<DecodeGraph>& graph = graphs[lanes.size() - 1];
  const std::vector<int> n_phase = phases_of(lanes);
  if (graph == nullptr || !graph->has_phases(n_phase)) {
    graph.reset();
    Result<std::unique_ptr<DecodeGraph>> made =
        DecodeGraph::create(model->weights(), static_cast<int>(lanes.size()), n_phase);
    if (!made.ok()) return made.status();
    graph = std::move(*made);
  }
  return graph.get();
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
  return std::unique_ptr<DecodeBatch>(
      new DecodeBatch(std::make_unique<Impl>(std::move(model), max_sessions, *threads)));
}

int DecodeBatch::max_sessions() const { return static_cast<int>(impl_->graphs.size()); }

Status DecodeBatch::decode(std::span<Session* const> sessions, std::span<const Token> tokens,
                           std::span<Status> each) {
  if (sessions.size() != tokens.size() || sessions.size() != each.size() ||
      sessions.size() > impl_->graphs.size()) {
    return {StatusCode::invalid_argument,
            fmt::format("{} sessions, {} tokens and {} results do not go together in a batch of {} at most",
                        sessions.size(), tokens.size(), each.size(), impl_->graphs.size())};
  }
  const auto n_embd = static_cast<size_t>(impl_->model->info().n_embd);
  std::vector<size_t> taking_part;
  std::vector<DecodeLane> lanes;
  std::vector<float> rows(sessions.size() * n_embd);
  for (size_t i = 0; i < sessions.size(); ++i) {
    Session::Impl& session = *sessions[i]->impl_;
    const auto before = sessions.first(i);
    each[i] = impl_->admit(session);
    if (std::find(before.begin(), before.end(), sessions[i]) != before.end())
      each[i] = Status(StatusCode::invalid_argument, "the session is twice in the batch");
    if (each[i].ok()) each[i] = session.begin_step(tokens[i], rows.data() + lanes.size() * n_embd);
    if (!each[i].ok()) continue;
    taking_part.push_back(i);
    lanes.push_back(session.lane());
  }
  if (lanes.empty()) return {};
  const Result<DecodeGraph*> graph = impl_->graph_for(lanes);
  if (!graph.ok()) {
    for (const size_t i : taking_part) each[i] = graph.status();
    return graph.status();
  }
  std::copy_n(rows.data(), lanes.size() * n_embd, (*graph)->input(0));
  const Status status = (*graph)->run(lanes, impl_->runner);
  for (size_t lane = 0; lane < lanes.size(); ++lane) {
    Session::Impl& session = *sessions[taking_part[lane]]->impl_;
    each[taking_part[lane]] = status;
    session.broken = !status.ok();
    if (!status.ok()) continue;
    session.finish_step();
    const std::span<const float> logits = (*graph)->logits(static_cast<int>(lane));
    session.own_logits.assign(logits.begin(), logits.end());
    session.logits_from_graph = false;
  }
  return status;
}

}  // namespace narrows
