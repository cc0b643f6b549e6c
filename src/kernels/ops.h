// Every kernel signature once: shapes, units, alignment, what may alias. Raw pointers only: no ggml type, no
// allocation, no exception. Callers have checked the shapes. Used by exec/, prompt/ and the caches.
//
// Shapes are row-major, fastest dimension last. "ld" is the distance between rows in elements. Pointers need
// only the alignment of their element; no argument may alias an output unless it says so. Nothing is read
// beyond the counts given: cache tails may hold NaN.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/delta_net.h"
#include "kernels/latent_page.h"
#include "kernels/packed_weights.h"
#include "kernels/prefill_kernel.h"
#include "narrows/status.h"

namespace narrows::kernels {

using f16_t = uint16_t;  ///< IEEE binary16, as bits

/// Tokens in one tile of attention work. 64 float lanes are 4 AVX-512 registers; with 6 rows of a product
/// that makes 24 accumulators, which hides the FMA latency and still fits the 32 registers.
inline constexpr int64_t kTile = 64;

/// Values in one quantisation group (KIVI, SALS): 32, as in DESIGN.md's table of profiles.
inline constexpr int64_t kGroup = 32;

/// Online softmax over the query rows of one KV head: what has been seen so far, in base e.
/// row i: max [i], sum [i] of exp(s - max), out [i, head_dim] = sum of exp(s - max) v, not yet divided.
/// Empty state: max = -infinity, sum = 0, out = 0. See softmax_state.h for merge and normalise.
struct SoftmaxRows {
  float* max;  ///< [n_row]
  float* sum;  ///< [n_row]
  float* out;  ///< [n_row, head_dim]
};

struct Ops {
  const char* name;  ///< "ref", "SSE4", "AVX2", "AVX3", "AVX3_DL", ...

  void (*f32_to_f16)(const float* x, f16_t* y,
                     int64_t n);  ///< round to nearest even; overflow gives infinity
  void (*f16_to_f32)(const f16_t* x, float* y, int64_t n);

  /// c [m, n] = a [m, k] b [k, n], or += if accumulate.
  void (*gemm)(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
               float* c, int64_t ldc, bool accumulate);

  /// The same with b in half precision.
  void (*gemm_f16)(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const f16_t* b, int64_t ldb,
                   float* c, int64_t ldc, bool accumulate);

  /// Rows of b [k, n] in bfloat16, two a word: out [ceil(k / 2), ldo], word c of row i holds b[2 i][c] in its
  /// low half and b[2 i + 1][c], 0 beyond k, in its high half. b is finite.
  void (*pack_bf16)(const float* b, int64_t ldb, int64_t k, int64_t n, uint32_t* out, int64_t ldo);

  /// c [m, n] (+)= bf16(a) [m, k] b, b [ceil(k / 2), ldb] as pack_bf16() writes it. Sums are float32 (numbers
  /// below 2^-126 may count as 0). a and b are finite.
  void (*gemm_bf16)(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const uint32_t* b,
                    int64_t ldb, float* c, int64_t ldc, bool accumulate);

  /// Rotates rows of head vectors, halves layout: pair (i, i + n_rot/2), angle of row r from cos/sin
  /// [n_rot/2] at r * ld_angle (0: all rows the same angle). x, y [n_row, head_dim]; y may be x. Coordinates
  /// from n_rot on are copied. inverse turns by the negative angle and divides by the magnitude that cos/sin
  /// carry.
  void (*rope_rows)(const float* x, int64_t n_row, int64_t head_dim, int64_t n_rot, const float* cos,
                    const float* sin, int64_t ld_angle, bool inverse, float* y);

  /// The same for a transposed tile of n <= kTile tokens, in place: x [head_dim, ld], cos/sin [n_rot/2,
  /// ld_angle], a column a token.
  void (*rope_tile)(float* x, int64_t ld, int64_t n, int64_t head_dim, int64_t n_rot, const float* cos,
                    const float* sin, int64_t ld_angle);

  /// One KV head, one tile of n <= kTile tokens, all query rows of its group. q [n_row, head_dim] rotated and
  /// scaled by 1/sqrt(head_dim); k_t [head_dim, ldk] (transposed: a column a token); v [n, ldv]. Updates
  /// state. n = 0 leaves it as it is.
  void (*attend_f32)(const float* q, int64_t n_row, int64_t head_dim, const float* k_t, int64_t ldk,
                     const float* v, int64_t ldv, int64_t n, const SoftmaxRows& state);
  void (*attend_f16)(const float* q, int64_t n_row, int64_t head_dim, const f16_t* k_t, int64_t ldk,
                     const f16_t* v, int64_t ldv, int64_t n, const SoftmaxRows& state);

  /// Attention of a prompt, by PrefillKind. prefill_kernel.h says what a kernel does.
  const PrefillKernel* prefill[kPrefillKinds];
  PrefillKind best_prefill;  ///< the fastest of those that lose no quality
  bool native_half;          ///< fp16, pasa and fp16_shift round every product's sum, as half arithmetic does

  /// Asymmetric groups of kGroup, `bits` 2 or 4: y = zero + scale * code. n values make ceil(n / kGroup)
  /// groups; the last may be short. codes: group g at g * kGroup * bits / 8 bytes, value i of a group in byte
  /// i % w, bits (i / w) * bits.., with w = kGroup * bits / 8. params [n_group, 2]: scale, zero as f16.
  void (*dequant_groups)(const uint8_t* codes, const f16_t* params, int64_t n, int bits, float* y);

  /// The inverse: per group zero = f16(min), scale = f16((max - min) / (2^bits - 1)); then, with the rounded
  /// two, code = (x - zero) / scale in float, to nearest even, clamped to the codes. Scale 0 (a constant
  /// group, or one too narrow for f16): all codes 0. Unused codes of a short group are 0. Every target writes
  /// the same bytes. Returns false if a value is NaN or beyond +-65504, the range of f16 (codes and params
  /// are then unspecified).
  bool (*quant_groups)(const float* x, int64_t n, int bits, uint8_t* codes, f16_t* params);

  /// Indices of the `count` largest of score [n] (count <= n), ties to the lower index, written in ascending
  /// order of index. Scores are finite. scratch: select_scratch_bytes(n) bytes, 8-byte aligned.
  void (*select_top)(const float* score, int64_t n, int64_t count, int32_t* index, void* scratch);

  // --- latent pages of kTile tokens (klt); latent_page.h says what planes, amplitudes and slots are. Rows of
  // latent numbers are padded to pad_latent(n_coord): padding is read and written, but has no effect.

  /// Quantises z [kTile, ldz], n_coord coordinates with octet_bits [pad_latent(n_coord) / 8] of 1 to 8 bits:
  /// for each the scale byte [n_coord] with the least squared error of those that kScaleSteps names, and
  /// codes [kTile, ldc] of a byte each. False if a number is not finite or its scale is beyond the table.
  bool (*quant_latents)(const float* z, int64_t ldz, int64_t n_coord, const uint8_t* octet_bits,
                        uint8_t* scales, uint8_t* codes, int64_t ldc);

  /// One token's row of planes to numbers z [pad_latent(8 n_octet)], with the amplitudes of its page
  /// [pad_latent(8 n_octet)].
  void (*unpack_planes)(const uint8_t* row, const PlaneRow& shape, const float* amplitude, float* z);

  /// Index planes of a page, coordinate after coordinate (bits x 8 bytes each, token at index_slot()), to
  /// codes [2 n_octet][kTile][4]: a byte a code, of which the first max_bits bits are kept, coordinate 4 i +
  /// j at [i][token][j].
  void (*expand_index)(const uint8_t* planes, const uint8_t* octet_bits, int64_t n_octet, int max_bits,
                       uint8_t* codes);

  /// score [n_row, lds] at columns [first, first + n) (both multiples of 16) = sum over coordinates of
  /// round8(u step) (code - centre), plus u [n_coord]: u [n_row, ldu >= n_coord + 1], n_coord a multiple of
  /// 8, step and centre [n_coord], codes as expand_index() writes them, at most 6 bits each. round8: to a
  /// multiple of 1/127 of the row's largest. u and step are finite.
  void (*score_index)(const uint8_t* codes, int64_t n_coord, const float* u, int64_t ldu, int64_t n_row,
                      const float* step, const float* centre, int64_t first, int64_t n, float* score,
                      int64_t lds);

  /// What a query [n_rot pairs (x_i, y_i) = (q[i], q[half + i])] becomes under any inverse rotation,
  /// projected on n columns of basis [head_dim, ldb]: out [2 half, ldo], row 2 i = basis[i] x_i + basis[half
  /// + i] y_i (times the cosine of pair i), row 2 i + 1 = basis[i] y_i - basis[half + i] x_i (times its
  /// sine).
  void (*fold_query)(const float* q, int64_t half, const float* basis, int64_t ldb, int64_t n, float* out,
                     int64_t ldo);

  /// Tokens whose pooled probability is at least `floor`: pooled[t] = sum over rows of weight[r] p[r * ldp +
  /// t], t in [0, n). Writes (first + t, pooled[t]) of those, in order of t, and returns how many. A NaN is
  /// none. index and value: room for n.
  int64_t (*pool_candidates)(const float* p, int64_t ldp, int64_t n_row, const float* weight, int64_t n,
                             float floor, int32_t first, int32_t* index, float* value);

  /// How many of value [n] are at least `floor`, and their sum. Values are not negative; a NaN is none. Every
  /// call adds in the same order.
  void (*count_above)(const float* value, int64_t n, float floor, int64_t* count, double* sum);

  /// Indices [n] whose value is above `floor`, and the first n_equal of those whose value equals it, in
  /// order; returns how many. selected: room for n, of which all may be written; it may be `index`.
  int64_t (*keep_above)(const int32_t* index, const float* value, int64_t n, float floor, int64_t n_equal,
                        int32_t* selected);

  /// Amplitudes of scale bytes [n].
  void (*amplitudes)(const uint8_t* scales, int64_t n, float* amplitude);

  /// One token's numbers out of an expanded index: z [n_coord] = (code - centre) step amplitude; n_coord a
  /// multiple of 8.
  void (*read_index)(const uint8_t* codes, int64_t token, int64_t n_coord, const float* step,
                     const float* centre, const float* amplitude, float* z);

  /// Weighted sums of rows of planes: sum [n_row, lds] at [0, 8 n_octet) = sum over tokens i < n of weight[r
  /// * ldw
  /// + i] times row i unpacked with its amplitudes; added to what is there if accumulate. rows, amplitudes: n
  /// pointers, each as unpack_planes() takes them. lds >= pad_latent(8 n_octet): padding may be written.
  void (*sum_planes)(const uint8_t* const* rows, const float* const* amplitudes, int64_t n,
                     const PlaneRow& shape, const float* weight, int64_t ldw, int64_t n_row, bool accumulate,
                     float* sum, int64_t lds);

  /// score [n_row, lds] at [0, n): products of q [n_row, head_dim] with the rows slot[i] of key [..,
  /// head_dim].
  void (*score_rows_f16)(const f16_t* key, const int32_t* slot, int64_t n, const float* q, int64_t n_row,
                         int64_t head_dim, float* score, int64_t lds);

  /// As softmax_part(), within 1e-4 of each number and of the sum: to rank tokens by. 0 may be anything below
  /// 2^-126.
  void (*softmax_scores)(float* s, int64_t n, float* max, float* sum);

  /// s [n], n > 0, finite: replaced by exp(s - max); max and the sum of the results. Exactly 0 below e^-87.3.
  void (*softmax_part)(float* s, int64_t n, float* max, float* sum);

  // --- products of a step with the weights; packed_weights.h says what tiles and byte rows are.

  /// x [n_row, ldx], n_in a multiple of 32, to bytes: per group scale = largest / 127 (a float; codes are 0
  /// if that is below 2^-126), code = x / scale to nearest even. A group with a number that is not finite has
  /// the scale NaN. Every target writes the same bytes.
  void (*round_rows)(const float* x, int64_t ldx, int64_t n_row, int64_t n_in, const ByteRows& out);

  /// y [n_row, ldy] (+)= w x for rows [16 first, 16 (first + n_tile)) of w, as far as there are such: y[r *
  /// ldy + o] is output o of input row r. A result depends neither on n_row nor on how the tiles are shared
  /// out. Sums of 32 products are exact integers (of 16 in q6_k), added up in float.
  void (*packed_product)(const PackedMatrix& w, int64_t first, int64_t n_tile, const ByteRows& x,
                         int64_t n_row, float* y, int64_t ldy, bool accumulate);

  /// Tile `tile` of w as bfloat16 (to nearest even), a row of it a column: out [w.n_in, ld], columns [0, 16);
  /// those of rows beyond n_out are zeros. The numbers that unpack_row() gives, rounded.
  void (*unpack_tile)(const PackedMatrix& w, int64_t tile, uint16_t* out, int64_t ld);

  /// y [n] = x / sqrt(mean of squares + eps) * weight; y may be x.
  void (*rms_norm)(const float* x, const float* weight, int64_t n, float eps, float* y);

  /// y [n] = gate / (1 + exp(-gate)) * up; y may be either.
  void (*swiglu)(const float* gate, const float* up, int64_t n, float* y);
  /// The same with gelu in its tanh form, x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3))).
  void (*geglu)(const float* gate, const float* up, int64_t n, float* y);
  /// gpt-oss's: y [n] = g / (1 + exp(-1.702 g)) * (u + 1) of g = min(gate, 7), u = up within [-7, 7].
  void (*swiglu_clamped)(const float* gate, const float* up, int64_t n, float* y);
  /// y [n] = y / (1 + exp(-gate)).
  void (*sigmoid_gate)(const float* gate, int64_t n, float* y);

  // --- gated DeltaNet; delta_net.h says what a layer of it is.

  /// A causal convolution of every column for itself, then silu: y [n, ldy], columns [0, n_channel), row r =
  /// silu(sum over j < n_conv of w [n_conv, ldw] row j times row r + 1 + j - n_conv of x [n, ldx]); rows
  /// before the first are those of before [n_conv - 1, ldb], the oldest first.
  void (*conv_silu)(const float* x, int64_t ldx, const float* before, int64_t ldb, const float* w,
                    int64_t ldw, int64_t n_conv, int64_t n, int64_t n_channel, float* y, int64_t ldy);

  /// y [n] = x scale / sqrt(sum of squares + eps); y may be x.
  void (*l2_norm)(const float* x, int64_t n, float eps, float scale, float* y);

  /// One token of a head: s [head_dim, head_dim] = decay s + k (x) beta (v - decay s^T k), then out
  /// [head_dim] = s^T q.
  void (*delta_step)(const float* q, const float* k, const float* v, float decay, float beta,
                     int64_t head_dim, float* s, float* out);

  /// The same for n <= kDeltaTile tokens, one after another: kq [2 n, head_dim], rows of k then those of q; v
  /// [n, head_dim]; log_decay [n], at most 0; beta [n]; out [n, ldo]. work: delta_work_floats(head_dim).
  void (*delta_rows)(const float* kq, const float* v, const float* log_decay, const float* beta, int64_t n,
                     int64_t head_dim, float* s, float* out, int64_t ldo, float* work);
};

int64_t select_scratch_bytes(int64_t n);

/// The table in use: the best target of this CPU, or the one that NARROWS_FORCE_TARGET names. Resolved once.
const Ops& ops();

/// ok, or invalid_argument if NARROWS_FORCE_TARGET names a target that is unknown or that this CPU lacks (the
/// sentence lists those that run here); ops() is then the "ref" table. Call at program start.
Status check_forced_target();

/// Tables that run on this machine, best first, "ref" (scalar, double inside) last.
std::vector<const Ops*> available_targets();

}  // namespace narrows::kernels
