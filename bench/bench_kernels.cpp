// Speed of every kernel on every CPU target, beside what the machine can do: "share" is the part of the
// measured FMA peak of the same target (gemm, attention) or of the measured memory reading speed
// (attend_f16_cold).
//
//   build/bench/bench_kernels --benchmark_filter='AVX3_DL/'
//
// Numbers are of one thread. Peaks are measured when the program starts; a busy machine makes both sides
// noisy.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "kernels/ops.h"
#include "kernels/softmax_state.h"

namespace narrows::kernels {
namespace {

/// Seconds of CPU time: other programs on a shared machine stop this clock, as they stop Google Benchmark's.
double cpu_seconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

/// 64-byte aligned array of n values.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n)
      : at_(static_cast<T*>(::operator new(static_cast<size_t>(n) * sizeof(T), kAlign))) {
    std::fill(at_, at_ + n, T{});
  }
  ~Buffer() { ::operator delete(at_, kAlign); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() { return at_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  T* at_;
};

std::unique_ptr<Buffer<float>> normal(int64_t n, float sigma = 1) {
  auto x = std::make_unique<Buffer<float>>(n);
  std::mt19937 random(1);
  std::normal_distribution<float> value(0, sigma);
  for (int64_t i = 0; i < n; ++i) x->get()[i] = value(random);
  return x;
}

std::unique_ptr<Buffer<f16_t>> halves(const Ops& ops, Buffer<float>& x, int64_t n) {
  auto y = std::make_unique<Buffer<f16_t>>(n);
  ops.f32_to_f16(x.get(), y->get(), n);
  return y;
}

// ---- Peaks
// -------------------------------------------------------------------------------------------------------

// Independent chains of multiply-add in GCC's vector types: the compiler keeps them in registers, and the
// target attribute stands for the one Highway sets. 14 chains cover 4 cycles of latency at 2 (or, in 512
// bits, 1) a cycle.
#define NARROWS_PEAK(name, isa, bytes)                                           \
  __attribute__((target(isa), noinline)) double name() {                         \
    typedef float V __attribute__((vector_size(bytes)));                         \
    constexpr int64_t kSteps = 20000000;                                         \
    V c[14];                                                                     \
    for (int i = 0; i < 14; ++i) c[i] = V{} + static_cast<float>(i);             \
    V a = V{} + 0.999F;                                                          \
    V b = V{} + 0.001F;                                                          \
    __asm__ volatile("" : "+x"(a), "+x"(b));                                     \
    const double start = cpu_seconds();                                          \
    for (int64_t step = 0; step < kSteps; ++step) {                              \
      _Pragma("GCC unroll 14") for (int i = 0; i < 14; ++i) c[i] = c[i] * a + b; \
    }                                                                            \
    const double seconds = cpu_seconds() - start;                                \
    V sum{};                                                                     \
    for (int i = 0; i < 14; ++i) sum += c[i];                                    \
    benchmark::DoNotOptimize(sum[0]);                                            \
    return static_cast<double>(kSteps) * 14 * 2 * (bytes / 4) / seconds;         \
  }
#if defined(__x86_64__)
NARROWS_PEAK(peak_avx512, "avx512f,fma", 64)
NARROWS_PEAK(peak_avx2, "avx2,fma", 32)
NARROWS_PEAK(peak_sse4, "sse4.2", 16)

double measure_peak(const std::string& target) {
  if (target.starts_with("AVX3")) return peak_avx512();
  if (target == "AVX2") return peak_avx2();
  return peak_sse4();
}
#else
double measure_peak(const std::string&) { return 0; }  // share prints as infinity: not measured
#endif

/// Best of five: a busy neighbour can only make it smaller.
double fma_peak(const Ops& ops) {
  static std::vector<std::pair<const Ops*, double>> known;
  for (const auto& [table, peak] : known) {
    if (table == &ops) return peak;
  }
  double best = 0;
  for (int i = 0; i < 5; ++i) best = std::max(best, measure_peak(ops.name));
  known.emplace_back(&ops, best);
  return best;
}

/// Bytes a second of one thread summing 256 MB, which no cache holds.
double read_peak() {
  static const double peak = [] {
    constexpr int64_t kWords = 32 << 20;
    Buffer<uint64_t> x(kWords);
    double best = 0;
    for (int i = 0; i < 5; ++i) {
      const double start = cpu_seconds();
      uint64_t sum[8] = {};
      for (int64_t w = 0; w < kWords; w += 8) {
        for (int j = 0; j < 8; ++j) sum[j] += x.get()[w + j];
      }
      for (uint64_t s : sum) benchmark::DoNotOptimize(s);
      best = std::max(best, 8.0 * kWords / (cpu_seconds() - start));
    }
    return best;
  }();
  return peak;
}

void report_flops(benchmark::State& state, const Ops& ops, double flop) {
  state.counters["GFLOP/s"] = benchmark::Counter(flop / 1e9, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["share"] =
      benchmark::Counter(flop / fma_peak(ops), benchmark::Counter::kIsIterationInvariantRate);
}

void report_bytes(benchmark::State& state, double bytes) {
  state.counters["GB/s"] = benchmark::Counter(bytes / 1e9, benchmark::Counter::kIsIterationInvariantRate);
}

// ---- Kernels
// -----------------------------------------------------------------------------------------------------

void bench_gemm(benchmark::State& state, const Ops& ops, int64_t k, bool half) {
  constexpr int64_t kSize = 64;
  const auto a = normal(kSize * k);
  const auto b = normal(k * kSize);
  const auto b_half = halves(ops, *b, k * kSize);
  Buffer<float> c(kSize * kSize);
  for (auto _ : state) {
    if (half) {
      ops.gemm_f16(kSize, kSize, k, a->get(), k, b_half->get(), kSize, c.get(), kSize, false);
    } else {
      ops.gemm(kSize, kSize, k, a->get(), k, b->get(), kSize, c.get(), kSize, false);
    }
    benchmark::ClobberMemory();
  }
  report_flops(state, ops, 2.0 * kSize * kSize * static_cast<double>(k));
}

/// n_tile tiles after each other: 4 stay in L2, 8192 (at least 128 MB) come from memory.
void bench_attend(benchmark::State& state, const Ops& ops, int64_t n_row, int64_t head_dim, bool half,
                  int64_t n_tile) {
  const int64_t tile = head_dim * kTile;
  const auto q = normal(n_row * head_dim, 1 / std::sqrt(static_cast<float>(head_dim)));
  const auto kv = normal(2 * tile);
  std::vector<float> rows(static_cast<size_t>(n_row * (head_dim + 2)));
  const SoftmaxRows softmax = {rows.data(), rows.data() + n_row, rows.data() + 2 * n_row};
  softmax_clear(softmax, n_row, head_dim);
  Buffer<float> all(half ? 1 : 2 * tile * n_tile);
  Buffer<f16_t> all_half(half ? 2 * tile * n_tile : 1);
  for (int64_t t = 0; t < n_tile; ++t) {
    if (half) {
      ops.f32_to_f16(kv->get(), all_half.get() + t * 2 * tile, 2 * tile);
    } else {
      std::copy(kv->get(), kv->get() + 2 * tile, all.get() + t * 2 * tile);
    }
  }
  int64_t t = 0;
  for (auto _ : state) {
    if (half) {
      const f16_t* at = all_half.get() + t * 2 * tile;
      ops.attend_f16(q->get(), n_row, head_dim, at, kTile, at + tile, head_dim, kTile, softmax);
    } else {
      const float* at = all.get() + t * 2 * tile;
      ops.attend_f32(q->get(), n_row, head_dim, at, kTile, at + tile, head_dim, kTile, softmax);
    }
    if (++t == n_tile) t = 0;
    benchmark::ClobberMemory();
  }
  report_flops(state, ops, 4.0 * static_cast<double>(n_row * tile));
  const double bytes = static_cast<double>(2 * tile) * (half ? 2 : 4);
  report_bytes(state, bytes);
  state.counters["of_read"] =
      benchmark::Counter(bytes / read_peak(), benchmark::Counter::kIsIterationInvariantRate);
}

void bench_select(benchmark::State& state, const Ops& ops, int64_t n, int64_t count) {
  const auto score = normal(n);
  std::vector<int32_t> index(static_cast<size_t>(count));
  Buffer<uint64_t> scratch(select_scratch_bytes(n) / 8 + 1);
  for (auto _ : state) {
    ops.select_top(score->get(), n, count, index.data(), scratch.get());
    benchmark::ClobberMemory();
  }
}

void bench_groups(benchmark::State& state, const Ops& ops, int bits, bool quantise) {
  constexpr int64_t kValues = 8192;
  const auto x = normal(kValues);
  std::vector<uint8_t> codes(static_cast<size_t>(kValues * bits / 8));
  std::vector<f16_t> params(2 * kValues / kGroup);
  Buffer<float> y(kValues);
  ops.quant_groups(x->get(), kValues, bits, codes.data(), params.data());
  for (auto _ : state) {
    if (quantise) {
      benchmark::DoNotOptimize(ops.quant_groups(x->get(), kValues, bits, codes.data(), params.data()));
    } else {
      ops.dequant_groups(codes.data(), params.data(), kValues, bits, y.get());
    }
    benchmark::ClobberMemory();
  }
  state.counters["values/ns"] =
      benchmark::Counter(static_cast<double>(kValues) / 1e9, benchmark::Counter::kIsIterationInvariantRate);
  report_bytes(state, static_cast<double>(kValues) * 4);  // of floats
}

void bench_convert(benchmark::State& state, const Ops& ops, bool to_half) {
  constexpr int64_t kValues = 8192;
  const auto x = normal(kValues);
  const auto half = halves(ops, *x, kValues);
  for (auto _ : state) {
    if (to_half) {
      ops.f32_to_f16(x->get(), half->get(), kValues);
    } else {
      ops.f16_to_f32(half->get(), x->get(), kValues);
    }
    benchmark::ClobberMemory();
  }
  report_bytes(state, static_cast<double>(kValues) * 4);
}

void bench_rope(benchmark::State& state, const Ops& ops, bool tile) {
  constexpr int64_t kDim = 64;
  const auto x = normal(kDim * kTile, 1e-3F);
  Buffer<float> cos(kDim / 2 * kTile);
  Buffer<float> sin(kDim / 2 * kTile);
  std::fill(cos.get(), cos.get() + kDim / 2 * kTile, 0.8F);
  std::fill(sin.get(), sin.get() + kDim / 2 * kTile, 0.6F);
  for (auto _ : state) {
    if (tile) {
      ops.rope_tile(x->get(), kTile, kTile, kDim, kDim, cos.get(), sin.get(), kTile);
    } else {
      ops.rope_rows(x->get(), kTile, kDim, kDim, cos.get(), sin.get(), kDim / 2, false, x->get());
    }
    benchmark::ClobberMemory();
  }
  report_bytes(state, static_cast<double>(kDim * kTile) * 4);
}

template <class Function>
void add(const Ops& ops, const std::string& name, Function function) {
  benchmark::RegisterBenchmark((std::string(ops.name) + "/" + name).c_str(),
                               [&ops, function](benchmark::State& state) { function(state, ops); });
}

void register_target(const Ops& ops) {
  using State = benchmark::State;
  for (const int64_t k : {24, 48, 64, 128}) {
    for (const bool half : {false, true}) {
      add(ops, (half ? "gemm_f16/64x64x" : "gemm/64x64x") + std::to_string(k),
          [=](State& state, const Ops& table) { bench_gemm(state, table, k, half); });
    }
  }
  struct Group {
    int64_t n_row, head_dim;
  };
  for (const Group g : {Group{1, 64}, Group{3, 64}, Group{7, 64}, Group{8, 64}, Group{4, 128}}) {
    const std::string shape = std::to_string(g.n_row) + "x" + std::to_string(g.head_dim);
    for (const bool half : {false, true}) {
      add(ops, (half ? "attend_f16/" : "attend_f32/") + shape,
          [=](State& state, const Ops& table) { bench_attend(state, table, g.n_row, g.head_dim, half, 4); });
    }
    add(ops, "attend_f16_cold/" + shape,
        [=](State& state, const Ops& table) { bench_attend(state, table, g.n_row, g.head_dim, true, 8192); });
  }
  for (const int64_t n : {8192, 32768}) {
    add(ops, "select_top/" + std::to_string(n) + "/512",
        [=](State& state, const Ops& table) { bench_select(state, table, n, 512); });
  }
  for (const int bits : {2, 4}) {
    add(ops, "dequant_groups/" + std::to_string(bits),
        [=](State& state, const Ops& table) { bench_groups(state, table, bits, false); });
    add(ops, "quant_groups/" + std::to_string(bits),
        [=](State& state, const Ops& table) { bench_groups(state, table, bits, true); });
  }
  add(ops, "f32_to_f16/8192", [](State& state, const Ops& table) { bench_convert(state, table, true); });
  add(ops, "f16_to_f32/8192", [](State& state, const Ops& table) { bench_convert(state, table, false); });
  add(ops, "rope_rows/64x64", [](State& state, const Ops& table) { bench_rope(state, table, false); });
  add(ops, "rope_tile/64x64", [](State& state, const Ops& table) { bench_rope(state, table, true); });
}

}  // namespace
}  // namespace narrows::kernels

int main(int argc, char** argv) {
  using namespace narrows::kernels;
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  for (const Ops* table : available_targets()) {
    if (std::string(table->name) == "ref") continue;  // an oracle: its speed is nobody's concern
    std::printf("FMA peak %-8s %7.1f GFLOP/s\n", table->name, fma_peak(*table) / 1e9);
    register_target(*table);
  }
  std::printf("memory reading    %7.1f GB/s\n", read_peak() / 1e9);
  std::fflush(stdout);
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
