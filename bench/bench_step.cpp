// Where the time of a decode step goes: microseconds of each stage of the step program over a short cache,
// beside the time in which the machine reads the stage's weights from memory once.
//
//   build/bench/bench_step MODEL.gguf [THREADS] [KV PROFILE] [STEPS]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "bench/machine.h"
#include "engine/session_impl.h"
#include "narrows/engine.h"

namespace narrows {
namespace {

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int64_t bytes_of(std::initializer_list<const ggml_tensor*> all) {
  int64_t n = 0;
  for (const ggml_tensor* t : all) {
    if (t != nullptr) n += static_cast<int64_t>(ggml_row_size(t->type, t->ne[0])) * t->ne[1];
  }
  return n;
}

int fail(const Status& s) {
  std::fprintf(stderr, "%s\n", s.message().c_str());
  return 1;
}

int run(const std::string& path, int n_threads, const std::string& kv, int n_step) {
  const auto model = Model::load(path);
  if (!model.ok()) return fail(model.status());
  const auto profile = KvProfile::parse(kv);
  if (!profile.ok()) return fail(profile.status());
  SessionOptions options;
  options.kv = *profile;
  options.n_threads = n_threads;
  auto session = Session::create(*model, options);
  if (!session.ok()) return fail(session.status());
  const std::vector<Token> first = {1};
  if (Status s = (*session)->prefill(first); !s.ok()) return fail(s);
  double start = 0;
  for (int i = -16; i < n_step; ++i) {
    if (i == 0) {
      (*session)->impl().program->measure(true);
      start = seconds();
    }
    if (Status s = (*session)->decode(1000 + i % 997); !s.ok()) return fail(s);
  }
  const double us = (seconds() - start) / n_step * 1e6;
  const Result<MachineLimits> machine = measure_machine((*session)->n_threads());
  if (!machine.ok()) return fail(machine.status());
  const double speed = machine->read_bytes_s;
  const ModelWeights& weights = (*model)->weights();
  int64_t bytes[kStepStages] = {};
  for (int64_t l = 0; l < weights.hparams().n_layer; ++l) {
    const LayerWeights& w = weights.layer(l);
    const auto of = [&](StepStage stage) -> int64_t& { return bytes[static_cast<size_t>(stage)]; };
    of(StepStage::qkv) += bytes_of({w.wqkv, w.wq, w.wk, w.wv});
    of(StepStage::wo) += bytes_of({w.wo});
    of(StepStage::gate_up) += bytes_of({w.gate_up, w.gate, w.up});
    of(StepStage::down) += bytes_of({w.down});
  }
  bytes[static_cast<size_t>(StepStage::logits)] = bytes_of({weights.output()});
  std::printf("%s, %d threads, %s, memory reading %.1f GB/s\n", path.c_str(), (*session)->n_threads(),
              kv.c_str(), speed / 1e9);
  std::printf("%-10s %10s %10s %12s %8s\n", "stage", "us", "MB", "us at least", "GB/s");
  const char* const names[kStepStages] = {"qkv", "score",   "select", "rebuild", "attend",
                                          "wo",  "gate_up", "down",   "logits"};
  double sum = 0;
  int64_t total = 0;
  for (size_t i = 0; i < kStepStages; ++i) {
    const double stage = static_cast<double>((*session)->impl().program->times()[i]) / n_step / 1e3;
    std::printf("%-10s %10.1f %10.2f %12.1f %8.1f\n", names[i], stage, static_cast<double>(bytes[i]) / 1e6,
                static_cast<double>(bytes[i]) / speed * 1e6, static_cast<double>(bytes[i]) / stage / 1e3);
    sum += stage;
    total += bytes[i];
  }
  std::printf("%-10s %10.1f\n", "rest", us - sum);
  std::printf("%-10s %10.1f %10.2f %12.1f %8.1f  = %.1f tokens a second\n", "all", us,
              static_cast<double>(total) / 1e6, static_cast<double>(total) / speed * 1e6,
              static_cast<double>(total) / us / 1e3, 1e6 / us);
  return 0;
}

}  // namespace
}  // namespace narrows

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: bench_step MODEL.gguf [THREADS] [KV PROFILE] [STEPS]\n");
    return 2;
  }
  return narrows::run(argv[1], argc > 2 ? std::atoi(argv[2]) : 0, argc > 3 ? argv[3] : "f16",
                      argc > 4 ? std::max(1, std::atoi(argv[4])) : 128);
}
