// Threads of a ggml graph each multiply rows of their own with oneDNN primitives made for one thread: oneDNN
// decides on creation how many threads will execute, and inside ggml's parallel region there is one.
#include "prefill/bf16_products.h"

#include <fmt/format.h>
#include <omp.h>

#include <algorithm>
#include <dnnl.hpp>
#include <map>
#include <tuple>

#include "base/aligned.h"
#include "base/guarded.h"

namespace narrows {

namespace {

using dnnl::memory;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Rows that one product takes: its activations and results stay in the L2 cache beside a panel of weights.
constexpr int64_t kBlock = 256;
/// Rows of a weight that one task of unpacking takes.
constexpr int64_t kUnpackRows = 32;

constexpr auto kBf16 = memory::data_type::bf16;
constexpr auto kF32 = memory::data_type::f32;

/// oneDNN primitives made meanwhile execute on n threads.
class OmpThreads {
 public:
  explicit OmpThreads(int n) : before_(omp_get_max_threads()) { omp_set_num_threads(n); }
  ~OmpThreads() { omp_set_num_threads(before_); }
  OmpThreads(const OmpThreads&) = delete;
  OmpThreads& operator=(const OmpThreads&) = delete;

 private:
  int before_;
};

std::vector<ggml_tensor*> matrices_of(const LayerWeights& w) {
  std::vector<ggml_tensor*> all;
  for (ggml_tensor* t : {w.wqkv, w.wq, w.wk, w.wv, w.wo, w.gate_up, w.gate, w.up, w.down}) {
    if (t != nullptr && t->type != GGML_TYPE_F32) all.push_back(t);
  }
  return all;
}

}  // namespace

struct Bf16Products::Impl {
  /// A weight of the loaded layer, [n_in, n_out].
  struct Matrix {
    Impl* owner = nullptr;
    ggml_tensor* weight = nullptr;
    int64_t n_in = 0;
    int64_t n_out = 0;
    memory packed;
    int64_t room = 0;  ///< bytes of packed
  };

  /// A product of m rows, by one thread.
  struct Product {
    dnnl::matmul primitive;
    memory::desc source, weights, result, scratchpad;
  };

  struct Thread {
    dnnl::stream stream;
    AlignedArray<ggml_bf16_t> rows;  ///< [kBlock, n_in at most]
    AlignedArray<char> scratchpad;
    std::vector<float> unpacked;
  };

  Impl(const ModelWeights& w, GraphRunner& r, Products& o)
      : weights(w), runner(r), otherwise(o), engine(dnnl::engine::kind::cpu, 0) {
    for (int i = 0; i < runner.n_threads(); ++i) threads.push_back({dnnl::stream(engine), {}, {}, {}});
  }

  /// The product of m rows with a matrix of this shape; made if it is new. Throws dnnl::error.
  const Product& product(int64_t m, int64_t n_in, int64_t n_out) {
    const auto key = std::make_tuple(m, n_in, n_out);
    const auto found = products.find(key);
    if (found != products.end()) return found->second;
    memory::desc weight_layout({n_in, n_out}, kBf16, memory::format_tag::any);
    // All row counts read one layout, that of full blocks.
    if (m != kBlock) weight_layout = product(kBlock, n_in, n_out).weights;
    const OmpThreads one(1);
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    Product p;
    p.source = memory::desc({m, n_in}, kBf16, memory::format_tag::ab);
    p.result = memory::desc({m, n_out}, kF32, memory::format_tag::ab);
    const dnnl::matmul::primitive_desc description(dnnl::matmul::desc(p.source, weight_layout, p.result),
                                                   attributes, engine);
    p.weights = description.weights_desc();
    p.scratchpad = description.scratchpad_desc();
    p.primitive = dnnl::matmul(description);
    return products.emplace(key, std::move(p)).first->second;
  }

  /// Rows of a block: as many blocks as threads, or a multiple of that.
  int64_t block_rows(int64_t n) const {
    const int64_t nth = runner.n_threads();
    return ceil_div(n, nth * ceil_div(n, nth * kBlock));
  }

  /// Makes the products that a chunk of n rows takes, and room for them in every thread.
  bool prepare(int64_t n, const Matrix& m) {
    const int64_t block = block_rows(n);
    for (const int64_t rows : {block, n % block}) {
      if (rows == 0) continue;
      const auto bytes = static_cast<int64_t>(product(rows, m.n_in, m.n_out).scratchpad.get_size());
      for (Thread& t : threads) {
        if (t.scratchpad.size() < bytes) t.scratchpad = AlignedArray<char>(bytes);
        if (t.rows.size() < kBlock * m.n_in) t.rows = AlignedArray<ggml_bf16_t>(kBlock * m.n_in);
        if ((bytes > 0 && !t.scratchpad.ok()) || !t.rows.ok()) return false;
      }
    }
    return true;
  }

  bool prepare_or_fail(int64_t n, const Matrix& m) {
    bool prepared = false;
    error.run("a product in bfloat16", [&]() -> Status {
      prepared = prepare(n, m);
      if (prepared) return {};
      return {StatusCode::out_of_memory, "no memory for a product in bfloat16"};
    });
    return prepared;
  }

  /// dst [n_out, n] = weight x src[0] [n_in, n].
  static void run(ggml_tensor* dst, int ith, int nth, void* userdata) {
    const Matrix& m = *static_cast<const Matrix*>(userdata);
    Impl& self = *m.owner;
    const auto* x = static_cast<const float*>(dst->src[0]->data);
    auto* y = static_cast<float*>(dst->data);
    Thread& t = self.threads[static_cast<size_t>(ith)];
    const int64_t n = dst->ne[1], block = self.block_rows(n);
    self.error.run("a product in bfloat16", [&] {
      for (int64_t r = ith * block; r < n; r += nth * block) {
        const int64_t rows = std::min(block, n - r);
        ggml_cpu_fp32_to_bf16(x + r * m.n_in, t.rows.data(), rows * m.n_in);
        const Product& p = self.products.at(std::make_tuple(rows, m.n_in, m.n_out));
        p.primitive.execute(t.stream,
                            {{DNNL_ARG_SRC, memory(p.source, self.engine, t.rows.data())},
                             {DNNL_ARG_WEIGHTS, m.packed},
                             {DNNL_ARG_DST, memory(p.result, self.engine, y + r * m.n_out)},
                             {DNNL_ARG_SCRATCHPAD, memory(p.scratchpad, self.engine, t.scratchpad.data())}});
      }
    });
  }

  /// Tasks of kUnpackRows rows of `unpacking` into `plain`.
  static void unpack(ggml_tensor* /*dst*/, int ith, int /*nth*/, void* userdata) {
    Impl& self = *static_cast<Impl*>(userdata);
    self.error.run("a layer's weights in bfloat16", [&] { return self.unpack_rows(ith); });
  }
  Status unpack_rows(int ith) {
    const Matrix& m = *unpacking;
    std::vector<float>& floats = threads[static_cast<size_t>(ith)].unpacked;
    for (int64_t r = next_row.fetch_add(kUnpackRows); r < m.n_out; r = next_row.fetch_add(kUnpackRows)) {
      const int64_t n = std::min(kUnpackRows, m.n_out - r);
      if (Status s = weights.read_rows(m.weight, r, n, floats.data()); !s.ok()) return s;
      ggml_cpu_fp32_to_bf16(floats.data(), plain.data() + r * m.n_in, n * m.n_in);
    }
    return {};
  }

  Status run_unpack(Matrix& m) {
    for (Thread& t : threads) t.unpacked.resize(static_cast<size_t>(kUnpackRows * m.n_in));
    unpacking = &m;
    next_row = 0;
    const size_t bytes = ggml_tensor_overhead() * 4 + ggml_graph_overhead_custom(4, false);
    graph_memory.resize(bytes);
    const std::unique_ptr<ggml_context, void (*)(ggml_context*)> owner(
        ggml_init({bytes, graph_memory.data(), true}), ggml_free);
    ggml_context* const ctx = owner.get();
    ggml_tensor* nothing = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 1);
    ggml_cgraph* graph = ggml_new_graph_custom(ctx, 4, false);
    ggml_tensor* op =
        ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, &nothing, 1, &Impl::unpack, GGML_N_TASKS_MAX, this);
    float cell[2] = {};
    nothing->data = &cell[0];
    op->data = &cell[1];
    ggml_build_forward_expand(graph, op);
    if (Status s = runner.run(graph); !s.ok()) return s;
    return error.take();
  }

  Status load(int64_t layer) {
    const std::vector<ggml_tensor*> all = matrices_of(weights.layer(layer));
    matrices.resize(std::max(matrices.size(), all.size()));
    for (Matrix& m : matrices) m.weight = nullptr;
    for (size_t i = 0; i < all.size(); ++i) {
      Matrix& m = matrices[i];
      m.owner = this;
      m.n_in = all[i]->ne[0];
      m.n_out = all[i]->ne[1];
      m.weight = all[i];
      if (plain.size() < m.n_in * m.n_out) plain = AlignedArray<ggml_bf16_t>(m.n_in * m.n_out);
      if (!plain.ok()) return {StatusCode::out_of_memory, "no memory for a layer's weights in bfloat16"};
      if (Status s = run_unpack(m); !s.ok()) return s;
      const memory::desc& layout = product(kBlock, m.n_in, m.n_out).weights;
      const auto bytes = static_cast<int64_t>(layout.get_size());
      if (m.room < bytes || m.packed.get_desc() != layout) {
        m.packed = memory(layout, engine);
        m.room = bytes;
      }
      const OmpThreads many(runner.n_threads());
      // Rows of the file are columns of the product.
      memory rows({{m.n_in, m.n_out}, kBf16, memory::format_tag::ba}, engine, plain.data());
      dnnl::reorder(rows, m.packed).execute(threads.front().stream, rows, m.packed);
      threads.front().stream.wait();
    }
    return {};
  }

  const ModelWeights& weights;
  GraphRunner& runner;
  Products& otherwise;
  dnnl::engine engine;
  std::vector<Thread> threads;
  std::map<std::tuple<int64_t, int64_t, int64_t>, Product> products;  ///< by rows, n_in, n_out
  std::vector<Matrix> matrices;     ///< of the loaded layer; their memory is used again for the next one
  AlignedArray<ggml_bf16_t> plain;  ///< [n_out, n_in] of the weight that is being loaded
  const Matrix* unpacking = nullptr;
  std::atomic<int64_t> next_row{0};
  mutable FirstError error;  ///< of ops on ggml's threads, and of products that could not be made
  std::vector<uint8_t> graph_memory;
};

bool Bf16Products::supported() {
  const dnnl::cpu_isa isa = dnnl::get_effective_cpu_isa();
  return isa == dnnl::cpu_isa::avx512_core_bf16 || isa == dnnl::cpu_isa::avx512_core_amx;
}

bool Bf16Products::applies(const ModelWeights& weights) { return !matrices_of(weights.layer(0)).empty(); }

int64_t Bf16Products::bytes_needed(const ModelWeights& weights, int n_threads) {
  int64_t packed = 0, largest = 0, widest = 0;
  for (const ggml_tensor* t : matrices_of(weights.layer(0))) {
    packed += t->ne[0] * t->ne[1];
    largest = std::max(largest, t->ne[0] * t->ne[1]);
    widest = std::max(widest, t->ne[0]);
  }
  return (packed + largest) * int64_t{sizeof(ggml_bf16_t)} +
         n_threads * widest * (kBlock * int64_t{sizeof(ggml_bf16_t)} + kUnpackRows * int64_t{sizeof(float)});
}

Bf16Products::Bf16Products(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Result<std::unique_ptr<Bf16Products>> Bf16Products::create(const ModelWeights& weights, GraphRunner& runner,
                                                           Products& otherwise) {
  try {
    return std::unique_ptr<Bf16Products>(
        new Bf16Products(std::make_unique<Impl>(weights, runner, otherwise)));
  } catch (const dnnl::error& e) {
    return Status(StatusCode::internal, fmt::format("oneDNN does not start: {}", e.what()));
  }
}

Bf16Products::~Bf16Products() = default;

Status Bf16Products::load(int64_t layer) {
  try {
    return impl_->load(layer);
  } catch (const dnnl::error& e) {
    if (e.status == dnnl_out_of_memory)
      return {StatusCode::out_of_memory, "no memory for a layer's weights in bfloat16"};
    return {StatusCode::internal, fmt::format("oneDNN could not unpack a layer: {}", e.what())};
  } catch (const std::bad_alloc&) {
    return {StatusCode::out_of_memory, "no memory for a layer's weights in bfloat16"};
  }
}

ggml_tensor* Bf16Products::multiply(ggml_context* ctx, ggml_tensor* weight, ggml_tensor* x) {
  for (Impl::Matrix& m : impl_->matrices) {
    if (m.weight != weight || !ggml_is_contiguous(x) || x->type != GGML_TYPE_F32) continue;
    const bool prepared = impl_->prepare_or_fail(x->ne[1], m);
    if (!prepared) break;  // status() says why; the graph is not run
    return ggml_custom_4d(ctx, GGML_TYPE_F32, m.n_out, x->ne[1], 1, 1, &x, 1, &Impl::run, GGML_N_TASKS_MAX,
                          &m);
  }
  return impl_->otherwise.multiply(ctx, weight, x);
}

Status Bf16Products::status() const { return impl_->error.take(); }

}  // namespace narrows
