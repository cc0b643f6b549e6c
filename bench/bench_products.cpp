// Matrix-vector products with weights of each GGUF type that are too large for any cache: our packed tiles
// beside ggml's mul_mat (out of its interleaved buffer where it has one). GB/s are bytes of the file a
// second.
//
//   build/bench/bench_products --benchmark_filter='/1$' --benchmark_repetitions=5
//
// Names end in the rows of inputs and the threads. A busy machine makes all of them slower.
#include <benchmark/benchmark.h>

#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/page_array.h"
#include "base/thread_pool.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "kernels/half.h"
#include "kernels/ops.h"
#include "kernels/pack_weights.h"

namespace narrows {
namespace {

using kernels::kPackRows;
using kernels::Packing;

struct Type {
  ggml_type type;
  Packing packing;
  int64_t n_in;
};
/// Inputs as the models of the README have them.
constexpr Type kTypes[] = {
    {GGML_TYPE_Q4_0, Packing::q4_0, 896},  {GGML_TYPE_Q4_1, Packing::q4_1, 576},
    {GGML_TYPE_Q5_0, Packing::q5_0, 896},  {GGML_TYPE_Q5_1, Packing::q5_1, 896},
    {GGML_TYPE_Q8_0, Packing::q8_0, 896},  {GGML_TYPE_Q4_K, Packing::q4_k, 4864},
    {GGML_TYPE_Q5_K, Packing::q5_k, 4864}, {GGML_TYPE_Q6_K, Packing::q6_k, 4864},
};

/// Rows of a matrix of about 200 MB: several times the largest cache.
int64_t rows_of(const Type& t) {
  return (int64_t{200} << 20) / kernels::file_row_bytes(t.packing, t.n_in) / 64 * 64;
}

/// Random codes, scales of a few thousandths.
std::vector<uint8_t> random_file(const Type& t) {
  const int64_t row = kernels::file_row_bytes(t.packing, t.n_in),
                block = kernels::file_row_bytes(t.packing, kernels::inputs_at_once(t.packing));
  std::vector<uint8_t> file(static_cast<size_t>(rows_of(t) * row));
  std::mt19937_64 random(1);
  for (size_t i = 0; i + 8 <= file.size(); i += 8) {
    const uint64_t word = random();
    std::memcpy(file.data() + i, &word, 8);
  }
  const kernels::f16_t small = kernels::float_to_half(0.004F);
  for (size_t at = 0; at < file.size(); at += static_cast<size_t>(block)) {
    std::memcpy(file.data() + at + (t.packing == Packing::q6_k ? 208 : 0), &small, 2);
    if (kernels::has_minimum(t.packing)) std::memcpy(file.data() + at + 2, &small, 2);
  }
  return file;
}

void report(benchmark::State& state, const Type& t, int64_t n_row) {
  const auto bytes = static_cast<double>(rows_of(t) * kernels::file_row_bytes(t.packing, t.n_in));
  state.counters["GB/s"] = benchmark::Counter(bytes / 1e9, benchmark::Counter::kIsIterationInvariantRate);
  const auto op = 2.0 * static_cast<double>(rows_of(t) * t.n_in * n_row);
  state.counters["GOP/s"] = benchmark::Counter(op / 1e9, benchmark::Counter::kIsIterationInvariantRate);
}

struct Ours {
  const kernels::Ops* ops;
  kernels::PackedMatrix matrix;
  kernels::ByteRows x;
  std::vector<float> y;
  int64_t n_row;

  static void run(void* context, int ith, int n_threads) {
    Ours& o = *static_cast<Ours*>(context);
    const int64_t n = kernels::pack_tiles(o.matrix.n_out), first = n * ith / n_threads,
                  end = n * (ith + 1) / n_threads;
    o.ops->packed_product(o.matrix, first, end - first, o.x, o.n_row, o.y.data(), o.matrix.n_out, false);
  }
};

void bench_ours(benchmark::State& state, const kernels::Ops& ops, const Type& t, int64_t n_row,
                int n_threads) {
  const std::vector<uint8_t> file = random_file(t);
  const int64_t n_out = rows_of(t), row = kernels::file_row_bytes(t.packing, t.n_in),
                tile = kernels::tile_bytes(t.packing, t.n_in);
  PageArray tiles(kernels::pack_tiles(n_out) * tile);
  for (int64_t i = 0; i < kernels::pack_tiles(n_out); ++i) {
    const uint8_t* rows[kPackRows];
    for (int64_t r = 0; r < kPackRows; ++r) rows[r] = file.data() + (i * kPackRows + r) * row;
    kernels::pack_tile(t.packing, t.n_in, rows, tiles.data() + i * tile);
  }
  const auto n = static_cast<size_t>(n_row * t.n_in);
  std::vector<float> x(n);
  for (size_t i = 0; i < n; ++i) x[i] = static_cast<float>(i % 37) - 18;
  std::vector<int8_t> code(n);
  std::vector<float> scale(n / 32), total(n / 32);
  std::vector<int32_t> minus(n / 32), minus_half(n / 16);
  Ours ours{&ops,
            {t.packing, t.n_in, n_out, tiles.data()},
            {code.data(), scale.data(), total.data(), minus.data(), minus_half.data()},
            std::vector<float>(static_cast<size_t>(n_out * n_row)),
            n_row};
  ops.round_rows(x.data(), t.n_in, n_row, t.n_in, ours.x);
  auto pool = ThreadPool::create(n_threads);
  for (auto _ : state) (*pool)->run(&Ours::run, &ours);
  report(state, t, n_row);
}

void bench_ggml(benchmark::State& state, const Type& t, int64_t n_row, int n_threads) {
  const std::vector<uint8_t> file = random_file(t);
  ggml_context* ctx = ggml_init({ggml_tensor_overhead() * 8 + ggml_graph_overhead(), nullptr, true});
  ggml_context* weights = ggml_init({ggml_tensor_overhead() * 8, nullptr, true});
  ggml_tensor* w = ggml_new_tensor_2d(weights, t.type, t.n_in, rows_of(t));
  ggml_tensor* x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, t.n_in, n_row);
  ggml_tensor* y = ggml_mul_mat(ctx, w, x);
  ggml_cgraph* graph = ggml_new_graph(ctx);
  ggml_build_forward_expand(graph, y);
  ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  ggml_backend_buffer_t buffer = nullptr;
  auto get = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(ggml_backend_reg_get_proc_address(
      ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
  for (auto* type = get(device); type != nullptr && *type != nullptr && buffer == nullptr; ++type) {
    w->buffer = ggml_backend_buft_alloc_buffer(*type, 0);
    const bool takes = ggml_backend_dev_supports_op(device, y);
    ggml_backend_buffer_free(w->buffer);
    w->buffer = nullptr;
    if (takes) buffer = ggml_backend_alloc_ctx_tensors_from_buft(weights, *type);
  }
  if (buffer == nullptr)
    buffer = ggml_backend_alloc_ctx_tensors_from_buft(weights, ggml_backend_cpu_buffer_type());
  ggml_backend_tensor_set(w, file.data(), 0, file.size());
  ggml_backend_buffer_t rest = ggml_backend_alloc_ctx_tensors_from_buft(ctx, ggml_backend_cpu_buffer_type());
  std::vector<float> input(static_cast<size_t>(t.n_in * n_row));
  for (size_t i = 0; i < input.size(); ++i) input[i] = static_cast<float>(i % 37) - 18;
  ggml_backend_tensor_set(x, input.data(), 0, input.size() * sizeof(float));
  ggml_cplan plan = ggml_graph_plan(graph, n_threads, nullptr);
  std::vector<uint8_t> work(plan.work_size);
  plan.work_data = work.data();
  for (auto _ : state) ggml_graph_compute(graph, &plan);
  report(state, t, n_row);
  ggml_backend_buffer_free(buffer);
  ggml_backend_buffer_free(rest);
  ggml_free(weights);
  ggml_free(ctx);
}

}  // namespace
}  // namespace narrows

int main(int argc, char** argv) {
  using namespace narrows;
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  for (const Type& t : kTypes) {
    for (const int64_t n_row : {1, 4, 8, 16, 64}) {
      for (const int n_threads : {1, 2}) {
        const std::string rest = std::string(ggml_type_name(t.type)) + "/" + std::to_string(n_row) + "/" +
                                 std::to_string(n_threads);
        const auto set = [](benchmark::internal::Benchmark* b) {
          b->UseRealTime()->Unit(benchmark::kMillisecond);
        };
        for (const kernels::Ops* ops : kernels::available_targets()) {
          if (std::string(ops->name) == "ref") continue;
          set(benchmark::RegisterBenchmark((std::string(ops->name) + "/" + rest).c_str(),
                                           [&t, ops, n_row, n_threads](benchmark::State& state) {
                                             bench_ours(state, *ops, t, n_row, n_threads);
                                           }));
        }
        set(benchmark::RegisterBenchmark(
            ("ggml/" + rest).c_str(),
            [&t, n_row, n_threads](benchmark::State& state) { bench_ggml(state, t, n_row, n_threads); }));
      }
    }
  }
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
