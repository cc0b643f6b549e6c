#include "exec/cuda/cuda_executor.h"

#include <algorithm>
#include <utility>

#include "base/clock.h"

namespace narrows {

using device::Api;

namespace {

constexpr int64_t kFloat = sizeof(float);
constexpr int64_t kHalf = 2;

device::Gate gate_of(Activation activation) {
  return activation == Activation::gelu ? device::kGelu : device::kSilu;
}

/// One of the host's threads that mix.
class HostTeam final : public Team {
 public:
  HostTeam(ThreadPool& pool, int ith) : pool_(pool), ith_(ith) {}
  int ith() const override { return ith_; }
  int n_threads() const override { return pool_.n_threads(); }
  void barrier() override { pool_.barrier(); }

 private:
  ThreadPool& pool_;
  int ith_;
};

}  // namespace

CudaExecutor::CudaExecutor(const ModelSpec& spec, const Plan& plan, const CudaWeights& weights)
    : spec_(spec), plan_(plan), weights_(weights), width_([&] {
        Widths w = {spec.n_embd, 0, 0, 0, spec.n_embd, 0, 0};
        for (const LayerPlan& l : plan.layers) {
          int64_t layer = 0;
          for (const ProjectStage* stage : {&l.project, &l.ffn}) {
            for (const LinearOp& op : stage->linears) layer += op.w->n_in * op.w->n_out;
          }
          layer += l.out.w->n_in * l.out.w->n_out + l.down.w->n_in * l.down.w->n_out;
          w.layer = std::max(w.layer, layer);
          w.qkv = std::max(w.qkv, l.project.n_out);
          w.q = std::max(w.q, l.mix.attention.width_q());
          w.gate_up = std::max(w.gate_up, l.ffn.n_out);
          w.input = std::max({w.input, w.q, l.n_ff});
          if (l.out_norm.weight != nullptr || l.down_norm.weight != nullptr || l.residual_scale != 1)
            w.added = spec.n_embd;
        }
        return w;
      }()) {}

Result<std::unique_ptr<CudaExecutor>> CudaExecutor::create(const ModelSpec& spec, const Plan& plan,
                                                           const CudaWeights& weights, int n_threads) {
  std::unique_ptr<CudaExecutor> made(new CudaExecutor(spec, plan, weights));
  Result<std::unique_ptr<ThreadPool>> pool = ThreadPool::create(n_threads);
  if (!pool.ok()) return pool.status();
  made->pool_ = std::move(*pool);
  Result<std::unique_ptr<device::Stream>> stream = device::Stream::create(weights.device());
  if (!stream.ok()) return stream.status();
  made->stream_ = std::move(*stream);
  if (Status s = made->reserve(1, false); !s.ok()) return s;
  return made;
}

Status CudaExecutor::reserve(int64_t n, bool loaded) {
  const Widths& w = width_;
  if (n > rows_) {
    rows_ = 0;
    const auto grow = [&](device::Buffer& b, int64_t bytes) {
      return weights_.device()->grow(b, bytes, "the activations of a layer");
    };
    const int64_t few = std::min(n, kFewRows);
    for (const auto& [buffer, bytes] : std::initializer_list<std::pair<device::Buffer*, int64_t>>{
             {&x_, n * w.embd * kFloat},
             {&qkv_, n * w.qkv * kFloat},
             {&q16_, n * w.q * kHalf},
             {&mixed_, n * w.q * kFloat},
             {&gate_up_, n * w.gate_up * kFloat},
             {&added_, n * w.added * kFloat},
             {&code_, n * w.input},
             {&scale_, n * w.input / 32 * kFloat},
             {&bf16_, n * w.input * kHalf},
             {&f32_, weights_.has_rows() ? n * w.input * kFloat : 0},
             {&logits_, few * spec_.n_vocab * kFloat}}) {
      if (Status s = grow(*buffer, bytes); !s.ok()) return s;
    }
    host_qkv_ = AlignedArray<float>(n * w.qkv);
    host_mixed_ = AlignedArray<float>(n * w.q);
    const int64_t host = (n * (w.qkv + w.q)) * kFloat;
    if (!host_qkv_.ok() || !host_mixed_.ok() || !claim_.resize(host))
      return {StatusCode::out_of_memory, "no memory for the activations of a layer"};
    rows_ = n;
  }
  if (!loaded) return {};
  return weights_.device()->grow(layer_, w.layer * kHalf, "a layer's weights in bf16");
}

void CudaExecutor::shrink() {
  loaded_ = nullptr;
  layer_ = device::Buffer();
  if (rows_ <= kFewRows) return;
  rows_ = 0;
  for (device::Buffer* b :
       {&x_, &qkv_, &q16_, &mixed_, &gate_up_, &added_, &code_, &scale_, &bf16_, &f32_, &logits_})
    *b = device::Buffer();
  host_qkv_ = AlignedArray<float>();
  host_mixed_ = AlignedArray<float>();
  claim_.resize(0);
}

Status CudaExecutor::load_layer(const LayerPlan& layer) {
  const CudaLayer& c = weights_.layer(layer.index);
  loaded_ = nullptr;
  loaded_matrices_.clear();
  char* to = layer_.data<char>();
  const auto unpack = [&](const CudaLinear& l) {
    stream_->run([&](const Api& api, int d) { return api.unpack(d, &l.w, to, stream_->get()); });
    loaded_matrices_.push_back(to);
    to += l.w.n_in * l.w.n_out * kHalf;
  };
  for (const CudaLinear& l : c.project) unpack(l);
  unpack(c.out);
  for (const CudaLinear& l : c.ffn) unpack(l);
  unpack(c.down);
  if (Status s = stream_->take_error(); !s.ok()) return s;
  loaded_ = &layer;
  return {};
}

const void* CudaExecutor::loaded_output() const {
  return loaded_ != nullptr ? loaded_matrices_[weights_.layer(loaded_->index).project.size()] : nullptr;
}

Status CudaExecutor::run(const Run& run) {
  if (run.n > rows_ || (run.output != nullptr && run.n - run.from > kFewRows))
    return {StatusCode::internal, "more rows than room was made for"};
  if (run.loaded && (run.layers.size() != 1 || loaded_ != &run.layers.front()))
    return {StatusCode::internal, "a layer that is not loaded"};
  if (measure_) last_ns_ = monotonic_ns();
  const int64_t bytes = run.n * width_.embd * kFloat;
  if (run.x_on_device == nullptr) stream_->upload(x_.data(), run.x, bytes);
  DeviceMixer* const mixer = run.mixer->on_device();
  if (mixer != nullptr) mixer->begin(run.layers, *stream_);
  // A step is launched as one graph.
  if (mixer != nullptr && !mixer->is_observed() && run.x_on_device == nullptr && run.output != nullptr &&
      run.layers.size() == plan_.layers.size() && !measure_)
    stream_->record();
  for (const LayerPlan& layer : run.layers)
    run_layer(run, layer, &layer == &run.layers.back() ? run.from : 0);
  if (run.output != nullptr) run_logits(run);
  if (mixer != nullptr) mixer->finish(*stream_);
  // A step's residual stream ends here; that of a prompt goes on in the next layer.
  if (run.x_on_device == nullptr && run.layers.size() < plan_.layers.size())
    stream_->download(run.x, x_.data(), bytes);
  finish(RunStage::logits);
  return stream_->take_error();
}

CudaExecutor::Input CudaExecutor::prepare(device::PrepareArgs a, bool bf16) {
  if (bf16) {
    a.bf16 = bf16_.data();
  } else {
    a.code = code_.data<int8_t>();
    a.scale = scale_.data<float>();
    if (weights_.has_rows()) a.f32 = f32_.data<float>();
  }
  stream_->op(&Api::prepare, a);
  return {a.n, a.width};
}

void CudaExecutor::multiply(std::span<const CudaLinear> matrices, const Input& in, int index, float* y,
                            int64_t ldy, bool accumulate) {
  if (index >= 0) {
    for (const CudaLinear& l : matrices) {
      const device::GemmArgs a = {bf16_.data(),
                                  loaded_matrices_[static_cast<size_t>(index++)],
                                  in.n,
                                  l.w.n_in,
                                  l.w.n_out,
                                  l.bias,
                                  y,
                                  ldy,
                                  accumulate ? 1 : 0};
      stream_->op(&Api::gemm, a);
      y += l.w.n_out;
    }
    return;
  }
  while (!matrices.empty()) {
    const auto some = matrices.first(std::min<size_t>(matrices.size(), device::kMostMatrices));
    device::MultiplyArgs a{};
    for (const CudaLinear& l : some) {
      a.w[a.n_matrix] = l.w;
      a.bias[a.n_matrix++] = l.bias;
    }
    a.code = code_.data<int8_t>();
    a.scale = scale_.data<float>();
    a.f32 = f32_.data<float>();
    a.n = in.n;
    a.y = y;
    a.ldy = ldy;
    a.accumulate = accumulate ? 1 : 0;
    stream_->op(&Api::multiply, a);
    for (const CudaLinear& l : some) y += l.w.n_out;
    matrices = matrices.subspan(some.size());
  }
}

/// x += factor norm(w input + b).
void CudaExecutor::add_product(const LayerPlan& plan, const CudaLinear& l, const float* norm, float eps,
                               const Input& in, int index, float* x) {
  if (norm == nullptr && plan.residual_scale == 1) return multiply({&l, 1}, in, index, x, width_.embd, true);
  multiply({&l, 1}, in, index, added_.data<float>(), width_.embd, false);
  const device::AddArgs a = {x, added_.data<float>(), norm, eps, plan.residual_scale, in.n, width_.embd};
  stream_->op(&Api::add, a);
}

float* CudaExecutor::residual(const Run& run) {
  return run.x_on_device != nullptr ? run.x_on_device : x_.data<float>();
}

void CudaExecutor::run_layer(const Run& run, const LayerPlan& plan, int64_t from) {
  const CudaLayer& c = weights_.layer(plan.index);
  const int64_t d = width_.embd, width_q = plan.mix.attention.width_q();
  float* const all = residual(run);
  const bool loaded = run.loaded;
  // Where the matrices are among those that are loaded.
  int index = loaded ? 0 : -1;
  const auto next = [&](size_t n) { return loaded ? std::exchange(index, index + static_cast<int>(n)) : -1; };

  device::PrepareArgs norm{};
  norm.x = all;
  norm.ldx = norm.width = d;
  norm.norm = c.project_norm;
  norm.eps = plan.project.norm.eps;
  norm.n = run.n;
  const Input normed = prepare(norm, loaded);
  multiply(c.project, normed, next(c.project.size()), qkv_.data<float>(), plan.project.n_out, false);
  finish(RunStage::qkv);
  const bool on_device = run.mixer->on_device() != nullptr;
  if (on_device) {
    mix(run, plan, from);
  } else {
    mix_on_host(run, plan, from);
  }
  const int64_t n = run.n - from;
  if (n == 0 || !stream_->ok()) return;
  float* const x = all + from * d;

  device::PrepareArgs mixed{};
  mixed.x = mixed_.data<char>() + from * width_q * (on_device ? kHalf : kFloat);
  mixed.x_is_f16 = on_device ? 1 : 0;
  mixed.ldx = mixed.width = width_q;
  mixed.n = n;
  add_product(plan, c.out, c.out_norm, plan.out_norm.eps, prepare(mixed, loaded), next(1), x);
  finish(RunStage::out);

  norm.x = x;
  norm.norm = c.ffn_norm;
  norm.eps = plan.ffn.norm.eps;
  norm.n = n;
  const Input ffn = prepare(norm, loaded);
  const int64_t n_ff = plan.n_ff, ld = plan.ffn.n_out;
  multiply(c.ffn, ffn, next(c.ffn.size()), gate_up_.data<float>(), ld, false);
  device::PrepareArgs act{};
  act.x = gate_up_.data();
  act.ldx = act.ld_up = ld;
  act.up = gate_up_.data<float>() + n_ff;
  act.gate = gate_of(plan.activation);
  act.n = n;
  act.width = n_ff;
  const Input activated = prepare(act, loaded);
  finish(RunStage::ffn);
  add_product(plan, c.down, c.down_norm, plan.down_norm.eps, activated, next(1), x);
  finish(RunStage::down);
}

/// Where the caches are on the device.
void CudaExecutor::mix(const Run& run, const LayerPlan& plan, int64_t from) {
  const AttentionSpec& a = plan.mix.attention;
  const CudaLayer& c = weights_.layer(plan.index);
  float* q = qkv_.data<float>();
  float* k = q + a.width_q();
  const int64_t ld = plan.project.n_out;
  const auto norm = [&](const HeadNorms& heads, const float* weight, float* x) {
    if (weight == nullptr) return;
    const device::HeadNormArgs args = {x, ld, run.n, heads.n, heads.width, weight, heads.norm.eps};
    stream_->op(&Api::head_norm, args);
  };
  norm(plan.mix.q_norm, c.q_norm, q);
  norm(plan.mix.k_norm, c.k_norm, k);
  run.mixer->on_device()->mix(plan, {q, k, k + a.width_kv(), ld, q16_.data(), mixed_.data(), run.n, from},
                              *stream_);
  finish(RunStage::attend);
}

/// Where they are the host's: its threads mix.
void CudaExecutor::mix_on_host(const Run& run, const LayerPlan& plan, int64_t from) {
  const AttentionSpec& a = plan.mix.attention;
  const int64_t ld = plan.project.n_out;
  stream_->download(host_qkv_.data(), qkv_.data(), run.n * ld * kFloat);
  if (!stream_->ok()) return;
  if (measure_) {
    finish(RunStage::qkv);
    run.mixer->measure_from(last_ns_);
  }
  struct Work {
    Mixer& mixer;
    const LayerPlan& plan;
    MixRows rows;
    ThreadPool& pool;
  };
  float* q = host_qkv_.data();
  Work work = {
      *run.mixer,
      plan,
      {q, q + a.width_q(), q + a.width_q() + a.width_kv(), ld, host_mixed_.data(), a.width_q(), run.n},
      *pool_};
  pool_->run(
      [](void* context, int ith, int /*n*/) {
        auto& w = *static_cast<Work*>(context);
        HostTeam team(w.pool, ith);
        w.mixer.mix(w.plan, w.rows, team);
      },
      &work);
  if (measure_) {
    last_ns_ = monotonic_ns();
    const auto stages = run.mixer->measured(last_ns_);
    for (size_t i = 0; i < stages.size(); ++i) times_[static_cast<size_t>(RunStage::score) + i] += stages[i];
  }
  const int64_t at = from * a.width_q(), n = (run.n - from) * a.width_q();
  if (n > 0) stream_->upload(mixed_.data<float>() + at, host_mixed_.data() + at, n * kFloat);
}

void CudaExecutor::run_logits(const Run& run) {
  const int64_t n = run.n - run.from, d = width_.embd;
  float* const all = residual(run);
  device::PrepareArgs norm{};
  norm.x = all + run.from * d;
  norm.ldx = norm.width = d;
  norm.norm = weights_.output_norm();
  norm.eps = run.output->norm.eps;
  norm.n = n;
  multiply({&weights_.logits(), 1}, prepare(norm, false), -1, logits_.data<float>(), spec_.n_vocab, false);
  stream_->launch();
  stream_->download(run.logits, logits_.data(), n * spec_.n_vocab * kFloat);
}

void CudaExecutor::measure(bool on) {
  measure_ = on;
  times_ = {};
}

/// While measuring, the host waits for each stage: a step is slower then.
void CudaExecutor::finish(RunStage stage) {
  if (!measure_) return;
  stream_->wait();
  const int64_t now = monotonic_ns();
  times_[static_cast<size_t>(stage)] += now - last_ns_;
  last_ns_ = now;
}

}  // namespace narrows
