// Where the time of a decode step goes: microseconds of each stage beside the least that
// the machine could do it in: read the stage's weights from memory once, or what klt_bounds.h counts of a klt
// cache. With LANES sessions that step together, over caches of PROMPT tokens of TEXT (all begin at other
// places of it), which goes on in the steps.
//
//   build/bench/bench_step MODEL.gguf [THREADS] [KV PROFILE] [STEPS] [LANES] [PROMPT TEXT]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "base/file.h"
#include "bench/machine.h"
#include "engine/session_impl.h"
#include "klt_bounds.h"
#include "narrows/engine.h"

namespace narrows {
namespace {

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int64_t bytes_of(std::span<const LinearOp> all) {
  int64_t n = 0;
  for (const LinearOp& l : all) n += l.w->row_bytes() * l.w->n_out;
  return n;
}

int fail(const Status& s) {
  std::fprintf(stderr, "%s\n", s.message().c_str());
  return 1;
}

struct Arguments {
  std::string path;
  int n_threads = 0;
  std::string kv = "f16";
  int n_step = 128;
  int n_lane = 1;
  int64_t n_prompt = 1;
  std::string text;
};

/// Steps that are not measured: threads, caches and rebuilt keys settle.
constexpr int kWarmUp = 16;

/// Prompts of the sequences, and the tokens that follow them.
struct Texts {
  std::vector<std::vector<Token>> prompts;
  std::vector<std::vector<Token>> steps;
};

Result<Texts> texts_of(const Model& model, const Arguments& a) {
  const auto n_lane = static_cast<size_t>(a.n_lane);
  const auto n_step = static_cast<int64_t>(kWarmUp) + a.n_step;
  Texts texts = {std::vector(n_lane, std::vector<Token>{1}), std::vector<std::vector<Token>>(n_lane)};
  for (int64_t l = 0; l < a.n_lane; ++l) {
    for (int64_t i = 0; i < n_step; ++i)
      texts.steps[static_cast<size_t>(l)].push_back(static_cast<Token>(1000 + (i + 31 * l) % 997));
  }
  if (a.text.empty()) return texts;
  Result<std::string> text = read_file(a.text, int64_t{1} << 28);
  if (!text.ok()) return text.status();
  const auto tokens = model.tokenizer().encode(*text, false, false);
  if (!tokens.ok()) return tokens.status();
  const auto n = static_cast<int64_t>(tokens->size());
  if (a.n_prompt < 1 || a.n_prompt + n_step > n)
    return Status(StatusCode::invalid_argument, "the text is too short");
  for (int64_t i = 0; i < a.n_lane; ++i) {
    const auto at = tokens->begin() + (n - a.n_prompt - n_step) * i / a.n_lane;
    texts.prompts[static_cast<size_t>(i)].assign(at, at + a.n_prompt);
    texts.steps[static_cast<size_t>(i)].assign(at + a.n_prompt, at + a.n_prompt + n_step);
  }
  return texts;
}

int run(const Arguments& a) {
  const std::string& path = a.path;
  const std::string& kv = a.kv;
  const int n_step = a.n_step;
  const auto model = Model::load(path);
  if (!model.ok()) return fail(model.status());
  const auto profile = KvProfile::parse(kv);
  if (!profile.ok()) return fail(profile.status());
  SessionOptions options;
  options.kv = *profile;
  options.n_threads = a.n_threads;
  const auto texts = texts_of(**model, a);
  if (!texts.ok()) return fail(texts.status());
  std::vector<std::unique_ptr<Session>> sessions;
  for (const std::vector<Token>& prompt : texts->prompts) {
    auto session = Session::create(*model, options);
    if (!session.ok()) return fail(session.status());
    if (Status s = (*session)->prefill(prompt); !s.ok()) return fail(s);
    sessions.push_back(std::move(*session));
  }
  const int n_threads = sessions[0]->n_threads();
  const ModelParts& parts = parts_of(**model);
  const int64_t n_embd = parts.spec().n_embd;
  auto executor = ExecutorLease::take(parts.executors, n_threads);
  if (!executor.ok()) return fail(executor.status());
  if (Status s = (*executor)->reserve(a.n_lane, false); !s.ok()) return fail(s);
  StepMixer mixer(a.n_lane, n_threads);
  std::vector<float> x(static_cast<size_t>(a.n_lane * n_embd)),
      logits(static_cast<size_t>(a.n_lane * parts.spec().n_vocab));
  double start = 0;
  double counting = 0;  // seconds of what no engine does
  KltStepWork klt;
  std::vector<std::vector<std::vector<int32_t>>> selected(static_cast<size_t>(a.n_lane));
  for (int i = -kWarmUp; i < n_step; ++i) {
    if (i == 0) {
      (*executor)->measure(true);
      start = seconds();
    }
    std::vector<StepSequence> sequences;
    for (int l = 0; l < a.n_lane; ++l) {
      Session::Impl& session = Access::impl(*sessions[static_cast<size_t>(l)]);
      const Token token = texts->steps[static_cast<size_t>(l)][static_cast<size_t>(i + kWarmUp)];
      if (Status s = session.begin_step(token, x.data() + l * n_embd, **executor); !s.ok()) return fail(s);
      sequences.push_back(session.sequence());
    }
    mixer.begin(sequences);
    if (Status s = (*executor)->run(
            {parts.plan.layers, x.data(), a.n_lane, 0, &mixer, &parts.plan.output, logits.data()});
        !s.ok())
      return fail(s);
    for (const auto& session : sessions) {
      if (Status s = Access::impl(*session).finish_step(**executor); !s.ok()) return fail(s);
    }
    const double before = seconds();
    if (i == 0) klt = {};
    for (size_t l = 0; l < sessions.size(); ++l) add_klt_work(Access::impl(*sessions[l]), selected[l], klt);
    if (i >= 0) counting += seconds() - before;
  }
  const double us = (seconds() - start - counting) / n_step * 1e6;
  const Result<MachineLimits> machine = measure_machine(n_threads);
  if (!machine.ok()) return fail(machine.status());
  const double speed = machine->read_bytes_s;
  int64_t bytes[kRunStages] = {};
  const auto of = [&](RunStage stage) -> int64_t& { return bytes[static_cast<size_t>(stage)]; };
  for (const LayerPlan& l : parts.plan.layers) {
    of(RunStage::qkv) += bytes_of(l.project.linears);
    of(RunStage::out) += bytes_of({&l.out, 1});
    of(RunStage::ffn) += bytes_of(l.ffn.linears);
    if (l.down.w != nullptr) of(RunStage::down) += bytes_of({&l.down, 1});
    for (int64_t i = 0; l.experts && i < l.experts.spec.n_used; ++i) {  // of one sequence
      const ExpertOp& expert = l.experts.all[static_cast<size_t>(i)];
      of(RunStage::ffn) += bytes_of(expert.gate_up);
      of(RunStage::down) += bytes_of({&expert.down, 1});
    }
  }
  of(RunStage::logits) = bytes_of({&parts.plan.output.logits, 1});
  std::printf(
      "%s, %d threads, %s, %d sequences, prompts of %zu tokens, memory reading %.1f GB/s, %s %.0f GFLOP/s\n",
      path.c_str(), n_threads, kv.c_str(), a.n_lane, texts->prompts.front().size(), speed / 1e9,
      machine->flops_format.c_str(), machine->flops_s / 1e9);
  std::printf("%-10s %10s %10s %12s %8s\n", "stage", "us", "MB", "us at least", "GB/s");
  const char* const names[kRunStages] = {"qkv", "score", "select", "rebuild", "attend",
                                         "out", "ffn",   "down",   "logits"};
  double least[kRunStages] = {};
  for (size_t i = 0; i < kRunStages; ++i) least[i] = static_cast<double>(bytes[i]) / speed * 1e6;
  for (const auto& [stage, work] :
       {std::pair(RunStage::score, klt.score), std::pair(RunStage::select, klt.select),
        std::pair(RunStage::rebuild, klt.rebuild), std::pair(RunStage::attend, klt.attend)}) {
    const auto at = static_cast<size_t>(stage);
    bytes[at] += static_cast<int64_t>(work.bytes / n_step);
    least[at] += work.seconds(*machine) / n_step * 1e6;
  }
  double sum = 0;
  double least_sum = 0;
  int64_t total = 0;
  for (size_t i = 0; i < kRunStages; ++i) {
    const double stage = static_cast<double>((*executor)->times()[i]) / n_step / 1e3;
    std::printf("%-10s %10.1f %10.2f %12.1f %8.1f\n", names[i], stage, static_cast<double>(bytes[i]) / 1e6,
                least[i], static_cast<double>(bytes[i]) / stage / 1e3);
    sum += stage;
    least_sum += least[i];
    total += bytes[i];
  }
  std::printf("%-10s %10.1f\n", "rest", us - sum);
  std::printf("%-10s %10.1f %10.2f %12.1f %8.1f  = %.1f tokens a second\n", "all", us,
              static_cast<double>(total) / 1e6, least_sum, static_cast<double>(total) / us / 1e3,
              1e6 * a.n_lane / us);
  return 0;
}

}  // namespace
}  // namespace narrows

int main(int argc, char** argv) {
  if (argc < 2 || argc == 7) {
    std::fprintf(stderr,
                 "usage: bench_step MODEL.gguf [THREADS] [KV PROFILE] [STEPS] [LANES] [PROMPT TEXT]\n");
    return 2;
  }
  narrows::Arguments a;
  a.path = argv[1];
  if (argc > 2) a.n_threads = std::atoi(argv[2]);
  if (argc > 3) a.kv = argv[3];
  if (argc > 4) a.n_step = std::max(1, std::atoi(argv[4]));
  if (argc > 5) a.n_lane = std::max(1, std::atoi(argv[5]));
  if (argc > 7) {
    a.n_prompt = std::atoi(argv[6]);
    a.text = argv[7];
  }
  return narrows::run(a);
}
