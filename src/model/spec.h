// What a model is, layer by layer, as its file says: the values that everything after the loader works with.
// Pipeline step 1. Who makes one from a file is model/arch/; nothing else knows an architecture by name.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gguf/gguf_file.h"
#include "kernels/delta_net.h"
#include "kernels/rope_table.h"
#include "narrows/status.h"

namespace narrows {

/// Softmax attention of a layer.
struct AttentionSpec {
  int64_t n_head = 0;
  int64_t n_head_kv = 0;
  int64_t head_dim = 0;
  float scale = 0;             ///< on q.k
  int64_t rope = 0;            ///< index into ModelSpec::ropes
  bool qk_norm = false;        ///< RMS norm of each head's q and k before RoPE
  bool qk_norm_whole = false;  ///< of all heads together instead
  bool output_gate = false;  ///< what a head gives is multiplied by sigmoid(gate); the file has q and gate of
                             ///< a head one after the other in its q tensor
  bool sinks = false;        ///< a head's softmax has one summand more, a score of the file that has no value
  int64_t window = 0;        ///< a query sees this many tokens, itself the last of them; 0: all before it

  /// Queries at position p are multiplied by 1 + temperature log(1 + floor(p / temperature_step)).
  double temperature = 0;
  int64_t temperature_step = 1;

  float query_factor(int64_t position) const;
  int64_t width_q() const { return n_head * head_dim; }
  int64_t width_kv() const { return n_head_kv * head_dim; }
};

/// Gated DeltaNet in the place of a layer's attention.
using DeltaNetSpec = kernels::DeltaNetShape;

/// Of a gate g and its partner u: silu(g) u; gelu(g) u, in its tanh form; or gpt-oss's, of g up to 7 and u
/// within 7: g sigmoid(1.702 g) (u + 1).
enum class Activation { silu, gelu, clamped };

/// Many small feed-forwards in place of one: a router [n_expert] says which of them a row goes through and
/// what each weighs; together they give the sum of weight * expert(x). Weights are the softmax over all of
/// the router's outputs, of which the n_used largest count. Router and experts may have biases.
struct ExpertSpec {
  int64_t n_expert = 0;  ///< 0: there is one feed-forward, without a router
  int64_t n_used = 0;
  bool normalised = true;  ///< weights of those that count add up to `scale`
  float scale = 1;         ///< on all weights
  /// A feed-forward of this width beside them that every row goes through; 0: none.
  int64_t n_shared_ff = 0;
  bool shared_gate = false;  ///< what it gives is multiplied by sigmoid(g x)

  explicit operator bool() const { return n_expert > 0; }
};

/// Gated feed-forward: down (activation(gate x) * up x).
struct FfnSpec {
  int64_t n_ff = 0;  ///< of an expert, where there are such
  Activation activation = Activation::silu;
  ExpertSpec experts;
  bool gate_in_up = false;  ///< the file has both in one tensor, gate first
};

struct LayerSpec {
  float residual_scale = 1;  ///< on what attention and the feed-forward give, before it is added
  AttentionSpec attention;   ///< nothing of it where there is the next
  DeltaNetSpec delta_net;
  FfnSpec ffn;
  bool pre_norms = true;                    ///< what goes into attention and feed-forward is normed
  bool ffn_norm_is_post_attention = false;  ///< the file's name for what is normed before the feed-forward
  bool post_norms = false;  ///< what attention and the (one) feed-forward give is normed before it is added
};

/// Seven times the longest context of any model (10M); RoPE's table grows with it and stays below 140 MB at
/// head_dim 128.
inline constexpr int64_t kMaxContext = int64_t{1} << 26;

struct ModelSpec {
  std::string architecture;
  std::string name;
  int64_t n_embd = 0;
  int64_t n_vocab = 0;
  int64_t n_ctx_train = 0;
  float rms_eps = 0;
  float embedding_scale = 1;
  float logit_scale = 1;
  /// The file rotates neighbours (2i, 2i + 1): rows of q and k are reordered at load, see model/weights.h.
  bool rope_neighbours = false;
  std::vector<kernels::RopeParams> ropes;  ///< freq_factors are filled in by the weight loader
  std::vector<LayerSpec> layers;
  int64_t n_layer_unused = 0;  ///< layers of the file after these, which predict further tokens (nextn)

  int64_t n_layer() const { return static_cast<int64_t>(layers.size()); }
  const LayerSpec& layer(int64_t i) const { return layers[static_cast<size_t>(i)]; }
  const kernels::RopeParams& rope_of(int64_t i) const {
    return ropes[static_cast<size_t>(layer(i).attention.rope)];
  }
  /// Of the first layer that attends: what a model is described by.
  const AttentionSpec& attention() const;
  int64_t n_recurrent() const;  ///< layers of gated DeltaNet
  /// Largest of all layers: for buffers that serve one after another.
  int64_t most_width_q() const;
  int64_t most_width_kv() const;
  int64_t most_ff() const;
};

/// A table for each of the model's ropes, positions 0 .. n_ctx - 1.
std::vector<kernels::RopeTable> rope_tables(const ModelSpec& spec, int64_t n_ctx);

/// Architectures that this build runs.
const std::vector<std::string>& supported_architectures();

/// unsupported: another architecture (the sentence lists ours), experts where it has none, RoPE kinds that we
/// lack, no layer that attends; invalid_file: a key missing, of a wrong type or with an impossible value.
Result<ModelSpec> read_spec(const GgufFile& file);

}  // namespace narrows
