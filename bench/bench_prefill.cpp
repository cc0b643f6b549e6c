// The attention of a prompt alone, beside ggml's flash_attn_ext with f16 keys, on the shapes of SmolLM2,
// Qwen2.5 0.5B and Llama 3 8B: 512 rows at a depth. Every iteration runs both engines and all variants in
// turn, in ggml's thread pool; the counters are medians over iterations.
//
//   build/bench/bench_prefill --benchmark_filter='14x2x64'
//
// ratio1, ratio2  ggml's time by ours with bf16-shift (packing of the rows' own keys included), 1 and 2
// threads GF/s            of ours, 2 threads; a causal row counts only what it sees of_peak         that by
// twice the measured peak of one core's vdpbf16ps shift           what bf16-shift takes longer than bf16, 2
// threads scaling         ours, 1 thread by 2
#include <benchmark/benchmark.h>
#include <ggml-cpu.h>
#include <ggml.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/ops.h"
#include "prompt/attention.h"

namespace narrows {
namespace {

using kernels::PrefillKind;

constexpr int64_t kRows = 512;

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Shape {
  int64_t n_head, n_head_kv, head_dim, depth;
};

double median(std::vector<double> x) {
  std::sort(x.begin(), x.end());
  return x[x.size() / 2];
}

#if defined(__x86_64__)
/// FLOP/s of one core: 12 chains, whose latency of 6 cycles they cover twice. Named variables: GCC would keep
/// an array in memory.
__attribute__((target("avx512f"), noinline)) double bf16_peak() {
  typedef float V __attribute__((vector_size(64)));
  constexpr int64_t kSteps = 20000000;
  V a{}, b{};
  V c0{}, c1{}, c2{}, c3{}, c4{}, c5{}, c6{}, c7{}, c8{}, c9{}, c10{}, c11{};
  const double start = seconds();
  for (int64_t i = 0; i < kSteps; ++i) {
#define STEP(c) __asm__ volatile("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    STEP(c0)
    STEP(c1) STEP(c2) STEP(c3) STEP(c4) STEP(c5) STEP(c6) STEP(c7) STEP(c8) STEP(c9) STEP(c10) STEP(c11)
#undef STEP
  }
  return static_cast<double>(kSteps) * 12 * 64 / (seconds() - start);
}
#else
double bf16_peak() { return 0; }
#endif

double peak() {
  static const double best = [] {
    double top = 0;
    for (int i = 0; i < 5 && kernels::ops().best_prefill == PrefillKind::bf16_shift; ++i)
      top = std::max(top, bf16_peak());
    return top;
  }();
  return best;
}

/// A graph of one op, ready to run.
class Graph {
 public:
  explicit Graph(size_t bytes) : ctx_(ggml_init({bytes, nullptr, false})) {}
  ~Graph() { ggml_free(ctx_); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ggml_context* ctx() { return ctx_; }
  void set(ggml_tensor* result) {
    graph_ = ggml_new_graph(ctx_);
    ggml_build_forward_expand(graph_, result);
  }
  double run(int n_threads) {
    ggml_cplan plan = ggml_graph_plan(graph_, n_threads, nullptr);
    work_.resize(plan.work_size);
    plan.work_data = work_.data();
    const double start = seconds();
    ggml_graph_compute(graph_, &plan);
    return seconds() - start;
  }

 private:
  ggml_context* ctx_;
  ggml_cgraph* graph_ = nullptr;
  std::vector<uint8_t> work_;
};

struct Numbers {
  std::vector<float> q, k, v;  ///< [rows, heads, head_dim]
};

class Peer {
 public:
  Peer(const Shape& s, const Numbers& x) : graph_(static_cast<size_t>(1) << 30) {
    ggml_context* ctx = graph_.ctx();
    const int64_t n = s.depth + kRows;
    ggml_tensor* q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, s.head_dim, kRows, s.n_head);
    ggml_tensor* k = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, s.head_dim, n, s.n_head_kv);
    ggml_tensor* v = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, s.head_dim, n, s.n_head_kv);
    ggml_tensor* mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n, kRows);
    auto* mask_at = static_cast<ggml_fp16_t*>(mask->data);
    const ggml_fp16_t open = ggml_fp32_to_fp16(0), closed = ggml_fp32_to_fp16(-INFINITY);
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t j = 0; j < n; ++j) mask_at[r * n + j] = j <= s.depth + r ? open : closed;
    }
    for (int64_t h = 0; h < s.n_head; ++h) {
      for (int64_t r = 0; r < kRows; ++r)
        std::copy_n(x.q.data() + (r * s.n_head + h) * s.head_dim, s.head_dim,
                    static_cast<float*>(q->data) + (h * kRows + r) * s.head_dim);
    }
    for (int64_t h = 0; h < s.n_head_kv; ++h) {
      for (int64_t j = 0; j < n; ++j) {
        const int64_t from = (j * s.n_head_kv + h) * s.head_dim, to = (h * n + j) * s.head_dim;
        ggml_fp32_to_fp16_row(x.k.data() + from, static_cast<ggml_fp16_t*>(k->data) + to, s.head_dim);
        ggml_fp32_to_fp16_row(x.v.data() + from, static_cast<ggml_fp16_t*>(v->data) + to, s.head_dim);
      }
    }
    graph_.set(ggml_flash_attn_ext(ctx, q, k, v, mask, 1 / std::sqrt(static_cast<float>(s.head_dim)), 0, 0));
  }
  double run(int n_threads) { return graph_.run(n_threads); }

 private:
  Graph graph_;
};

class Ours {
 public:
  Ours(PrefillKind kind, const Shape& s, const Numbers& x)
      : shape_(s),
        numbers_(x),
        out_(static_cast<size_t>(kRows * s.n_head * s.head_dim)),
        attention_(kind, {s.n_head, s.n_head_kv, s.head_dim, 1 / std::sqrt(static_cast<float>(s.head_dim))},
                   s.depth + kRows, 2),
        graph_(1 << 20) {
    pack(0, PromptAttention::tiles(s.depth + kRows));
    ggml_tensor* nothing = ggml_new_tensor_1d(graph_.ctx(), GGML_TYPE_F32, 1);
    const auto op = [this](ggml_tensor* before, ggml_custom_op_t what) {
      return ggml_custom_4d(graph_.ctx(), GGML_TYPE_F32, 1, 1, 1, 1, &before, 1, what, GGML_N_TASKS_MAX,
                            this);
    };
    graph_.set(op(op(nothing, &Ours::pack_op), &Ours::attend_op));
  }
  double run(int n_threads) {
    attention_.start(numbers_.q.data(), kRows, shape_.depth, 0, out_.data());
    next_tile_ = shape_.depth / kernels::kPrefillTile;
    return graph_.run(n_threads);
  }

 private:
  void pack(int64_t from, int64_t to) {
    const int64_t width = shape_.n_head_kv * shape_.head_dim, n = shape_.depth + kRows;
    for (int64_t t = from; t < to; ++t) {
      const int64_t at = t * kernels::kPrefillTile;
      for (int64_t h = 0; h < shape_.n_head_kv; ++h)
        attention_.pack(h, t, numbers_.k.data() + at * width, numbers_.v.data() + at * width,
                        std::min(kernels::kPrefillTile, n - at));
    }
  }
  static void pack_op(ggml_tensor* /*dst*/, int /*ith*/, int /*nth*/, void* self) {
    Ours& o = *static_cast<Ours*>(self);
    const int64_t end = PromptAttention::tiles(o.shape_.depth + kRows);
    for (int64_t t = o.next_tile_++; t < end; t = o.next_tile_++) o.pack(t, t + 1);
  }
  static void attend_op(ggml_tensor* /*dst*/, int ith, int /*nth*/, void* self) {
    static_cast<Ours*>(self)->attention_.run(ith);
  }

  Shape shape_;
  const Numbers& numbers_;
  std::vector<float> out_;
  PromptAttention attention_;
  Graph graph_;
  std::atomic<int64_t> next_tile_{0};
};

void compare(benchmark::State& state, const Shape& s) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  Numbers x;
  const auto fill = [&](std::vector<float>& y, int64_t n) {
    y.resize(static_cast<size_t>(n));
    for (float& value : y) value = normal(random);
  };
  fill(x.q, kRows * s.n_head * s.head_dim);
  fill(x.k, (s.depth + kRows) * s.n_head_kv * s.head_dim);
  fill(x.v, (s.depth + kRows) * s.n_head_kv * s.head_dim);
  Peer peer(s, x);
  Ours shift(PrefillKind::bf16_shift, s, x), plain(PrefillKind::bf16, s, x);
  shift.run(2), plain.run(2);  // warm-up
  std::vector<double> peer1, peer2, shift1, shift2, plain2;
  for (auto _ : state) {
    // A variant that follows the peer finds the caches cold, so a bare run goes between.
    peer1.push_back(peer.run(1));
    shift1.push_back(shift.run(1));
    peer2.push_back(peer.run(2));
    for (int i = 0; i < 4; ++i) {
      shift2.push_back(shift.run(2));
      plain2.push_back(plain.run(2));
    }
    state.SetIterationTime(shift2.back());
  }
  const double flop = 4.0 * static_cast<double>(s.head_dim * s.n_head * kRows) *
                      (static_cast<double>(s.depth) + (kRows + 1) / 2.0);
  const double speed = flop / median(shift2);
  state.counters["ratio1"] = median(peer1) / median(shift1);
  state.counters["ratio2"] = median(peer2) / median(shift2);
  state.counters["GF/s"] = speed / 1e9;
  state.counters["of_peak"] = peak() > 0 ? speed / (2 * peak()) : 0;
  state.counters["shift"] = median(shift2) / median(plain2) - 1;
  state.counters["scaling"] = median(shift1) / median(shift2);
}

}  // namespace
}  // namespace narrows

int main(int argc, char** argv) {
  using namespace narrows;
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  for (const Shape s : {Shape{9, 3, 64, 0}, Shape{14, 2, 64, 0}, Shape{32, 8, 128, 0}}) {
    for (const int64_t depth : {0, 4096, 16384}) {
      Shape at = s;
      at.depth = depth;
      const std::string name = std::to_string(s.n_head) + "x" + std::to_string(s.n_head_kv) + "x" +
                               std::to_string(s.head_dim) + "@" + std::to_string(depth);
      benchmark::RegisterBenchmark(name.c_str(), [at](benchmark::State& state) { compare(state, at); })
          ->UseManualTime()
          ->Unit(benchmark::kMillisecond)
          ->Iterations(3);
    }
  }
  std::printf("target %s, bf16 peak of one core %.1f GFLOP/s\n", kernels::ops().name, peak() / 1e9);
  std::fflush(stdout);
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
