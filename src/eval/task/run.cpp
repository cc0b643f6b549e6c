// Sessions that share a prompt also share the passes over the weights while they answer (DecodeBatch).
#include "eval/task/run.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "base/memory.h"

namespace narrows {

namespace {

/// How much of a question's time its prompt takes, for the progress.
constexpr double kPromptShare = 0.7;

Status cancelled() { return {StatusCode::cancelled, "eval was cancelled"}; }

std::string name_of(const ItemId& id) {
  return id.task == "file" ? fmt::format("the question of line {}", id.index)
                           : fmt::format("question {} of {}", id.index, id.task);
}

/// f16, and each profile once.
std::vector<KvProfile> distinct(const std::vector<KvProfile>& asked) {
  std::vector<KvProfile> all = {KvProfile{}};
  std::set<std::string> names = {all.front().name};
  for (const KvProfile& p : asked) {
    if (names.insert(p.name).second) all.push_back(p);
  }
  return all;
}

std::string valid_utf8(std::string_view bytes) {
  Utf8Stream stream;
  std::string text = stream.push(bytes);
  return text + stream.flush();
}

class Runner {
 public:
  Runner(std::shared_ptr<const Model> model, const TaskOptions& options)
      : model_(std::move(model)), options_(options), profiles_(distinct(options.profiles)) {}

  Status open(int64_t most_tokens);
  /// The answers of the profiles `who`, from a prompt that is read for all of them.
  Status answer(const TaskItem& item, std::span<const Token> prompt, const std::vector<size_t>& who,
                std::vector<TaskAnswer>& out, const ProgressFn& progress);
  const std::vector<KvProfile>& profiles() const { return profiles_; }
  int64_t n_ctx() const { return options_.n_ctx > 0 ? options_.n_ctx : model_->info().n_ctx_train; }

 private:
  std::shared_ptr<const Model> model_;
  const TaskOptions& options_;
  std::vector<KvProfile> profiles_;
  std::vector<std::unique_ptr<Session>> sessions_;
  std::unique_ptr<DecodeBatch> batch_;
};

Status Runner::open(int64_t most_tokens) {
  if (profiles_.size() > static_cast<size_t>(DecodeBatch::kMaxSessions)) {
    return {StatusCode::invalid_argument, fmt::format("{} profiles at once are too many, give {} at most",
                                                      profiles_.size(), DecodeBatch::kMaxSessions)};
  }
  int64_t need = 0;
  for (const KvProfile& p : profiles_) need += cache_bytes_estimate(*model_, p, most_tokens);
  const int64_t have = available_memory_bytes();
  if (have > 0 && need > have) {
    return {StatusCode::out_of_memory,
            fmt::format("the caches of {} profiles at {} tokens need {:.2f} GB and {:.2f} GB are free; give "
                        "fewer --kv at a time or a shorter --context",
                        profiles_.size(), most_tokens, static_cast<double>(need) / 1e9,
                        static_cast<double>(have) / 1e9)};
  }
  for (const KvProfile& p : profiles_) {
    SessionOptions so;
    so.kv = p;
    so.n_ctx = options_.n_ctx;
    so.n_threads = options_.n_threads;
    so.prompt = options_.prompt;
    if (p.takes_basis()) so.basis_path = options_.basis_path;
    Result<std::unique_ptr<Session>> made = Session::create(model_, so);
    if (!made.ok()) return made.status();
    sessions_.push_back(std::move(*made));
  }
  Result<std::unique_ptr<DecodeBatch>> batch =
      DecodeBatch::create(model_, static_cast<int>(sessions_.size()), sessions_.front()->n_threads());
  if (!batch.ok()) return batch.status();
  batch_ = std::move(*batch);
  return {};
}

Status Runner::answer(const TaskItem& item, std::span<const Token> prompt, const std::vector<size_t>& who,
                      std::vector<TaskAnswer>& out, const ProgressFn& progress) {
  std::vector<Session*> active;
  for (const size_t p : who) {
    sessions_[p]->reset();
    active.push_back(sessions_[p].get());
  }
  const auto reading = [&](double done) { return !progress || progress(kPromptShare * done); };
  if (Status s = Session::prefill_together(active, prompt, reading); !s.ok()) return s;

  const Tokenizer& tokenizer = model_->tokenizer();
  std::vector<std::vector<Token>> replies(who.size());
  out.assign(who.size(), {});
  std::vector<size_t> at(who.size());  // of the active ones, in `who`
  for (size_t i = 0; i < at.size(); ++i) at[i] = i;
  for (int64_t step = 0; !at.empty(); ++step) {
    std::vector<Token> tokens;
    std::vector<size_t> going;
    active.clear();
    for (const size_t i : at) {
      const auto logits = sessions_[who[i]]->logits();
      const auto token = static_cast<Token>(std::max_element(logits.begin(), logits.end()) - logits.begin());
      out[i].ended = tokenizer.is_end(token);
      if (out[i].ended || static_cast<int64_t>(replies[i].size()) >= item.max_tokens) continue;
      replies[i].push_back(token);
      tokens.push_back(token);
      going.push_back(i);
      active.push_back(sessions_[who[i]].get());
    }
    at = std::move(going);
    if (at.empty()) break;
    std::vector<Status> each(at.size());
    if (Status s = batch_->decode(active, tokens, each); !s.ok()) return s;
    for (Status& s : each) {
      if (!s.ok()) return s;
    }
    const double part = static_cast<double>(step + 1) / static_cast<double>(item.max_tokens);
    if (progress && !progress(kPromptShare + (1 - kPromptShare) * part)) return cancelled();
  }
  for (size_t i = 0; i < who.size(); ++i) {
    out[i].text = valid_utf8(tokenizer.decode(replies[i]));
    out[i].n_tokens = static_cast<int64_t>(replies[i].size());
    out[i].prompt_tokens = static_cast<int64_t>(prompt.size());
  }
  return {};
}

}  // namespace

Result<TaskResult> run_task(const std::shared_ptr<const Model>& model, const TaskItems& items,
                            const TaskOptions& options, Answers& answers, const ProgressFn& progress) {
  if (items.ids.empty()) return Status(StatusCode::invalid_argument, "there is no question to ask");
  Runner runner(model, options);
  int64_t most_tokens = 0;
  for (const ItemId& id : items.ids) most_tokens = std::max(most_tokens, id.context);
  if (Status s = runner.open(std::min(runner.n_ctx(), std::max<int64_t>(most_tokens, 1))); !s.ok()) return s;

  TaskResult result;
  for (const KvProfile& p : runner.profiles()) result.profiles.push_back(p.name);
  const auto n = static_cast<double>(items.ids.size());
  for (size_t i = 0; i < items.ids.size(); ++i) {
    const auto part = [&](double done) { return !progress || progress((static_cast<double>(i) + done) / n); };
    if (!part(0)) return cancelled();
    Result<TaskItem> item = items.make(items.ids[i]);
    if (!item.ok()) return item.status();
    std::vector<size_t> missing;
    for (size_t p = 0; p < result.profiles.size(); ++p) {
      if (answers.find(item->id, result.profiles[p]) == nullptr) missing.push_back(p);
    }
    if (!missing.empty()) {
      const Result<std::vector<Token>> prompt = item_prompt(model->tokenizer(), *item, options.raw);
      if (!prompt.ok()) {
        return Status(prompt.status().code(),
                      fmt::format("{}: {}", name_of(item->id), prompt.status().message()));
      }
      const auto n_prompt = static_cast<int64_t>(prompt->size());
      if (n_prompt + item->max_tokens > runner.n_ctx()) {
        return Status(StatusCode::invalid_argument,
                      fmt::format("{} has {} tokens and its answer up to {}, but the context holds {}; leave "
                                  "it out, or lower --max-tokens or --few-shot",
                                  name_of(item->id), n_prompt, item->max_tokens, runner.n_ctx()));
      }
      std::vector<TaskAnswer> made;
      if (Status s = runner.answer(*item, *prompt, missing, made, part); !s.ok()) return s;
      for (size_t m = 0; m < missing.size(); ++m) {
        if (Status s = answers.add(item->id, result.profiles[missing[m]], std::move(made[m])); !s.ok())
          return s;
      }
    }
    AnsweredItem done;
    done.id = item->id;
    for (const std::string& kv : result.profiles) {
      done.answers.push_back(*answers.find(item->id, kv));
      done.scores.push_back(score_answer(options.score, done.answers.back().text, item->expected));
    }
    done.expected = std::move(item->expected);
    result.items.push_back(std::move(done));
  }
  if (progress) progress(1);
  return result;
}

namespace {

/// Sums over the questions of one task, then means.
TaskRow row_of(const TaskResult& result, const ItemId& task, size_t profile,
               std::vector<double>& differences) {
  TaskRow row;
  row.task = task.task;
  row.kv = result.profiles[profile];
  row.context = task.context;
  for (const AnsweredItem& item : result.items) {
    if (item.id.context != task.context || item.id.task != task.task) continue;
    const TaskAnswer& answer = item.answers[profile];
    ++row.n;
    row.score += item.scores[profile];
    row.score_f16 += item.scores[0];
    row.prompt_tokens += static_cast<double>(answer.prompt_tokens);
    row.answer_tokens += static_cast<double>(answer.n_tokens);
    row.changed_text += answer.text != item.answers[0].text ? 1 : 0;
    if (task.context == 0) row.context = std::max(row.context, answer.prompt_tokens);
    differences.push_back(item.scores[profile] - item.scores[0]);
  }
  for (double* sum : {&row.score, &row.score_f16, &row.prompt_tokens, &row.answer_tokens})
    *sum /= static_cast<double>(row.n);
  if (profile > 0) row.difference = paired_difference({&differences, 1});
  return row;
}

/// Of one profile's rows of several tasks.
TaskRow row_of_all(const std::vector<TaskRow>& tasks, const std::vector<std::vector<double>>& differences) {
  TaskRow all;
  all.task = "all";
  all.kv = tasks.front().kv;
  all.context = tasks.front().context;
  const auto n = static_cast<double>(tasks.size());
  for (const TaskRow& row : tasks) {
    all.n += row.n;
    all.score += row.score / n;
    all.score_f16 += row.score_f16 / n;
    all.prompt_tokens += row.prompt_tokens / n;
    all.answer_tokens += row.answer_tokens / n;
    all.changed_text += row.changed_text;
  }
  all.difference = paired_difference(differences);
  return all;
}

}  // namespace

std::vector<TaskRow> task_rows(const TaskResult& result) {
  std::vector<ItemId> tasks;  // each task at each context, in the order of the questions
  std::vector<int64_t> contexts;
  for (const AnsweredItem& item : result.items) {
    const ItemId task = {item.id.task, item.id.context, 0};
    if (std::find(tasks.begin(), tasks.end(), task) == tasks.end()) tasks.push_back(task);
    if (std::find(contexts.begin(), contexts.end(), task.context) == contexts.end())
      contexts.push_back(task.context);
  }
  std::vector<TaskRow> rows;
  for (const int64_t context : contexts) {
    const size_t n_profile = result.profiles.size();
    std::vector<std::vector<TaskRow>> of_profile(n_profile);
    std::vector<std::vector<std::vector<double>>> differences(n_profile);  // [profile][task][question]
    for (const ItemId& task : tasks) {
      for (size_t p = 0; task.context == context && p < n_profile; ++p) {
        of_profile[p].push_back(row_of(result, task, p, differences[p].emplace_back()));
        rows.push_back(of_profile[p].back());
      }
    }
    for (size_t p = 0; of_profile.front().size() > 1 && p < n_profile; ++p) {
      rows.push_back(row_of_all(of_profile[p], differences[p]));
      if (p == 0) rows.back().difference = {};
    }
  }
  return rows;
}

}  // namespace narrows
