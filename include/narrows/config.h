// How the key/value cache is kept, the profiles behind `--kv NAME[:key=value,...]`, and in which precision a
// prompt attends.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "narrows/status.h"

namespace narrows {

/// What commands take when no profile is asked for. (A KvProfile{} of code is f16.)
inline constexpr const char* kDefaultProfile = "klt";

/// Tokens of a segment of a prompt (SessionOptions::segments), whole pages of every cache. With 256 to 2,048
/// of them a prompt is read equally well (docs/experiments.md); a changed prompt is read anew from the end of
/// a segment.
inline constexpr int64_t kSegmentTokens = 256;

enum class KvKind {
  f16,   ///< exact keys and values in half precision, all tokens read
  kivi,  ///< KIVI (arXiv:2402.02750): per-channel quantised rotated keys, per-token quantised values, all
         ///< tokens read
  klt,   ///< latent codes of centred, weighted Karhunen-Loeve transforms, scored with RoPE; few tokens read
  sals,  ///< SALS (arXiv:2510.24273): low-rank pre-RoPE keys, quantised values, few tokens read
};

/// One parsed profile. Layers named dense below keep an f16 cache whatever the kind.
struct KvProfile {
  static constexpr int64_t kBudgetAuto = -1;  ///< the profile's own rule, see budget_at()
  static constexpr int64_t kBudgetAll = -2;   ///< every token is read

  std::string name = "f16";  ///< as it was asked for, e.g. "sals-25:budget=1024"
  KvKind kind = KvKind::f16;
  int key_bits = 16;      ///< kivi: bits a code (2 or 4); otherwise 16
  int value_bits = 16;    ///< kivi, sals: bits a code (2 or 4); f16: 16
  int rank_divisor = 1;   ///< sals: rank_latent = D / rank_divisor, D = n_head_kv * head_dim
  double key_rate = 0;    ///< klt: average bits a key coordinate
  double value_rate = 0;  ///< klt: average bits a value coordinate
  int64_t rank = 0;       ///< klt: key coordinates that scoring reads; 0: max(24, D / 8)
  int64_t block = 64;     ///< klt: tokens that share a rotation in scoring; 16, 32 or 64
  int64_t anchors = 1;    ///< klt: most tokens a page of 64 that stay exact, on average over a layer's pages
  int64_t budget = kBudgetAuto;  ///< tokens selected beside the sinks and the recent ones
  double mass = 1;               ///< klt: share of the attention mass that selecting stops at, in (0, 1]
  int64_t n_sink = 16;           ///< first tokens, always exact and always read (all kinds but f16)
  int64_t n_recent = 64;         ///< last tokens, always exact and always read (all kinds but f16)

  /// Tokens that SALS selects at 4K, beside 16 sinks and 64 recent ones (arXiv:2510.24273).
  static constexpr int64_t kBudgetAt4K = 432;

  /// Most tokens to select at a context of n_kv tokens: max(432, n_kv / 8 - n_sink - n_recent) when
  /// automatic, i.e. 1/8 of the context from 4K on (PAPERS: the split 16 + 432 + 64 of SALS at 4K). klt:
  /// max(432, n_kv / 12), with which it is as close to f16 as with all tokens (docs/experiments.md).
  int64_t budget_at(int64_t n_kv) const;

  /// True if this layer keeps an exact f16 cache: all layers for f16; 0, 1 and the last for sals; none for
  /// kivi and klt.
  bool layer_is_dense(int64_t layer, int64_t n_layer) const;

  /// True if its layers encode with transforms that `narrows calibrate` can make beforehand.
  bool takes_basis() const;

  /// True if steps read few of the tokens: n_sink, budget_at() and n_recent of them.
  bool is_sparse() const;

  /// invalid_argument names the unknown profile or key, or the impossible number, and lists what exists.
  static Result<KvProfile> parse(std::string_view text);

  /// Names that parse() takes, in the order of growing compression.
  static std::vector<std::string> names();
};

/// In which precision a prompt attends to itself: the values behind `--attention NAME`. Sums over keys are
/// float32 in f32, bf16 and bf16_shift. docs/half_precision.md.
enum class PrefillAttention {
  automatic,   ///< bf16_shift where the CPU multiplies bfloat16, else f32
  f32,         ///< exact
  bf16,        ///< keys, queries, values and weights rounded to bfloat16
  bf16_shift,  ///< the same after the mean key of each block was taken away
  fp16,        ///< half precision throughout: overflows where q.k passes 65504
  pasa,        ///< half precision throughout with PASA's shift (arXiv:2503.01873)
  fp16_shift,  ///< half-precision products after the mean key was taken away, float32 statistics
};

/// invalid_argument lists the names.
Result<PrefillAttention> parse_attention(std::string_view name);
const char* attention_name(PrefillAttention attention);
/// Names that parse_attention() takes.
std::vector<std::string> attention_names();

/// How a prompt is multiplied by the weights: the values behind `--products NAME`.
enum class PrefillProducts {
  automatic,  ///< bf16 where the CPU has it and the prompt is long enough, else int8
  int8,       ///< as in decoding: activations rounded to 8 bits in groups of 32 for quantised weights
  bf16,       ///< oneDNN's, both factors in bfloat16 (where the CPU has no such product: int8)
};

/// How a prompt is read.
struct PromptOptions {
  PrefillProducts products = PrefillProducts::automatic;
  PrefillAttention attention = PrefillAttention::automatic;
  /// Share of its attention that a block of a prompt's tokens reads at least, as estimated from a sample of
  /// them, in (0, 1]: whole tiles of keys that hold the rest are left out. 1: all is read.
  /// docs/sparse_prefill.md.
  double mass = 1;
};

/// `--prefill TEXT`: dense, sparse or sparse:mass=X, to PromptOptions::mass. invalid_argument says what there
/// is.
Result<double> parse_prefill(std::string_view text);

}  // namespace narrows
