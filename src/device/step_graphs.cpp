#include "device/step_graphs.h"

#include <algorithm>
#include <cstring>

namespace narrows::device {

namespace {

/// Steps of some batches, with and without what a cache asks for now and then.
constexpr size_t kMostGraphs = 8;
constexpr size_t kAlign = alignof(std::max_align_t);

}  // namespace

void StepGraphs::begin() {
  drop();
  records_ = true;
}

void StepGraphs::drop() {
  records_ = false;
  calls_.clear();
  args_.clear();
  key_.clear();
}

template <class... Fields>
void StepGraphs::put(const Fields&... fields) {
  const auto one = [this](const auto& field) {
    static_assert(std::is_scalar_v<std::decay_t<decltype(field)>>);
    const auto* from = reinterpret_cast<const char*>(&field);
    key_.insert(key_.end(), from, from + sizeof(field));
  };
  (one(fields), ...);
}

template <class Args>
void StepGraphs::keep(Kind kind, const Args& args, void* workspace, int64_t bytes) {
  static_assert(std::is_trivially_copyable_v<Args>);
  const size_t at = (args_.size() + kAlign - 1) / kAlign * kAlign;
  args_.resize(at + sizeof(Args));
  std::memcpy(args_.data() + at, &args, sizeof(Args));
  calls_.push_back({kind, reinterpret_cast<const void*>(at), workspace, static_cast<size_t>(bytes)});
  put(kind, workspace, bytes);
}

void StepGraphs::put_heads(const narrows_cuda_heads& h) {
  put(h.n_seq, h.n_head, h.n_head_kv, h.head_dim, h.q, h.out, h.q_stride, h.out_stride, h.scale);
}

void StepGraphs::put_blocks(const narrows_cuda_blocks& b) { put(b.pool, b.table, b.ld, b.block); }

void StepGraphs::add(const PrepareArgs& a) {
  keep(kPrepare, a);
  put(a.x, a.x_is_f16, a.gate, a.ldx, a.up, a.ld_up, a.norm, a.eps, a.n, a.width, a.f32, a.bf16, a.code,
      a.scale);
}

void StepGraphs::add(const MultiplyArgs& a) {
  keep(kMultiply, a);
  for (int64_t i = 0; i < a.n_matrix; ++i)
    put(a.w[i].data, a.w[i].form, a.w[i].n_in, a.w[i].n_out, a.bias[i]);
  put(a.n_matrix, a.code, a.scale, a.f32, a.n, a.y, a.ldy, a.accumulate);
}

void StepGraphs::add(const AddArgs& a) {
  keep(kAdd, a);
  put(a.x, a.y, a.norm, a.eps, a.factor, a.n, a.width);
}

void StepGraphs::add(const HeadNormArgs& a) {
  keep(kHeadNorm, a);
  put(a.x, a.ld, a.n, a.runs, a.width, a.norm, a.eps);
}

void StepGraphs::add(const StoreArgs& a) {
  keep(kStore, a);
  put(a.q, a.k, a.v, a.ld, a.n, a.n_head, a.n_head_kv, a.head_dim, a.n_rot, a.angles, a.factor, a.q_out,
      a.pool, a.table, a.ld_table, a.sequence, a.position, a.bad, a.q_plain, a.block);
}

void StepGraphs::add(const CopyArgs& a) {
  keep(kCopy, a);
  put(a.to, a.from, a.bytes);
}

void StepGraphs::add(const narrows_cuda_f16_args& a, void* workspace, int64_t bytes) {
  keep(kF16Decode, a, workspace, bytes);
  put_heads(a.heads);
  put_blocks(a.blocks);
  put(a.n_tokens, a.n_max, a.window);
}

void StepGraphs::add(const narrows_cuda_klt_args& a, void* workspace, int64_t bytes) {
  keep(kKltDecode, a, workspace, bytes);
  put_heads(a.heads);
  const narrows_cuda_pages& p = a.pages;
  put(p.pool, p.table, p.ld, p.n_max, p.page_bytes, p.n_tokens, p.budget, p.max_budget, p.n_sink, p.rope,
      p.position);
  put_blocks(p.exact);
  put(p.exact_count, p.n_exact);
  put(a.kept.keys, a.kept.token_of, a.kept.slot_of, a.kept.hand, a.kept.capacity, a.kept.ld);
  put(a.parts, a.n_part, a.mass, a.turns);
  // What launches are cut by. Gaps are as they were copied from one layer's transforms, which keep theirs.
  const auto* from = reinterpret_cast<const char*>(a.host_parts);
  key_.insert(key_.end(), from, from + static_cast<size_t>(a.n_part) * sizeof(narrows_cuda_klt_part));
}

std::vector<Call> StepGraphs::calls() const {
  std::vector<Call> all = calls_;
  for (Call& c : all) c.args = args_.data() + reinterpret_cast<size_t>(c.args);
  return all;
}

int StepGraphs::launch_each(const Api& api, int device, void* stream) {
  const std::vector<Call> all = calls();
  records_ = false;
  int code = 0;
  for (auto c = all.begin(); c != all.end() && code == 0; ++c) {
    const auto run = [&]<class Args>(int (*function)(int, const Args*, void*)) {
      code = function(device, static_cast<const Args*>(c->args), stream);
    };
    switch (c->kind) {
      case kPrepare:
        run(api.prepare);
        break;
      case kMultiply:
        run(api.multiply);
        break;
      case kAdd:
        run(api.add);
        break;
      case kHeadNorm:
        run(api.head_norm);
        break;
      case kStore:
        run(api.store);
        break;
      case kF16Decode:
        code = api.f16_decode(device, static_cast<const narrows_cuda_f16_args*>(c->args), c->workspace,
                              c->bytes, stream);
        break;
      case kKltDecode:
        code = api.klt_decode(device, static_cast<const narrows_cuda_klt_args*>(c->args), c->workspace,
                              c->bytes, stream);
        break;
      default: {
        const auto& a = *static_cast<const CopyArgs*>(c->args);
        code = api.copy(device, a.to, a.from, a.bytes, stream);
      }
    }
  }
  drop();
  return code;
}

int StepGraphs::launch(const Api& api, int device, void* stream) {
  if (calls_.empty()) {
    drop();
    return 0;
  }
  ++n_launch_;
  auto of = std::find_if(made_.begin(), made_.end(), [&](const Made& m) { return m.key == key_; });
  if (of == made_.end()) {
    void* graph = nullptr;
    const std::vector<Call> all = calls();
    if (const int code = api.make_graph(device, all.data(), static_cast<int64_t>(all.size()), &graph);
        code != 0) {
      drop();
      return code;
    }
    if (made_.size() == kMostGraphs) {
      of = std::min_element(made_.begin(), made_.end(),
                            [](const Made& a, const Made& b) { return a.used < b.used; });
      api.end_graph(device, of->graph);
    } else {
      of = made_.insert(of, Made());
    }
    of->key = key_;
    of->graph = graph;
  }
  of->used = n_launch_;
  drop();
  return api.launch_graph(device, of->graph, stream);
}

void StepGraphs::release(const Api& api, int device) {
  for (const Made& m : made_) api.end_graph(device, m.graph);
  made_.clear();
}

}  // namespace narrows::device
