// engine_check MODEL TEXT: the whole engine on the GPU against the CPU's on a real model, a table of
// differences. The yardstick is the CPU with unrounded activations (LoadOptions::float_weights): the GPU may
// be no further from it than twice the CPU is. Also: a batch gives the bits of single steps, and sessions
// saved on one go on on the other. tools/gpu_check runs it; it needs a device.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>

#include "narrows/engine.h"
#include "narrows/session_file.h"

namespace {

using namespace narrows;

constexpr int64_t kSteps = 64;
int failures = 0;

void expect(bool good, const std::string& what) {
  if (good) return;
  fmt::print("FAILED: {}\n", what);
  ++failures;
}

template <class T>
T must(Result<T> result, const char* what) {
  if (!result.ok()) {
    fmt::print("FAILED: {}: {}\n", what, result.status().message());
    std::exit(1);
  }
  return std::move(*result);
}

void must(const Status& status, const char* what) {
  if (status.ok()) return;
  fmt::print("FAILED: {}: {}\n", what, status.message());
  std::exit(1);
}

std::shared_ptr<const Model> load(const char* path, const char* device, bool floats) {
  LoadOptions options;
  options.device = device;
  options.float_weights = floats;
  return must(Model::load(path, options), "the model");
}

SessionOptions options_of(const std::string& kv) {
  SessionOptions options;
  options.kv = must(KvProfile::parse(kv), "the profile");
  options.n_ctx = 4096;
  options.n_threads = 8;
  return options;
}

std::unique_ptr<Session> session_on(const std::shared_ptr<const Model>& model, const std::string& kv) {
  return must(Session::create(model, options_of(kv)), "the session");
}

using Rows = std::vector<std::vector<float>>;

std::vector<float> now(const Session& s) { return {s.logits().begin(), s.logits().end()}; }

/// Logits after n tokens of the text, then after each of the next ones in steps.
Rows logits_of(Session& s, std::span<const Token> text, int64_t n) {
  must(s.prefill(text.first(static_cast<size_t>(n))), "the prompt");
  Rows rows = {now(s)};
  for (int64_t i = 0; i < kSteps; ++i) {
    must(s.decode(text[static_cast<size_t>(n + i)]), "a step");
    rows.push_back(now(s));
  }
  return rows;
}

std::vector<double> probabilities(const std::vector<float>& logits) {
  const double top = *std::max_element(logits.begin(), logits.end());
  std::vector<double> p;
  double sum = 0;
  for (const float x : logits) sum += p.emplace_back(std::exp(static_cast<double>(x) - top));
  for (double& x : p) x /= sum;
  return p;
}

Token likeliest(const Session& s) {
  return static_cast<Token>(std::max_element(s.logits().begin(), s.logits().end()) - s.logits().begin());
}

struct Difference {
  double prompt = 0;  ///< KL of the logits after the prompt
  double steps = 0;   ///< mean of the steps
  int64_t same = 0;   ///< likeliest tokens that agree
};

Difference between(const Rows& a, const Rows& b) {
  Difference d;
  for (size_t i = 0; i < a.size(); ++i) {
    const std::vector<double> p = probabilities(a[i]), q = probabilities(b[i]);
    double kl = 0;
    for (size_t t = 0; t < p.size(); ++t) kl += p[t] > 0 ? p[t] * std::log(p[t] / q[t]) : 0;
    (i == 0 ? d.prompt : d.steps) += i == 0 ? kl : kl / static_cast<double>(a.size() - 1);
    d.same +=
        std::max_element(p.begin(), p.end()) - p.begin() == std::max_element(q.begin(), q.end()) - q.begin();
  }
  return d;
}

std::string text_of(const Difference& d) {
  return fmt::format("{:.2e} {:.2e} {:>2}/{}", d.prompt, d.steps, d.same, kSteps + 1);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    fmt::print("usage: engine_check MODEL TEXT\n");
    return 2;
  }
  std::ifstream file(argv[2]);
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const auto cpu = load(argv[1], "cpu", false), exact = load(argv[1], "cpu", true),
             gpu = load(argv[1], "cuda", false);
  fmt::print("{} on {}\n", argv[1], gpu->info().device);
  const std::vector<Token> tokens = must(cpu->tokenizer().encode(text, true, false), "the text");
  fmt::print(
      "KL of the prompt, mean KL of {} steps, agreeing tokens: GPU to float | CPU to float | GPU to CPU\n",
      kSteps);
  for (const char* kv : {"f16", "klt"}) {
    for (const int64_t n : {7, 63, 64, 95, 300, 1000, 2100}) {
      if (n + kSteps > static_cast<int64_t>(tokens.size())) continue;
      auto on_cpu = session_on(cpu, kv), on_float = session_on(exact, "f16"), on_gpu = session_on(gpu, kv);
      const Rows a = logits_of(*on_gpu, tokens, n), b = logits_of(*on_cpu, tokens, n);
      const Rows f = logits_of(*on_float, tokens, n);
      const Difference ours = between(f, a), theirs = between(f, b);
      fmt::print("{:>4} {:>5} tokens: {} | {} | {}\n", kv, n, text_of(ours), text_of(theirs),
                 text_of(between(b, a)));
      expect(ours.steps < 2 * theirs.steps + 1e-6, fmt::format("steps of {} after {} tokens", kv, n));
    }
  }
  // With unrounded activations nothing is chaotic: greedy text is the same.
  const auto exact_gpu = load(argv[1], "cuda", true);
  for (const int64_t n : {20, 60, 90}) {
    auto a = session_on(exact_gpu, "f16"), b = session_on(exact, "f16");
    for (auto* session : {a.get(), b.get()})
      must(session->prefill(std::span(tokens).first(static_cast<size_t>(n))), "the prompt");
    int64_t same = 0;
    double most = 0;
    for (; same < kSteps && likeliest(*a) == likeliest(*b); ++same) {
      for (size_t i = 0; i < a->logits().size(); ++i)
        most = std::max(most,
                        std::fabs(static_cast<double>(a->logits()[i]) - static_cast<double>(b->logits()[i])));
      const Token next = likeliest(*b);
      must(a->decode(next), "a step");
      must(b->decode(next), "a step");
    }
    fmt::print("float weights, {} tokens: {} of {} greedy tokens alike, logits within {:.1e}\n", n, same,
               kSteps, most);
    expect(same == kSteps, "greedy text with float weights");
  }
  // A batch of three, of different lengths.
  auto batch = must(DecodeBatch::create(gpu, 4, 8), "the batch");
  std::vector<std::unique_ptr<Session>> alone, together;
  std::vector<Session*> list;
  for (const int64_t n : {5, 130, 400}) {
    for (auto* to : {&alone, &together}) {
      to->push_back(session_on(gpu, "f16"));
      must(to->back()->prefill(std::span(tokens).first(static_cast<size_t>(n))), "the prompt");
    }
    list.push_back(together.back().get());
  }
  for (int step = 0; step < 8; ++step) {
    const std::vector<Token> next(3, tokens[static_cast<size_t>(step)]);
    std::vector<Status> each(3);
    must(batch->decode(list, next, each), "a step of a batch");
    for (size_t i = 0; i < 3; ++i) {
      must(each[i], "a session of a batch");
      must(alone[i]->decode(next[i]), "a step");
      expect(now(*alone[i]) == now(*together[i]), fmt::format("step {} of sequence {} of a batch", step, i));
    }
  }
  // Sessions that move.
  for (const char* kv : {"f16", "klt"}) {
    for (const bool to_gpu : {false, true}) {
      const char* path = "/tmp/narrows_engine_check.session";
      auto from = session_on(to_gpu ? cpu : gpu, kv);
      const auto first = std::span<const Token>(tokens).first(150);
      must(from->prefill(first), "the prompt");
      must(save_session(*from, first, path), "saving");
      const SavedSession saved = must(load_session(to_gpu ? gpu : cpu, options_of(kv), path), "loading");
      Session* to = saved.session.get();
      must(from->decode(tokens[150]), "a step");
      must(to->decode(tokens[150]), "a step");
      const Difference d = between({now(*from), now(*from)}, {now(*to), now(*to)});
      fmt::print("{} saved on the {}: KL of the next step {:.2e}\n", kv, to_gpu ? "CPU" : "GPU", d.steps);
      expect(d.steps < 0.05, "a session that moves");
      std::remove(path);
    }
  }
  fmt::print("{}\n",
             failures == 0 ? "engine_check: all good" : fmt::format("engine_check: {} failures", failures));
  return failures == 0 ? 0 : 1;
}
