// Threads each multiply rows of their own with oneDNN primitives made for one thread: oneDNN decides on
// creation how many threads will execute, and would start a team of its own otherwise.
#include "exec/cpu/loaded_layer.h"

#include <fmt/format.h>
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <dnnl.hpp>
#include <map>
#include <tuple>

#include "base/aligned.h"
#include "base/guarded.h"
#include "kernels/ops.h"

namespace narrows {

namespace {

using dnnl::memory;

/// Outputs that one task of unpacking takes: a multiple of every width in which oneDNN blocks a weight (8 to
/// 64).
constexpr int64_t kPanel = 192;
/// Of these at once as float32.
constexpr int64_t kUnpackRows = 16;

/// oneDNN primitives made or run meanwhile on this thread start no team.
class OneThread {
 public:
  OneThread() : before_(omp_get_max_threads()) { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before_); }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_;
};

std::vector<const Matrix*> matrices_of(const LayerPlan& layer) {
  std::vector<const Matrix*> all;
  for (const LinearOp& l : layer.project.linears) all.push_back(l.w);
  all.push_back(layer.out.w);
  for (const LinearOp& l : layer.ffn.linears) all.push_back(l.w);
  if (layer.down.w != nullptr) all.push_back(layer.down.w);
  return all;
}

bool is_float(const Matrix& w) { return w.type == TensorType::f32 || !LoadedLayer::has_bf16(); }
memory::data_type format_of(const Matrix& w) {
  return is_float(w) ? memory::data_type::f32 : memory::data_type::bf16;
}
int64_t item_bytes(const Matrix& w) { return is_float(w) ? 4 : 2; }

/// oneDNN has products of float32 of its own from here on; below, and on other CPUs, they are plain loops.
bool has_fast_floats() {
#if defined(__x86_64__)
  return dnnl::get_effective_cpu_isa() >= dnnl::cpu_isa::avx2;
#else
  return false;
#endif
}

Status failure(const std::exception& e, const char* what) {
  const auto* of_dnnl = dynamic_cast<const dnnl::error*>(&e);
  if (of_dnnl != nullptr && of_dnnl->status != dnnl_out_of_memory)
    return {StatusCode::internal, fmt::format("oneDNN could not {}: {}", what, e.what())};
  return {StatusCode::out_of_memory, fmt::format("no memory to {}", what)};
}

}  // namespace

struct LoadedLayer::Impl {
  /// A weight of the loaded layer, [n_in, n_out].
  struct Loaded {
    const Matrix* w = nullptr;
    memory packed;
    memory::desc layout;
    int64_t room = 0;  ///< bytes of packed
  };

  using Shape = std::tuple<memory::data_type, int64_t, int64_t, int64_t>;  ///< rows, n_in, n_out
  static Shape shape_of(const Matrix& w, int64_t m) { return {format_of(w), m, w.n_in, w.n_out}; }

  /// A product of m rows, by one thread.
  struct Product {
    dnnl::matmul primitive;
    memory::desc source, weights, result, scratchpad;
  };

  struct Thread {
    dnnl::stream stream;
    AlignedArray<uint16_t> rows;  ///< [kBlock, n_in at most], bfloat16
    AlignedArray<char> scratchpad;
    std::vector<float> floats;    ///< [kUnpackRows or kPanel, n_in]
    std::vector<uint16_t> panel;  ///< [kPanel, n_in], bfloat16
  };

  explicit Impl(Workers& w) : workers(w), engine(dnnl::engine::kind::cpu, 0) {
    for (int i = 0; i < workers.n_threads(); ++i) threads.push_back({dnnl::stream(engine), {}, {}, {}, {}});
  }

  /// Made if it is new. Throws dnnl::error.
  const Product& product(const Matrix& w, int64_t m) {
    const Shape key = shape_of(w, m);
    if (const auto found = products.find(key); found != products.end()) return found->second;
    memory::desc layout({w.n_in, w.n_out}, format_of(w), memory::format_tag::any);
    // All row counts read one layout, that of full blocks.
    if (m != kBlock) layout = product(w, kBlock).weights;
    const OneThread one;
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    Product p;
    p.source = memory::desc({m, w.n_in}, format_of(w), memory::format_tag::ab);
    p.result = memory::desc({m, w.n_out}, memory::data_type::f32, memory::format_tag::ab);
    const dnnl::matmul::primitive_desc description(dnnl::matmul::desc(p.source, layout, p.result), attributes,
                                                   engine);
    p.weights = description.weights_desc();
    p.scratchpad = description.scratchpad_desc();
    p.primitive = dnnl::matmul(description);
    return products.emplace(key, std::move(p)).first->second;
  }

  void prepare(int64_t m) {
    for (const Loaded& l : loaded) {
      if (l.w == nullptr) continue;
      const auto bytes = static_cast<int64_t>(product(*l.w, m).scratchpad.get_size());
      for (Thread& t : threads) {
        if (t.scratchpad.size() < bytes) t.scratchpad = AlignedArray<char>(bytes);
        if (t.rows.size() < kBlock * l.w->n_in) t.rows = AlignedArray<uint16_t>(kBlock * l.w->n_in);
        if ((bytes > 0 && !t.scratchpad.ok()) || !t.rows.ok()) throw std::bad_alloc();
      }
    }
  }

  void multiply(const Loaded& l, const float* x, int64_t m, float* y, Thread& t) {
    const Product& p = products.at(shape_of(*l.w, m));
    void* source = const_cast<float*>(x);
    if (!is_float(*l.w)) {
      to_bf16(x, t.rows.data(), m * l.w->n_in);
      source = t.rows.data();
    }
    const OneThread one;
    p.primitive.execute(t.stream, {{DNNL_ARG_SRC, memory(p.source, engine, source)},
                                   {DNNL_ARG_WEIGHTS, l.packed},
                                   {DNNL_ARG_DST, memory(p.result, engine, y)},
                                   {DNNL_ARG_SCRATCHPAD, memory(p.scratchpad, engine, t.scratchpad.data())}});
  }

  /// Outputs [first, first + n) of a matrix: rows of the file are columns of the product.
  void unpack(const Loaded& l, int64_t first, int64_t n, Thread& t) {
    const Matrix& w = *l.w;
    const auto count = static_cast<size_t>(kPanel * w.n_in);
    void* plain = nullptr;
    memory::desc layout({w.n_in, n}, format_of(w), memory::format_tag::ba);
    if (is_float(w)) {
      if (t.floats.size() < count) t.floats.resize(count);
      w.unpack(first, n, t.floats.data());
      plain = t.floats.data();
    } else if (w.tiles) {
      // Tiles come as [n_in, outputs], the last may have more than there are.
      const int64_t ld = (n + kernels::kPackRows - 1) / kernels::kPackRows * kernels::kPackRows;
      if (t.panel.size() < count) t.panel.resize(count);
      for (int64_t c = 0; c < ld; c += kernels::kPackRows)
        kernels::ops().unpack_tile(*w.tiles, (first + c) / kernels::kPackRows, t.panel.data() + c, ld);
      plain = t.panel.data();
      layout = memory::desc({w.n_in, n}, format_of(w), memory::dims{ld, 1});
    } else {
      if (t.panel.size() < count) t.panel.resize(count);
      if (t.floats.size() < static_cast<size_t>(kUnpackRows * w.n_in))
        t.floats.resize(static_cast<size_t>(kUnpackRows * w.n_in));
      for (int64_t r = 0; r < n; r += kUnpackRows) {
        const int64_t rows = std::min(kUnpackRows, n - r);
        w.unpack(first + r, rows, t.floats.data());
        to_bf16(t.floats.data(), t.panel.data() + r * w.n_in, rows * w.n_in);
      }
      plain = t.panel.data();
    }
    const OneThread one;
    memory from(layout, engine, plain);
    memory to(l.layout.submemory_desc({w.n_in, n}, {0, first}), engine, l.packed.get_data_handle());
    dnnl::reorder(from, to).execute(t.stream, from, to);
    t.stream.wait();
  }

  /// Layouts and memory of a layer's matrices.
  void lay_out(const std::vector<const Matrix*>& all) {
    loaded.resize(std::max(loaded.size(), all.size()));
    for (Loaded& l : loaded) l.w = nullptr;
    for (size_t i = 0; i < all.size(); ++i) {
      Loaded& l = loaded[i];
      const memory::desc& layout = product(*all[i], kBlock).weights;
      const auto bytes = static_cast<int64_t>(layout.get_size());
      if (l.room < bytes || l.layout != layout) {
        l.packed = memory(layout, engine);
        // What pads blocks at the ends is never written again.
        std::memset(l.packed.get_data_handle(), 0, static_cast<size_t>(bytes));
        l.room = bytes;
        l.layout = layout;
      }
      l.w = all[i];
    }
  }

  Workers& workers;
  dnnl::engine engine;
  std::vector<Thread> threads;
  std::map<Shape, Product> products;
  std::vector<Loaded> loaded;  ///< of the loaded layer; their memory is used again for the next one
  int64_t layer = -1;
};

bool LoadedLayer::has_bf16() {
  const dnnl::cpu_isa isa = dnnl::get_effective_cpu_isa();
  return isa == dnnl::cpu_isa::avx512_core_bf16 || isa == dnnl::cpu_isa::avx512_core_amx;
}

bool LoadedLayer::supports(const LayerPlan& layer) {
  const std::vector<const Matrix*> all = matrices_of(layer);
  return std::all_of(all.begin(), all.end(), [](const Matrix* w) {
    if (w->type != TensorType::f32 && has_bf16()) return true;
    // Without bfloat16, tiles multiply faster than their floats.
    return !w->tiles && has_fast_floats();
  });
}

int64_t LoadedLayer::bytes_needed(const LayerPlan& layer, int n_threads) {
  int64_t bytes = 0, widest = 0;
  for (const Matrix* w : matrices_of(layer)) {
    bytes += w->n_in * (w->n_out + kPanel) * item_bytes(*w);
    widest = std::max(widest, w->n_in);
  }
  return bytes + n_threads * widest * (2 * (kBlock + kPanel) + 4 * kUnpackRows);
}

LoadedLayer::LoadedLayer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
LoadedLayer::~LoadedLayer() = default;

Result<std::unique_ptr<LoadedLayer>> LoadedLayer::create(Workers& workers) {
  try {
    return std::unique_ptr<LoadedLayer>(new LoadedLayer(std::make_unique<Impl>(workers)));
  } catch (const std::exception& e) {
    return failure(e, "start");
  }
}

bool LoadedLayer::holds(const LayerPlan& layer) const { return impl_->layer == layer.index; }

Status LoadedLayer::load(const LayerPlan& layer) {
  Impl& m = *impl_;
  constexpr const char* kWhat = "unpack a layer's weights";
  try {
    m.layer = -1;
    m.lay_out(matrices_of(layer));
    struct Task {
      const Impl::Loaded* of;
      int64_t first, n;
    };
    std::vector<Task> tasks;
    for (const Impl::Loaded& l : m.loaded) {
      for (int64_t r = 0; l.w != nullptr && r < l.w->n_out; r += kPanel)
        tasks.push_back({&l, r, std::min(kPanel, l.w->n_out - r)});
    }
    m.workers.for_each_thread(static_cast<int64_t>(tasks.size()), [&](int64_t i, int ith) {
      const Task& t = tasks[static_cast<size_t>(i)];
      m.unpack(*t.of, t.first, t.n, m.threads[static_cast<size_t>(ith)]);
    });
    m.layer = layer.index;
    return {};
  } catch (const std::exception& e) {
    return failure(e, kWhat);
  }
}

Status LoadedLayer::prepare(int64_t m, int64_t rest) {
  try {
    for (const int64_t rows : {m, rest}) {
      if (rows > 0) impl_->prepare(rows);
    }
    return {};
  } catch (const std::exception& e) {
    return failure(e, "prepare a product");
  }
}

Status LoadedLayer::multiply(const Matrix& w, const float* x, int64_t m, float* y, int ith) {
  try {
    for (const Impl::Loaded& l : impl_->loaded) {
      if (l.w != &w) continue;
      impl_->multiply(l, x, m, y, impl_->threads[static_cast<size_t>(ith)]);
      return {};
    }
    return {StatusCode::internal, "a product with weights that are not loaded"};
  } catch (const std::exception& e) {
    return failure(e, "multiply");
  }
}

}  // namespace narrows
