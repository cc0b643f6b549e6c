// The model's shape and constants as the GGUF metadata says, checked. Pipeline step 1.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gguf/gguf_file.h"
#include "kernels/rope_table.h"
#include "narrows/status.h"

namespace narrows {

struct Hparams {
  std::string architecture;
  std::string name;
  int64_t n_layer = 0;
  int64_t n_embd = 0;
  int64_t n_ff = 0;
  int64_t n_head = 0;
  int64_t n_head_kv = 0;
  int64_t head_dim = 0;
  int64_t n_vocab = 0;
  int64_t n_ctx_train = 0;
  float rms_eps = 0;
  float attention_scale = 0;  ///< on q.k
  bool rope_neighbours =
      false;                 ///< file rotates (2i, 2i+1): weights are reordered at load, see model/weights.h
  bool qk_norm = false;      ///< qwen3: RMS norm of each head's q and k before RoPE
  kernels::RopeParams rope;  ///< freq_factors are filled in by the weight loader
};

/// Architectures that this build runs.
const std::vector<std::string>& supported_architectures();

/// unsupported: another architecture (the sentence lists ours), experts, RoPE kinds that we lack;
/// invalid_file: a key missing, of a wrong type or with an impossible value.
Result<Hparams> read_hparams(const GgufFile& file);

}  // namespace narrows
