// The inside of a Session: cache, executor, what a step works in. Seen by engine/, eval/ and bench/ only.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "base/aligned.h"
#include "base/memory_ledger.h"
#include "engine/model_parts.h"
#include "engine/step_mixer.h"
#include "kernels/rope_table.h"
#include "kv/kv_cache.h"
#include "narrows/engine.h"
#include "prompt/prefill.h"

namespace narrows {

/// A session with segments takes a prompt in stripes of about this many tokens, whole segments: more, and a
/// prompt that is given up loses more; fewer, and weights are unpacked, and the cache is read back, more
/// often (docs/experiments.md).
constexpr int64_t kStripeTokens = 4096;
static_assert(kStripeTokens % kSegmentTokens == 0);

class Session::Impl {
 public:
  Impl(std::shared_ptr<const Model> model, const SessionOptions& options, int n_threads, int64_t n_ctx);

  Status init(std::shared_ptr<const BasisFile> basis);
  /// Claims what n_new more tokens of a prompt take, cache and work; out_of_memory with the figures, and
  /// nothing is claimed, if they do not fit.
  Status claim_prompt(int64_t n_new);
  /// Claims what the cache takes with n_tokens, and steps over it; false if that does not fit. More than it
  /// holds for what is to come, as many as it holds to give back what did not come.
  bool claim_cache(int64_t n_tokens);
  /// The same for one more token of a step, and some more than one at a time: out_of_memory if not one fits.
  Status claim_step();
  /// out_of_memory if a context that was asked for cannot fit as a whole; the model's own, often huge, is
  /// only a limit.
  static Status check_context(const Model& model, const SessionOptions& options);
  /// unsupported: what is asked of prompts is the CPU's.
  static Status check_device(const Model& model, const SessionOptions& options);
  /// What such a session's cache lies in on the GPU that the model is on; nothing: in the host's memory.
  static DevicePlace place_for(const Model& model, const SessionOptions& options);
  /// True if such prompts are read on the GPU that the model is on.
  static bool reads_on_device(const Model& model, const PromptOptions& prompt);
  /// The cache has become another one: claims for the tokens that it holds. Throws nothing.
  void settle_claims() noexcept;
  Status check_usable() const;

  /// What connects the layers of a prompt of n_new tokens with the caches, this one's first.
  /// goes_on: more tokens of the prompt follow, in another run.
  PrefillHooks hooks_for(std::span<Session* const> sessions, int64_t n_new, bool goes_on = false);
  std::shared_ptr<KltPrompt> encodes_there(int64_t n_new);
  /// True if a prompt on top of n_past tokens is read in segments: not what follows tokens of steps.
  bool in_segments(int64_t n_past) const { return options.segments && n_past == sealed; }
  /// A prompt on top of n_past tokens has been read.
  void note_prompt(int64_t n_past, double read_share);

  /// Of n_left tokens on top of n_past those that go through all layers before the next ones do: a stripe. A
  /// prompt that is given up keeps the stripes that are done.
  int64_t stripe_tokens(int64_t n_past, int64_t n_left) const;
  /// Begins the next stripe of `prefill_tokens`. A failure leaves the cache as it was.
  Status begin_stripe(Session* self);
  /// Can a layer that has read on no longer go back to where the stripe began, then what it held there is put
  /// aside. Without memory for that it is done without.
  void keep_spare(int64_t n_new);

  /// Serial, before a step: everything of it that can fail. Writes the token's embedding [n_embd]. A session
  /// that fails here is as it was.
  Status begin_step(Token token, float* embedding, Executor& by);
  Status prepare_step(Token token, float* embedding);
  Status begin_prefill(Session* self, std::span<const Token> tokens, PromptRows rows);
  void measure_steps(bool on) {
    measures = on;
    step_times = {};
  }
  Status take_executor();
  void give_executor_back();
  void stop_reading();  ///< the running prompt goes, the executor back
  StepSequence sequence() const { return {cache.get(), scratch.get()}; }
  Status run_step();
  /// Serial, after the step. A session that fails here must be reset.
  Status finish_step(Executor& by);

  std::shared_ptr<const Model> model;
  SessionOptions options;
  int64_t n_ctx;
  int n_threads;
  std::vector<kernels::RopeTable> ropes;      ///< one for each of the model's
  MemoryClaim cache_claim{MemoryUse::cache};  ///< of the cache what is not in stores of pages, or not yet
  MemoryClaim scratch_claim{MemoryUse::scratch};
  MemoryClaim prompt_claim{MemoryUse::prompt};  ///< while one is being read
  int64_t n_claimed = 0;                        ///< tokens that cache_claim is for
  ExecutorLease executor;                       ///< while a prompt is on its way, and in a step of decode()
  LentWorkers workers;                          ///< for the cache
  std::unique_ptr<KvCache> cache;
  std::unique_ptr<StepScratch> scratch;
  StepMixer mixer;        ///< of decode()
  AlignedArray<float> x;  ///< [n_embd] its residual stream
  bool measures = false;  ///< decode() adds up step_times, of its stages
  Executor::Times step_times{};
  std::unique_ptr<Prefill> prefill;  ///< while one is on its way; after `executor`, which it uses to the last
  std::vector<Token> prefill_tokens;
  PromptRows prompt_rows;    ///< of the running prompt
  int64_t stripe_begin = 0;  ///< of the running prompt's tokens, those before the running stripe
  int64_t stripe_end = 0;
  int64_t stripe_past = 0;         ///< tokens that all layers held before the running stripe, or prompt
  std::unique_ptr<KvCache> spare;  ///< those, where the layers could not go back to them
  std::vector<float> own_logits;   ///< [n_vocab]
  double prompt_read = 1;          ///< Prefill::read_share() of the last prompt
  int64_t sealed = 0;              ///< with segments: the last end of one that a prompt has reached
  bool broken = false;             ///< a step failed half way: layers hold different numbers of tokens
};

/// The number of threads asked for, 0: one a core that the process may use. invalid_argument if it is out of
/// range.
Result<int> threads_to_use(int n_threads);

/// What a session will have been promised with n_tokens in its cache, bytes.
struct MemoryEstimate {
  int64_t cache = 0;    ///< cache_bytes_estimate()
  int64_t scratch = 0;  ///< what its steps work in, beside the executor
};
MemoryEstimate memory_estimate(const Model& model, const SessionOptions& options, int64_t n_tokens,
                               int n_threads);

/// Attention shape of a layer, for caches made outside a session (tests, eval, inspect).
AttentionShape attention_shape(const ModelSpec& spec, int64_t layer = 0);

/// What a cache must know of the model. ropes: one for each of the model's, which outlive the cache; or none,
/// where only bytes are asked for.
std::vector<KvLayerSpec> kv_layers(const ModelSpec& spec, std::span<const kernels::RopeTable> ropes = {});

}  // namespace narrows
