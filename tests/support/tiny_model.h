// Tiny models with random weights, made by the tests themselves: whole GGUF files of some 100 kB that this
// build and libllama both run, or with one thing wrong. Weights are scaled so that attention is sharp (scores
// of standard deviation 2) and the next-token distribution far from flat.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "ggml.h"
#include "gguf.h"
#include "narrows/text.h"

namespace narrows::testing {

/// Tokens of the vocabulary (tests/text/tiny_vocabulary.h): the 256 bytes, the end, one merged pair.
inline constexpr int64_t kTinyVocab = 258;

/// A tensor before it is written, float32 whatever its type in the file.
struct TinyTensor {
  std::string name;
  ggml_type type = GGML_TYPE_F32;
  std::vector<int64_t> ne;  ///< ggml's order: ne[0] is the fastest dimension
  std::vector<float> data;
};

struct TinyModel {
  std::string architecture = "llama";
  int64_t n_layer = 2;
  int64_t n_embd = 64;
  int64_t n_head = 4;
  int64_t n_head_kv = 2;
  int64_t head_dim = 16;
  int64_t n_ff = 128;    ///< of an expert, if there are such
  int64_t n_expert = 0;  ///< 0: not in the file
  int64_t n_used = 0;
  int64_t n_shared_ff = 0;  ///< of the expert that all go through; 0: there is none
  double router_gain = 2;   ///< deviation of the router's outputs
  int64_t n_ctx = 2048;
  bool tied_output = false;
  bool qkv_bias = false;    ///< always there with qwen2
  bool other_bias = false;  ///< attn_output and ffn biases, as some llama files have
  bool output_bias = false;
  uint32_t seed = 1;

  ggml_type type = GGML_TYPE_F32;          ///< of all matrices
  std::map<std::string, ggml_type> types;  ///< of matrices whose name contains the key

  double freq_base = 10000;
  int64_t n_rot = 0;                 ///< 0: not in the file
  std::string rope_scaling;          ///< "", "none", "linear", "yarn"
  double rope_factor = 0;            ///< 0: not in the file
  int64_t n_ctx_orig = 0;            ///< 0: not in the file
  std::vector<float> rope_factors;   ///< rope_freqs.weight
  std::vector<float> short_factors;  ///< rope_factors_short.weight
  std::vector<float> long_factors;   ///< rope_factors_long.weight
  bool no_rope = false;              ///< the file says that there is none (Granite)
  double temperature = 0;            ///< attention.temperature_scale; 0: not in the file
  double attention_scale = 0;        ///< 0: not in the file
  double embedding_scale = 0;        ///< 0: not in the file
  double residual_scale = 0;         ///< 0: not in the file
  double logit_scale = 0;            ///< 0: not in the file
  int64_t window = 0;                ///< attention.sliding_window; 0: not in the file
  int64_t window_period = 0;         ///< a layer in so many sees all; 0: not in the file
  std::vector<bool> windows;         ///< in its place, layer by layer

  // Hybrids (qwen35, qwen35moe, qwen3next): layers of gated DeltaNet, all but the last of each `attends_in`.
  int64_t delta_head_k = 2;
  int64_t delta_head_v = 4;
  int64_t delta_dim = 16;
  int64_t n_conv = 4;
  int64_t attends_in = 2;
  std::vector<bool> recurrent;  ///< in its place, layer by layer
  bool old_tensors = false;     ///< qwen3next: q, k, v and gate of a key head together in one tensor
  bool joined_experts = false;  ///< gate and up of an expert in one tensor
  int64_t n_nextn = 0;          ///< layers behind the others that predict further tokens
  std::vector<int32_t>
      sections;  ///< rope.dimension_sections; empty: n_rot / 2 dealt out as released models do

  bool is_hybrid() const;
  bool is_recurrent(int64_t layer) const;

  int64_t key_rank = 0;  ///< > 0: every layer's K weight has this rank (over all KV heads)

  /// Last changes before the file is made.
  std::function<void(gguf_context*)> edit_metadata;
  std::function<void(std::vector<TinyTensor>&)> edit_tensors;

  int64_t width() const { return n_head_kv * head_dim; }
  std::vector<TinyTensor> tensors() const;
  /// The whole file.
  std::string bytes() const;
  /// Writes it; the path again.
  std::string write(const std::string& path) const;
};

/// The model as n files, FOLDER/PREFIX-00001-of-0000n.gguf and so on, tensors dealt out in turn; their paths.
std::vector<std::string> write_split(const TinyModel& model, const std::string& prefix, size_t n);

/// The named tensor; ends the test program if there is none.
TinyTensor& tensor(std::vector<TinyTensor>& all, const std::string& name);

/// Random bytes as tokens: the same seed gives the same prefix for every n.
std::vector<Token> random_tokens(int64_t n, uint32_t seed = 1);

}  // namespace narrows::testing
