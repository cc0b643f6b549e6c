// The model's weights, one struct a layer. Pipeline step 1. Matrices of the quantised types of
// kernels/packed_weights.h are held in its tiles; other matrices, norms and biases in ggml's buffers. q, k, v
// (and gate, up) of one type are joined into one matrix: larger products for a prompt. Rows of q and k are
// reordered where the file rotates neighbours.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/page_array.h"
#include "ggml-backend.h"
#include "gguf/gguf_file.h"
#include "gguf/hparams.h"
#include "kernels/packed_weights.h"
#include "narrows/engine.h"
#include "narrows/status.h"

namespace narrows {

/// Shapes in ggml's order, fastest first. Null where the model has none. Matrices may have no data: see
/// ModelWeights::packed().
struct LayerWeights {
  ggml_tensor* attn_norm = nullptr;  ///< [n_embd]
  ggml_tensor* wqkv = nullptr;  ///< [n_embd, (n_head + 2 n_head_kv) * head_dim], or null and the three below
  ggml_tensor* wq = nullptr;
  ggml_tensor* wk = nullptr;
  ggml_tensor* wv = nullptr;
  ggml_tensor* bqkv = nullptr;  ///< bias of wqkv, or null and the three below
  ggml_tensor* bq = nullptr;
  ggml_tensor* bk = nullptr;
  ggml_tensor* bv = nullptr;
  ggml_tensor* q_norm = nullptr;  ///< [head_dim]
  ggml_tensor* k_norm = nullptr;
  ggml_tensor* wo = nullptr;  ///< [n_head * head_dim, n_embd]
  ggml_tensor* bo = nullptr;
  ggml_tensor* ffn_norm = nullptr;  ///< [n_embd]
  ggml_tensor* gate_up = nullptr;   ///< [n_embd, 2 n_ff], or null and the two below
  ggml_tensor* gate = nullptr;
  ggml_tensor* up = nullptr;
  ggml_tensor* b_gate = nullptr;
  ggml_tensor* b_up = nullptr;
  ggml_tensor* down = nullptr;  ///< [n_ff, n_embd]
  ggml_tensor* b_down = nullptr;
};

class ModelWeights {
 public:
  /// read_bytes: of a matrix that goes from the file into tiles, at once (a tile's rows at least), so that a
  /// large vocabulary is not in memory twice.
  static Result<std::unique_ptr<ModelWeights>> load(GgufFile file, const Hparams& hparams,
                                                    const LoadOptions& options,
                                                    int64_t read_bytes = int64_t{4} << 20);
  ~ModelWeights();
  ModelWeights(const ModelWeights&) = delete;
  ModelWeights& operator=(const ModelWeights&) = delete;

  const Hparams& hparams() const { return hparams_; }
  const LayerWeights& layer(int64_t i) const { return layers_[static_cast<size_t>(i)]; }
  ggml_tensor* output_norm() const { return output_norm_; }
  ggml_tensor* output() const { return output_; }
  ggml_tensor* output_bias() const { return output_bias_; }

  /// The tiles of a matrix of layer(), or of output(), which then has no data of its own; null if it is not
  /// packed.
  const kernels::PackedMatrix* packed(const ggml_tensor* matrix) const;

  /// Embedding rows of tokens, out [n, n_embd]. Rows are read from the file each time: the table is the
  /// largest tensor of small models and a token needs one row of it. io_error if the file has been written to
  /// since it was loaded: its rows are not those of the weights then;
  /// invalid_argument for a token outside the vocabulary. Thread-safe.
  Status embed(std::span<const Token> tokens, float* out) const;

  /// Rows [first, first + n) of a matrix of layer(), joined and ordered as it was loaded, as float, out [n,
  /// ne[0]]; from the file, whose rows lie in one piece. io_error as embed(). Thread-safe.
  Status read_rows(const ggml_tensor* matrix, int64_t first, int64_t n, float* out) const;

  /// What load() took its weights from.
  const GgufFile& file() const { return file_; }

  /// Bytes allocated for weights.
  int64_t allocated_bytes() const;

 private:
  friend class WeightLoader;
  explicit ModelWeights(GgufFile file, const Hparams& hparams);

  /// Where rows of a loaded matrix come from.
  struct RowSource {
    const TensorEntry* entry;
    bool reorder;  ///< rows go from neighbour to halves order
  };

  GgufFile file_;
  Hparams hparams_;
  TensorEntry embedding_;
  std::unordered_map<const ggml_tensor*, std::vector<RowSource>> sources_;
  std::unordered_map<const ggml_tensor*, kernels::PackedMatrix> packed_;
  PageArray tiles_;  ///< of all packed matrices
  std::vector<LayerWeights> layers_;
  ggml_tensor* output_norm_ = nullptr;
  ggml_tensor* output_ = nullptr;
  ggml_tensor* output_bias_ = nullptr;
  std::vector<ggml_context*> contexts_;
  std::vector<ggml_backend_buffer_t> buffers_;
};

}  // namespace narrows
