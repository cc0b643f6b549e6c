#include "exec/cuda/cuda_weights.h"

#include <fmt/format.h>

namespace narrows {

namespace {

constexpr int64_t kAlign = 256;
/// Left free beside the weights, at least: for a cache and the activations of a step.
constexpr int64_t kMargin = int64_t{256} << 20;

int64_t data_bytes(const Matrix& m) {
  if (!m.tiles) return m.n_out * m.row_bytes();
  return kernels::pack_tiles(m.n_out) * kernels::tile_bytes(m.tiles->packing, m.n_in);
}

int32_t form_of(const Matrix& m) {
  // Codes of a table are not unpacked there yet.
  if (m.tiles) return kernels::has_table(m.tiles->packing) ? -1 : static_cast<int32_t>(m.tiles->packing);
  switch (m.type) {
    case TensorType::f32:
      return device::kRowsF32;
    case TensorType::f16:
      return device::kRowsF16;
    case TensorType::bf16:
      return device::kRowsBf16;
    default:
      return -1;
  }
}

Status check(const Matrix& m) {
  if (form_of(m) >= 0 && m.n_in % 32 == 0) return {};
  return {StatusCode::unsupported,
          fmt::format("tensor {} is of type {} in rows of {}, which the GPU does not multiply by; take "
                      "--device cpu",
                      m.name, type_name(m.type), m.n_in)};
}

Status check(const LayerPlan& layer) {
  if (layer.experts)
    return {StatusCode::unsupported,
            fmt::format("layer {} has experts, which the GPU does not compute yet; take --device cpu",
                        layer.index)};
  if (layer.mix.is_recurrent() || layer.mix.attention.output_gate)
    return {StatusCode::unsupported,
            fmt::format("layer {} is {}, which the GPU does not compute yet; take --device cpu", layer.index,
                        layer.mix.is_recurrent() ? "gated DeltaNet" : "attention with an output gate")};
  if (layer.mix.sinks != nullptr || layer.activation == Activation::clamped)
    return {StatusCode::unsupported,
            fmt::format(
                "layer {} has sinks or an activation that the GPU does not compute yet; take --device cpu",
                layer.index)};
  return {};
}

}  // namespace

/// Walks over all that the plan names, twice: to add up the bytes, and to copy them.
class CudaWeights::Upload {
 public:
  explicit Upload(device::Stream* stream, char* to) : stream_(stream), to_(to) {}

  const float* vector(const float* from, int64_t n) {
    if (from == nullptr) return nullptr;
    return static_cast<const float*>(put(from, n * static_cast<int64_t>(sizeof(float))));
  }
  CudaLinear linear(const LinearOp& l) {
    if (status.ok()) status = check(*l.w);
    has_rows = has_rows || !l.w->tiles;
    const void* data = l.w->tiles ? static_cast<const void*>(l.w->tiles->tiles) : l.w->rows;
    CudaLinear made;
    made.w = {put(data, data_bytes(*l.w)), form_of(*l.w), l.w->n_in, l.w->n_out};
    made.bias = vector(l.bias, l.w->n_out);
    return made;
  }
  std::vector<CudaLinear> linears(const std::vector<LinearOp>& all) {
    std::vector<CudaLinear> made;
    for (const LinearOp& l : all) made.push_back(linear(l));
    return made;
  }
  CudaLayer layer(const LayerPlan& l, int64_t n_embd) {
    CudaLayer c;
    c.project_norm = vector(l.project.norm.weight, n_embd);
    c.project = linears(l.project.linears);
    c.q_norm = vector(l.mix.q_norm.norm.weight, l.mix.q_norm.width);
    c.k_norm = vector(l.mix.k_norm.norm.weight, l.mix.k_norm.width);
    c.out = linear(l.out);
    c.out_norm = vector(l.out_norm.weight, n_embd);
    c.ffn_norm = vector(l.ffn.norm.weight, n_embd);
    c.ffn = linears(l.ffn.linears);
    c.down = linear(l.down);
    c.down_norm = vector(l.down_norm.weight, n_embd);
    return c;
  }

  Status status;
  bool has_rows = false;
  int64_t bytes = 0;

 private:
  const void* put(const void* from, int64_t n) {
    char* const at = to_ + bytes;
    if (stream_ != nullptr) stream_->upload(at, from, n);
    bytes += (n + kAlign - 1) / kAlign * kAlign;
    return at;
  }
  device::Stream* stream_;
  char* to_;
};

Result<std::unique_ptr<CudaWeights>> CudaWeights::upload(std::shared_ptr<device::Device> device,
                                                         const ModelSpec& spec, const Plan& plan) {
  const auto walk = [&](Upload& upload, CudaWeights& w) {
    w.layers_.clear();
    for (const LayerPlan& l : plan.layers) w.layers_.push_back(upload.layer(l, spec.n_embd));
    w.output_norm_ = upload.vector(plan.output.norm.weight, spec.n_embd);
    w.logits_ = upload.linear(plan.output.logits);
  };
  for (const LayerPlan& l : plan.layers) {
    if (Status s = check(l); !s.ok()) return s;
  }
  std::unique_ptr<CudaWeights> made(new CudaWeights());
  Upload counted(nullptr, nullptr);
  walk(counted, *made);
  if (!counted.status.ok()) return counted.status;
  const int64_t free = device->free_bytes();
  if (counted.bytes + kMargin > free) {
    return Status(StatusCode::out_of_memory,
                  fmt::format("the model does not fit GPU {} ({}): its weights take {:.2f} GB, {:.2f} GB are "
                              "free and {:.2f} GB must stay so for the cache; take --device cpu (layers "
                              "shared between GPU and CPU are not there yet)",
                              device->index(), device->name(), static_cast<double>(counted.bytes) / 1e9,
                              static_cast<double>(free) / 1e9, static_cast<double>(kMargin) / 1e9));
  }
  Result<std::unique_ptr<device::Stream>> stream = device::Stream::create(device);
  if (!stream.ok()) return stream.status();
  Result<device::Buffer> memory = device->allocate(counted.bytes, "the weights");
  if (!memory.ok()) return memory.status();
  Upload upload(stream->get(), memory->data<char>());
  walk(upload, *made);
  (*stream)->wait();
  if (Status s = (*stream)->take_error(); !s.ok()) return s;
  made->device_ = std::move(device);
  made->memory_ = std::move(*memory);
  made->has_rows_ = upload.has_rows;
  return made;
}

}  // namespace narrows
