// What a session takes of the process's memory: reckoned, claimed in the ledger before the work, given back.
#include <fmt/format.h>

#include <algorithm>

#include "base/guarded.h"
#include "base/memory_ledger.h"
#include "engine/session_impl.h"

namespace narrows {

namespace {

/// Tokens that a cache claims memory for at a time while it grows by steps.
constexpr int64_t kStepRoom = 512;

double gigabytes(int64_t bytes) { return static_cast<double>(bytes) / 1e9; }

}  // namespace

AttentionShape attention_shape(const ModelSpec& spec, int64_t layer) {
  const AttentionSpec& a = spec.layer(layer).attention;
  return {a.n_head, a.n_head_kv, a.head_dim, a.scale};
}

std::vector<KvLayerSpec> kv_layers(const ModelSpec& spec, std::span<const kernels::RopeTable> ropes) {
  std::vector<KvLayerSpec> layers;
  for (int64_t i = 0; i < spec.n_layer(); ++i) {
    const auto rope = static_cast<size_t>(spec.layer(i).attention.rope);
    layers.push_back({attention_shape(spec, i), ropes.empty() ? nullptr : &ropes[rope],
                      spec.layer(i).attention.window, spec.layer(i).delta_net, spec.rope_of(i).n_rot});
  }
  return layers;
}

int64_t cache_bytes_estimate(const Model& model, const KvProfile& profile, int64_t n_tokens, bool segments) {
  return kv_bytes_estimate(kv_layers(parts_of(model).spec()), profile, n_tokens, segments);
}

MemoryEstimate memory_estimate(const Model& model, const SessionOptions& options, int64_t n_tokens,
                               int n_threads) {
  const ModelSpec& spec = parts_of(model).spec();
  std::vector<AttentionShape> shapes;
  for (int64_t i = 0; i < spec.n_layer(); ++i) shapes.push_back(attention_shape(spec, i));
  const int64_t floats = spec.n_vocab + spec.n_embd;
  return {cache_bytes_estimate(model, options.kv, n_tokens, options.segments),
          StepScratch::bytes_needed(shapes, n_threads) +
              kv_step_bytes(kv_layers(spec), options.kv, n_tokens, n_threads) +
              floats * static_cast<int64_t>(sizeof(float))};
}

MemoryStats memory_stats() {
  const MemoryLedger& ledger = MemoryLedger::process();
  return {ledger.bytes(MemoryUse::weights),
          ledger.bytes(MemoryUse::cache),
          ledger.bytes(MemoryUse::scratch),
          ledger.bytes(MemoryUse::prompt),
          ledger.bytes(MemoryUse::file),
          ledger.limit(),
          ledger.free_bytes()};
}

void set_memory_limit(int64_t bytes) { MemoryLedger::process().set_limit(bytes); }

DevicePlace Session::Impl::place_for(const Model& model, const SessionOptions& options) {
  const ModelParts& parts = parts_of(model);
  return device_place(parts.stores, options.kv, kv_layers(parts.spec()));
}

bool Session::Impl::reads_on_device(const Model& model, const PromptOptions& prompt) {
  return parts_of(model).stores.f16 != nullptr && prompt.attention == PrefillAttention::automatic &&
         prompt.mass == 1;
}

Status Session::Impl::check_device(const Model& model, const SessionOptions& options) {
  if (place_for(model, options).f16 == nullptr || reads_on_device(model, options.prompt)) return {};
  return {
      StatusCode::unsupported,
      "on a GPU a prompt with --kv f16 attends to all, in f16 with float32 sums: --attention and --prefill "
      "sparse are the CPU's; leave them out or take --device cpu"};
}

bool Session::Impl::claim_cache(int64_t n_tokens) {
  const MemoryEstimate estimate = memory_estimate(*model, options, n_tokens, n_threads);
  const CacheStats now = cache->stats();
  // What lies on a GPU is no memory of this machine's.
  int64_t all = cache->place().f16 != nullptr ? now.bytes : std::max(estimate.cache, now.bytes);
  if (cache->place().f16 == nullptr && options.segments && now.n_tokens > 0 && now.bytes_pages == 0) {
    // Tokens of steps stay exact for longer than the layout says of a prompt of as many.
    all = std::max(all, kv_exact_bytes(kv_layers(parts_of(*model).spec()), options.kv, n_tokens));
  }
  const int64_t rest = all - cache->bytes_in_stores();
  const int64_t before = cache_claim.bytes();
  if (!cache_claim.resize(rest)) return false;
  if (!scratch_claim.resize(std::max(scratch_claim.bytes(), estimate.scratch))) {
    cache_claim.resize(before);
    return false;
  }
  n_claimed = n_tokens;
  return true;
}

void Session::Impl::settle_claims() noexcept {
  // Nothing is refused here: what does not fit, or cannot be reckoned, stays as it was claimed.
  static_cast<void>(guarded("the ledger", [this] { claim_cache(cache->n_tokens()); }));
}

Status Session::Impl::claim_prompt(int64_t n_new) {
  const int64_t n_past = cache->n_tokens();
  if (n_new > n_ctx - n_past) {
    const std::string held = n_past > 0 ? fmt::format(" on top of {} in the cache", n_past) : std::string();
    return {
        StatusCode::context_full,
        fmt::format("the prompt has {} tokens{} but the context holds {}; shorten it{}", n_new, held, n_ctx,
                    n_ctx < model->info().n_ctx_train
                        ? fmt::format(" or raise --ctx (the model allows {})", model->info().n_ctx_train)
                        : std::string(" or use a model with a longer context"))};
  }
  const int64_t at_once =
      in_segments(n_past) ? std::min(n_new, options.kv.n_sink + kStripeTokens / 2 * 3) : n_new;
  const int64_t work = Prefill::bytes_needed(parts_of(*model).spec(), parts_of(*model).plan, at_once,
                                             n_past + n_new - at_once, n_threads, options.prompt) +
                       (prompt_rows.logits ? Prefill::row_bytes(parts_of(*model).spec()) : 0);
  const int64_t have = MemoryLedger::process().free_bytes(), had = n_claimed;
  if (claim_cache(n_past + n_new)) {
    if (prompt_claim.resize(work)) return {};
    claim_cache(had);
  }
  const int64_t more_cache =
      cache_bytes_estimate(*model, options.kv, n_past + n_new, options.segments) - cache->stats().bytes;
  return {StatusCode::out_of_memory,
          fmt::format(
              "{} tokens need {:.2f} GB more memory ({:.2f} GB of it cache with --kv {}) and {:.2f} GB are "
              "free; shorten the prompt or choose a smaller --kv profile",
              n_new, gigabytes(more_cache + work), gigabytes(more_cache), options.kv.name, gigabytes(have))};
}

Status Session::Impl::claim_step() {
  const int64_t n = cache->n_tokens() + 1;
  if (n <= n_claimed) return {};
  return guarded("the ledger", [&]() -> Status {
    if (claim_cache(std::min(n_ctx, n + kStepRoom)) || claim_cache(n)) return {};
    return {
        StatusCode::out_of_memory,
        fmt::format("the cache of {} tokens cannot grow, {:.2f} GB of memory are free; end other work, or "
                    "choose a smaller --kv profile",
                    n - 1, gigabytes(MemoryLedger::process().free_bytes()))};
  });
}

Status Session::Impl::check_context(const Model& model, const SessionOptions& options) {
  const int64_t need = cache_bytes_estimate(model, options.kv, options.n_ctx, options.segments);
  const bool on_device = static_cast<bool>(place_for(model, options));
  const int64_t have =
      on_device ? parts_of(model).on_device->device()->free_bytes() : MemoryLedger::process().free_bytes();
  if (need <= have) return {};
  return {
      StatusCode::out_of_memory,
      fmt::format("a cache of {} tokens with --kv {} needs {:.2f} GB and {:.2f} GB are free{}; lower --ctx "
                  "or choose a smaller --kv profile",
                  options.n_ctx, options.kv.name, gigabytes(need), gigabytes(have),
                  on_device ? " on the GPU" : "")};
}

}  // namespace narrows
