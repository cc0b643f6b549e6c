// The model's weights, one struct a layer. Pipeline step 1. Matrices of the quantised types of
// kernels/packed_weights.h are held in its tiles; others in the file's rows, norms and biases as float32. q,
// k, v (and gate, up) of one type are joined into one matrix: larger products for a prompt. Rows of q and k
// are reordered where the file rotates neighbours. An expert is matrices of its own, cut out of the file's
// tensors of all experts.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/aligned.h"
#include "base/memory_ledger.h"
#include "base/page_array.h"
#include "gguf/gguf_file.h"
#include "model/matrix.h"
#include "model/spec.h"
#include "narrows/engine.h"
#include "narrows/status.h"

namespace narrows {

/// One expert of a layer.
struct ExpertWeights {
  Matrix gate_up;   ///< [2 n_ff, n_embd], or empty and the two below
  Matrix gate, up;  ///< [n_ff, n_embd]
  Matrix down;      ///< [n_embd, n_ff]
};

/// Parts of a DeltaNet layer's projected row that may be of types of their own.
inline constexpr size_t kMostDeltaParts = 6;

/// Vectors are null and matrices empty where the model has none.
struct LayerWeights {
  const float* attn_norm = nullptr;  ///< [n_embd]
  /// [width_q + 2 width_kv, n_embd], with gates of the heads' outputs behind them [width_q more]; or empty
  /// and those below.
  Matrix wqkv;
  Matrix wq, wk, wv, wgate;
  const float* bqkv = nullptr;  ///< bias of wqkv, or null and the three below
  const float* bq = nullptr;
  const float* bk = nullptr;
  const float* bv = nullptr;
  const float* q_norm = nullptr;  ///< [head_dim]
  const float* k_norm = nullptr;
  /// Of a DeltaNet layer, what makes its projected row (kernels/delta_net.h): one matrix or several, whose
  /// rows follow each other; those at the end are empty.
  std::array<Matrix, kMostDeltaParts> delta_in;
  const float* conv = nullptr;             ///< [n_conv, n_channel]
  const float* delta_rate = nullptr;       ///< [n_head_v]
  const float* delta_step_bias = nullptr;  ///< [n_head_v]
  const float* delta_norm = nullptr;       ///< [head_dim]
  Matrix wo;                               ///< [n_embd, width_q], of a DeltaNet layer [n_embd, width_v]
  const float* bo = nullptr;
  const float* attn_post_norm = nullptr;  ///< [n_embd]
  const float* ffn_norm = nullptr;        ///< [n_embd]
  Matrix gate_up;                         ///< [2 n_ff, n_embd], or empty and the two below
  Matrix gate, up;
  const float* b_gate = nullptr;
  const float* b_up = nullptr;
  Matrix down;  ///< [n_embd, n_ff]
  const float* b_down = nullptr;
  const float* ffn_post_norm = nullptr;  ///< [n_embd]
  const float* sinks = nullptr;          ///< [n_head]
  Matrix router;                         ///< [n_expert, n_embd], and the experts in place of gate, up, down
  std::vector<ExpertWeights> experts;
  const float* b_router = nullptr;  ///< [n_expert]
  const float* b_gates = nullptr;   ///< [n_expert, n_ff] of the experts
  const float* b_ups = nullptr;
  const float* b_downs = nullptr;      ///< [n_expert, n_embd]
  const float* shared_gate = nullptr;  ///< [n_embd]; the shared expert is gate_up and down

  /// All that it has.
  std::vector<const Matrix*> matrices() const;
};

class ModelWeights {
 public:
  /// read_bytes: of a matrix that goes from the file into tiles, at once (a tile's rows at least), so that a
  /// large vocabulary is not in memory twice.
  static Result<std::unique_ptr<ModelWeights>> load(GgufFile file, const ModelSpec& spec,
                                                    const LoadOptions& options,
                                                    int64_t read_bytes = int64_t{4} << 20);
  ModelWeights(const ModelWeights&) = delete;
  ModelWeights& operator=(const ModelWeights&) = delete;

  const ModelSpec& spec() const { return spec_; }
  const LayerWeights& layer(int64_t i) const { return layers_[static_cast<size_t>(i)]; }
  const float* output_norm() const { return output_norm_; }  ///< [n_embd]
  const Matrix& output() const { return output_; }           ///< [n_vocab, n_embd]
  const float* output_bias() const { return output_bias_; }  ///< [n_vocab] or null

  /// Embedding rows of tokens, times embedding_scale, out [n, n_embd]. Rows are read from the file each time:
  /// the table is the largest tensor of small models and a token needs one row of it. io_error if the file
  /// has been written to since it was loaded: its rows are not those of the weights then; invalid_argument
  /// for a token outside the vocabulary. Thread-safe.
  Status embed(std::span<const Token> tokens, float* out) const;

  /// What load() took its weights from.
  const GgufFile& file() const { return file_; }

  /// Bytes allocated for weights.
  int64_t allocated_bytes() const;

 private:
  friend class WeightLoader;
  ModelWeights(GgufFile file, const ModelSpec& spec) : file_(std::move(file)), spec_(spec) {}

  GgufFile file_;
  ModelSpec spec_;
  TensorEntry embedding_;
  MemoryClaim claim_{MemoryUse::weights};
  PageArray matrices_;           ///< all of them, tiles and rows
  AlignedArray<float> vectors_;  ///< norms and biases
  std::vector<LayerWeights> layers_;
  const float* output_norm_ = nullptr;
  Matrix output_;
  const float* output_bias_ = nullptr;
};

}  // namespace narrows
