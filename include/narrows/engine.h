// The engine: a model and sessions on it. A session takes a prompt and yields logits token by token,
// out of a key/value cache kept as its profile says. No I/O but the model file, no JSON, no printing.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "narrows/config.h"
#include "narrows/status.h"
#include "narrows/text.h"

namespace narrows {

/// A model's RoPE, other than its file says: as llama.cpp's flags of these names do. 0 and negative numbers
/// where they mean nothing: as the file says.
struct RopeOverrides {
  enum class Scaling { of_file, none, linear, yarn };
  Scaling scaling = Scaling::of_file;
  double freq_base = 0;
  /// 1 / the factor by which the context grows, which the model then allows.
  double freq_scale = 0;
  int64_t yarn_orig_ctx = 0;    ///< context before scaling
  double yarn_ext_factor = -1;  ///< share of extrapolation; 0: interpolation alone
  double yarn_attn_factor = -1;
  double yarn_beta_slow = -1;
  double yarn_beta_fast = -1;
  bool operator==(const RopeOverrides&) const = default;
};

struct ModelInfo {           ///< what the file says of the model; sizes in GGUF's words
  std::string architecture;  ///< "llama", "qwen2", "qwen3", ..
  std::string name;          ///< general.name, may be empty
  std::string fingerprint;   ///< 16 hex digits over the metadata, the tensor table and samples of the data
  int64_t n_layer = 0;
  int64_t n_layer_recurrent = 0, n_layer_windowed = 0;  ///< of gated DeltaNet; that attend to a window
  int64_t recurrent_bytes = 0;                          ///< states of a sequence, snapshots apart
  int64_t n_embd = 0;
  int64_t n_ff = 0;           ///< of an expert, if there are such
  int64_t n_expert = 0;       ///< of each layer; 0: it has one feed-forward
  int64_t n_expert_used = 0;  ///< that a token goes through
  int64_t n_head = 0;
  int64_t n_head_kv = 0;
  int64_t head_dim = 0;
  int64_t n_vocab = 0;
  int64_t n_ctx_train = 0;   ///< context the model was made for
  int64_t weight_bytes = 0;  ///< tensor data in the file
  std::string pooling;       ///< "none", "mean", "cls", "last", "rank": of embeddings; "": it does not say
  RopeOverrides rope;        ///< that it was loaded with
  std::string device;        ///< the GPU that holds the weights, "cuda:0 (NVIDIA H100)"; empty: the CPU
  /// What about the file makes results worse than they should be, or is left out of it, in sentences.
  std::vector<std::string> warnings;
};

struct LoadOptions {
  /// Hold quantised weights in tiles that our products read; false: in the file's rows, for ggml's products.
  bool repack = true;
  /// Unpack all weights to float32 at load (4 bytes each). Slower; but products with quantised weights round
  /// the activations to 8 bits, whose noise hides small differences between caches: for measuring them.
  bool float_weights = false;
  /// Changes the fingerprint: saved sessions and bases of another RoPE do not fit.
  RopeOverrides rope = {};
  ChatTemplateOptions chat_template = {};
  /// Where it is computed: cpu; cuda or cuda:N, a GPU (unsupported or out_of_memory if that cannot be); auto:
  /// a GPU if that can be, else the CPU. docs/cuda.md.
  std::string device = "cpu";
};

/// An immutable loaded model; may be shared by sessions on several threads.
class Model {
 public:
  /// invalid_file: missing, empty, cut off, not GGUF, tensor missing or of a wrong shape;
  /// unsupported: architecture or tensor type; out_of_memory: larger than the machine (says how much is
  /// needed); io_error: the file was written to meanwhile. The file stays open, rows of the embedding are
  /// read from it: prompts and steps on a file that has been written to since refuse with io_error.
  static Result<std::shared_ptr<const Model>> load(const std::string& path, const LoadOptions& options = {});
  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  const ModelInfo& info() const;
  const Tokenizer& tokenizer() const;
  const std::string& path() const;

 private:
  friend class Access;
  struct Impl;
  explicit Model(std::unique_ptr<const Impl> impl);
  std::unique_ptr<const Impl> impl_;
};

struct SessionOptions {
  KvProfile kv;
  std::string basis_path;  ///< file made by `narrows calibrate`; empty: the prompt calibrates
  int64_t n_ctx = 0;       ///< most tokens the cache may hold; 0: the model's n_ctx_train
  int n_threads = 0;       ///< 0: one a core that the process may use
  PromptOptions prompt;
  /// Prompts are read in segments (Session::segment_end()): the tokens of one attend to earlier ones as the
  /// cache holds them. At the end of a segment the cache depends on the tokens before it alone; it can go
  /// back there, and a prompt that goes on from there gives what the whole prompt gives, to the last bit.
  bool segments = false;
};

/// What a cache of n_tokens of this model takes by its layout, transforms of its own included; what
/// Session::cache_stats().bytes will show (klt: at most). segments: as in SessionOptions.
int64_t cache_bytes_estimate(const Model& model, const KvProfile& profile, int64_t n_tokens,
                             bool segments = false);

/// What all models and sessions of the process have been promised of its memory, bytes, each counted once:
/// pages that sessions share too. Loads, prompts, steps and restored sessions that do not fit beside the
/// rest are refused with out_of_memory before they begin.
struct MemoryStats {
  int64_t weights = 0;
  int64_t caches = 0;
  int64_t scratch = 0;  ///< what steps work in
  int64_t prompts = 0;  ///< what prompts that are being read work in
  int64_t files = 0;    ///< session files that are being read
  int64_t limit = 0;    ///< set_memory_limit()
  int64_t free = 0;     ///< that may still be promised; INT64_MAX: unknown, and no limit
};
MemoryStats memory_stats();
/// Most bytes of all that together, 0 (as it is): as many as the system, its control groups included, can
/// give. What has been promised before stays.
void set_memory_limit(int64_t bytes);

/// Bytes as allocated, whole session.
struct CacheStats {
  int64_t n_tokens = 0;
  int64_t bytes = 0;                    ///< all layers: pages, exact windows, bases, hot keys
  int64_t bytes_f16 = 0;                ///< what n_tokens of f16 keys and values of all layers take
  int64_t bytes_compressed_layers = 0;  ///< the part of `bytes` in layers that the profile compresses
  int64_t bytes_f16_compressed_layers = 0;
  int64_t bytes_pages = 0;      ///< encoded pages alone, without windows and bases
  int64_t bytes_f16_pages = 0;  ///< f16 bytes of the tokens that live in pages
  int64_t bytes_hot = 0;        ///< klt: rebuilt keys kept from step to step, none before the first step
  int64_t n_layer_compressed = 0;
};

/// Called now and then during prefill with the share done in [0, 1]; return false to cancel.
using ProgressFn = std::function<bool(double done)>;

/// What is wanted of a prompt's tokens beside the logits after the last one; either may be empty. `index`:
/// the token's place in the prompt.
struct PromptRows {
  /// Hidden states behind the model's last norm, [n_embd]; in order, one at a time.
  std::function<void(int64_t index, std::span<const float> hidden)> hidden;
  /// Logits after the token, [n_vocab]; in any order, on several threads at once.
  std::function<void(int64_t index, std::span<const float> logits)> logits;
};

class Session {
 public:
  /// invalid_argument: n_ctx or threads out of range; invalid_file: the basis; out_of_memory: the cache at
  /// n_ctx cannot fit (the sentence says how much is needed and which settings lower it).
  static Result<std::unique_ptr<Session>> create(std::shared_ptr<const Model> model,
                                                 const SessionOptions& options);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  /// Runs tokens, layer by layer, on top of what the cache holds; then logits() are those after the last
  /// token. context_full (both counts) leaves the session untouched; cancelled or an error makes it unusable
  /// until reset() or go_back().
  Status prefill(std::span<const Token> tokens, const ProgressFn& progress = {});

  /// prefill() in pieces of some tens of milliseconds, between which other sessions may work: prefill_step()
  /// until prefill_done() is 1. The tokens are copied. Errors as prefill(); begin_prefill() refuses, and
  /// leaves the session untouched; after an error of a step, or to give up, reset() or go_back(). rows:
  /// called within prefill_step(); unsupported where the model is on a GPU.
  Status begin_prefill(std::span<const Token> tokens, PromptRows rows = {});
  Status prefill_step();
  double prefill_done() const;  ///< share of the prompt that has been begun, in [0, 1]

  /// Of the last prompt: the share of the keys, in tiles, that was read where some could be left out
  /// (PromptOptions::mass).
  double prompt_read() const;

  /// The same for several empty sessions of one model at the cost of one pass: each cache sees the same exact
  /// keys and values. For measuring profiles against each other.
  static Status prefill_together(std::span<Session* const> sessions, std::span<const Token> tokens,
                                 const ProgressFn& progress = {});

  /// Appends one token and computes the logits after it. context_full when the cache has n_ctx tokens.
  Status decode(Token token);

  std::span<const float> logits() const;  ///< [n_vocab], valid until the next call
  int64_t n_past() const;                 ///< tokens in the cache
  int64_t n_ctx() const;
  int n_threads() const;
  const Model& model() const;
  const KvProfile& profile() const;
  CacheStats cache_stats() const;
  void reset();  ///< forgets all tokens, keeps the buffers

  /// Forgets tokens from n on, and as many before it as must go with them; returns how many are left, there
  /// are no logits until the next prompt. Also after a prompt that failed or was given up in the middle, of
  /// which a session with segments keeps what has gone through all layers (some thousand tokens at a time),
  /// and any session what it held before. With segments it goes to kept_prefix(n), and reading on gives what
  /// reading all gives to the last bit; without, exact tokens end anywhere and compressed ones at a whole
  /// unit (16 to 64 tokens), and the last of these are then read as the cache holds them.
  int64_t go_back(int64_t n);

  // --- prefixes; for sessions with `segments`

  /// The last end of a segment that leaves at least 128 tokens of a prompt of n behind it; 0 if there is
  /// none. Below exact_tokens() nothing is compressed.
  static int64_t segment_end(const KvProfile& profile, int64_t n_tokens);
  /// The last end of a segment at or before token n that keep_prefix() can go back to; 0: to none but
  /// reset().
  int64_t kept_prefix(int64_t n) const;
  /// Forgets all but the first n tokens, n = kept_prefix(n). Nothing is encoded anew; there are no logits
  /// until the next prefill.
  void keep_prefix(int64_t n);
  /// Becomes the first n = from.kept_prefix(n) tokens of a session of the same model and options, and shares
  /// its pages. invalid_argument if they differ; out_of_memory: then this session is empty.
  Status share_prefix(const Session& from, int64_t n);

  class Impl;  ///< the library's own

 private:
  friend class Access;
  friend class DecodeBatch;
  explicit Session(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// Sessions of one model that take their next tokens together, at the cost of one pass over the weights.
/// Serial: no two calls at a time, and no other call on its sessions meanwhile.
class DecodeBatch {
 public:
  static constexpr int kMaxSessions = 64;

  /// n_threads as in SessionOptions. invalid_argument: a number out of range; out_of_memory.
  static Result<std::unique_ptr<DecodeBatch>> create(std::shared_ptr<const Model> model, int max_sessions,
                                                     int n_threads = 0);
  ~DecodeBatch();
  DecodeBatch(const DecodeBatch&) = delete;
  DecodeBatch& operator=(const DecodeBatch&) = delete;

  /// Session::decode(tokens[i]) for every sessions[i]; each[i] is how it went. A session that cannot (full,
  /// broken, no memory for its token, of another model or number of threads, twice in the list) is left out
  /// and as it was. The logits of a session have the bits that its own decode() gives, whoever else takes
  /// part. The result itself: invalid_argument if the spans do not fit each other or max_sessions.
  Status decode(std::span<Session* const> sessions, std::span<const Token> tokens, std::span<Status> each);

  /// task(i) for each i < n on the threads of the batch, which are awake after a step: for what comes between
  /// two steps, one piece a session. Tasks do not throw.
  void for_each(int64_t n, const std::function<void(int64_t)>& task);

  int max_sessions() const;

 private:
  struct Impl;
  explicit DecodeBatch(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace narrows
