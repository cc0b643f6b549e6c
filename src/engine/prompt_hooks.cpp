// What connects a prompt with the caches of its sessions.
#include <algorithm>

#include "engine/session_impl.h"
#include "engine/value_weight.h"
#include "kv/klt/cuda/klt_prompt.h"

namespace narrows {

/// Of a prompt that the device reads: its cache encodes there too, if it can; null: it cannot. Shorter
/// prompts are not worth the threads.
std::shared_ptr<KltPrompt> Session::Impl::encodes_there(int64_t n_new) {
  constexpr int64_t kLeast = 128;
  const ModelSpec& spec = parts_of(*model).spec();
  const auto layer_of = [this](int64_t i) -> CudaKltLayer& {
    return static_cast<CudaKltLayer&>(cache->layer(i));
  };
  if (cache->place().klt == nullptr || options.segments || n_new < kLeast) return nullptr;
  for (int64_t i = 0; i < spec.n_layer(); ++i) {
    if (spec.layer(i).attention.temperature != 0 || !layer_of(i).host().can_append_from()) return nullptr;
  }
  const ModelParts& parts = parts_of(*model);
  const auto weigh = [this, &parts](int64_t layer) {
    std::vector<double> weight;
    const Status s = value_weight(*parts.weights, layer, weight, &workers);
    if (s.ok()) parts.value_weights.put(layer, weight);
    return s;
  };
  auto made = KltPrompt::create(parts.stores.klt, n_threads, layer_of, parts.value_weights, weigh);
  return made.ok() ? std::move(*made) : nullptr;
}

/// What connects the layers of a prompt with the caches; the sessions outlive it.
PrefillHooks Session::Impl::hooks_for(std::span<Session* const> list, int64_t n_new, bool goes_on) {
  const std::vector<Session*> sessions(list.begin(), list.end());
  PrefillHooks hooks;
  hooks.layer_done = [sessions](int64_t layer, const float* k, const float* v, int64_t n) -> Status {
    for (Session* s : sessions) {
      if (Status st = s->impl_->cache->layer(layer).append(k, v, n); !st.ok()) return st;
    }
    return {};
  };
  hooks.begin_rows = [sessions](int64_t layer, int64_t n) -> Status {
    for (Session* s : sessions) {
      if (Status st = s->impl_->cache->layer(layer).begin_rows(n); !st.ok()) return st;
    }
    return {};
  };
  hooks.run_rows = [sessions](int64_t layer, int phase, const RecurrentRows& rows, int ith, int n_thread) {
    for (Session* s : sessions) s->impl_->cache->layer(layer).run_rows(phase, rows, ith, n_thread);
  };
  const auto wants_queries = [](const Session* s) { return s->impl_->cache->wants_queries(); };
  if (std::any_of(sessions.begin(), sessions.end(), wants_queries)) {
    hooks.queries = [sessions](int64_t layer, const float* q, int64_t n) {
      for (Session* s : sessions) s->impl_->cache->layer(layer).observe_queries(q, n);
    };
  }
  hooks.read_past = [this](int64_t layer, int64_t first, int64_t n, float* k, float* v) {
    cache->layer(layer).read(first, n, k, v);
  };
  const int64_t n_past = cache->n_tokens();
  if (sessions.size() == 1 && cache->place().f16 != nullptr) {
    hooks.blocks = cache->place().f16.get();
  } else if (reads_on_device(*model, options.prompt)) {
    hooks.scratch = parts_of(*model).layer_blocks();
    hooks.blocks = hooks.scratch.get();
    hooks.query_stride = [sessions](int64_t layer) {
      const int64_t stride = sessions.front()->impl_->cache->layer(layer).query_stride();
      const bool alike = std::all_of(sessions.begin(), sessions.end(), [&](const Session* s) {
        const KvLayer& l = s->impl_->cache->layer(layer);
        return !l.wants_queries() || l.query_stride() == stride;
      });
      return alike ? stride : int64_t{1};
    };
    if (sessions.size() == 1) hooks.klt = encodes_there(n_new);
  }
  if (prompt_rows.hidden) {
    hooks.hidden = [this](int64_t index, std::span<const float> row) {
      prompt_rows.hidden(stripe_begin + index, row);
    };
  }
  if (prompt_rows.logits) {
    hooks.logits = [this](int64_t index, std::span<const float> row) {
      prompt_rows.logits(stripe_begin + index, row);
    };
  }
  if (!in_segments(n_past)) return hooks;
  const int64_t last = goes_on ? n_past + n_new - kSegmentTokens : segment_end(options.kv, n_past + n_new);
  hooks.goes_on = goes_on;
  for (int64_t end = options.kv.n_sink + kSegmentTokens; end <= last; end += kSegmentTokens) {
    if (end > n_past) hooks.segment_ends.push_back(end - n_past);
  }
  hooks.seal = [this, sessions](int64_t layer, int64_t* changed_from) -> Status {
    for (Session* s : sessions) {
      int64_t from = 0;
      if (Status st = s->impl_->cache->layer(layer).seal(&from); !st.ok()) return st;
      if (s->impl_.get() == this) *changed_from = from;
    }
    return {};
  };
  return hooks;
}

}  // namespace narrows
