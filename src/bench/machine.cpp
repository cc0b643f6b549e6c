// Limits are the best of several tries: anything that disturbs only makes a machine look slower.
#include "bench/machine.h"

#include <fmt/format.h>
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <dnnl.hpp>
#include <memory>
#include <vector>

#include "base/page_array.h"
#include "base/thread_pool.h"

namespace narrows {

namespace {

using Clock = std::chrono::steady_clock;
using dnnl::memory;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Several times what the CPUs' caches hold.
constexpr int64_t kReadBytes = int64_t{256} << 20;
constexpr int kReadTries = 16;
/// Rows, inputs and outputs of a product that stays in the caches and has room for all blocking tricks.
constexpr int64_t kRows = 512, kInputs = 1536, kOutputs = 1536;
constexpr int kProductTries = 12;

struct ReadJob {
  PageArray bytes{kReadBytes};
  std::vector<uint64_t> sums;

  /// Thread ith of n's part, 64 bytes a step in eight chains.
  static void run(void* context, int ith, int n) {
    ReadJob& job = *static_cast<ReadJob*>(context);
    const int64_t lines = job.bytes.size() / 64;
    const uint8_t* at = job.bytes.data() + lines * ith / n * 64;
    const uint8_t* end = job.bytes.data() + lines * (ith + 1) / n * 64;
    uint64_t sum[8] = {};
    for (; at < end; at += 64) {
      uint64_t words[8];
      std::memcpy(words, at, sizeof(words));
      for (int j = 0; j < 8; ++j) sum[j] += words[j];
    }
    // Kept, so that the compiler cannot leave the reading out.
    for (const uint64_t s : sum) job.sums[static_cast<size_t>(ith)] += s;
  }
};

Status measure_reading(MachineLimits& out) {
  Result<std::unique_ptr<ThreadPool>> pool = ThreadPool::create(out.n_threads);
  if (!pool.ok()) return pool.status();
  ReadJob job;
  if (!job.bytes.ok()) return {StatusCode::out_of_memory, "no memory to measure how fast it is read"};
  std::fill_n(job.bytes.data(), job.bytes.size(), uint8_t{1});
  job.sums.resize(static_cast<size_t>(out.n_threads));
  for (int i = 0; i < kReadTries; ++i) {
    const auto start = Clock::now();
    (*pool)->run(&ReadJob::run, &job);
    out.read_bytes_s =
        std::max(out.read_bytes_s, static_cast<double>(job.bytes.size()) / seconds_since(start));
  }
  return {};
}

/// Best speed of one product in this format; 0 if this CPU's oneDNN has no kernel of its own for it.
double product_flops_s(memory::data_type format) {
  dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  dnnl::stream stream(engine);
  const memory::desc x({kRows, kInputs}, format, memory::format_tag::ab);
  const memory::desc w({kInputs, kOutputs}, format, memory::format_tag::any);
  const memory::desc y({kRows, kOutputs}, memory::data_type::f32, memory::format_tag::ab);
  const dnnl::matmul::primitive_desc description(dnnl::matmul::desc(x, w, y), engine);
  const dnnl::matmul product(description);
  memory a(x, engine), b(description.weights_desc(), engine), c(y, engine);
  // Zeros: a product takes as long with any finite numbers, and memory may come with others.
  std::memset(a.get_data_handle(), 0, x.get_size());
  std::memset(b.get_data_handle(), 0, description.weights_desc().get_size());
  double best = 0;
  for (int i = 0; i < kProductTries; ++i) {
    const auto start = Clock::now();
    product.execute(stream, {{DNNL_ARG_SRC, a}, {DNNL_ARG_WEIGHTS, b}, {DNNL_ARG_DST, c}});
    stream.wait();
    best = std::max(best, 2.0 * kRows * kInputs * kOutputs / seconds_since(start));
  }
  return best;
}

Status measure_products(MachineLimits& out) {
  const int before = omp_get_max_threads();
  omp_set_num_threads(out.n_threads);
  Status status;
  try {
    out.flops_s = product_flops_s(memory::data_type::f32);
    out.flops_format = "f32";
    const dnnl::cpu_isa isa = dnnl::get_effective_cpu_isa();
    if (isa == dnnl::cpu_isa::avx512_core_bf16 || isa == dnnl::cpu_isa::avx512_core_amx) {
      const double bf16 = product_flops_s(memory::data_type::bf16);
      if (bf16 > out.flops_s) {
        out.flops_s = bf16;
        out.flops_format = "bf16";
      }
    }
  } catch (const dnnl::error& e) {
    status = {StatusCode::internal, fmt::format("oneDNN cannot measure the CPU: {}", e.what())};
  }
  omp_set_num_threads(before);
  return status;
}

}  // namespace

Result<MachineLimits> measure_machine(int n_threads) {
  MachineLimits out;
  out.n_threads = n_threads;
  if (Status s = measure_reading(out); !s.ok()) return s;
  if (Status s = measure_products(out); !s.ok()) return s;
  return out;
}

double ModelWork::prompt_flops(int64_t n) const {
  const auto tokens = static_cast<double>(n);
  return flops_token * tokens + flops_pair * tokens * (tokens + 1) / 2 + flops_logits;
}

ModelWork work_of(const Plan& plan) {
  ModelWork work;
  const auto add = [&](const LinearOp& l, double& flops) {
    work.weight_bytes += l.w->row_bytes() * l.w->n_out;
    flops += 2.0 * static_cast<double>(l.w->n_in) * static_cast<double>(l.w->n_out);
  };
  for (const LayerPlan& layer : plan.layers) {
    for (const LinearOp& l : layer.project.linears) add(l, work.flops_token);
    add(layer.out, work.flops_token);
    for (const LinearOp& l : layer.ffn.linears) add(l, work.flops_token);
    if (layer.experts) {  // of which a token reads those that it goes through, all of one shape
      add(layer.experts.router, work.flops_token);
      for (int64_t i = 0; i < layer.experts.spec.n_used; ++i) {
        const ExpertOp& expert = layer.experts.all[static_cast<size_t>(i)];
        for (const LinearOp& l : expert.gate_up) add(l, work.flops_token);
        add(expert.down, work.flops_token);
      }
    }
    if (layer.down.w != nullptr) add(layer.down, work.flops_token);
    work.flops_pair += 4.0 * static_cast<double>(layer.mix.attention.width_q());
  }
  add(plan.output.logits, work.flops_logits);
  return work;
}

}  // namespace narrows
