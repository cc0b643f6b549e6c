// What the program and libnarrows_cuda.so say to each other: a table of functions over device memory, found
// by name when the library is loaded. Plain structs and numbers; no CUDA type. The library's operators of
// attention over caches are beside it, in narrows/cuda_ops.h. Every function makes `device` the calling
// thread's; it does not throw, and what it launches goes to the stream given and is not waited for unless it
// says so. Results: 0, or a code whose sentence error() has. Row-major, fastest dimension last.
#pragma once

#include <cstdint>

#include "narrows/cuda_ops.h"

namespace narrows::device {

/// Of this header: a program and a library that were built of different ones do not go together.
inline constexpr int kApiVersion = 4;
inline constexpr const char* kApiSymbol = "narrows_cuda_device_api";

/// Tokens of a block of a cache on the device: f16 keys, rotated, [n_head_kv][64][head_dim], then values.
inline constexpr int64_t kBlockTokens = 64;

struct Info {
  char name[128];
  int32_t major, minor;  ///< compute capability
  int64_t total_bytes, free_bytes;
};

/// A matrix [n_out, n_in]; form: a kernels::Packing (its tiles), or one of those below, then rows.
inline constexpr int32_t kRowsF32 = 100, kRowsF16 = 101, kRowsBf16 = 102;
struct Weights {
  const void* data;
  int32_t form;
  int64_t n_in, n_out;
};

enum Gate : int32_t { kNoGate = 0, kSilu = 1, kGelu = 2 };

/// Where input i of a row is among its codes: of 32 inputs, the words (four inputs) that go with words w and
/// 4 + w of a tile's group stand together, for w = 0 .. 3.
constexpr int64_t code_at(int64_t i) {
  const int64_t k = i % 32;
  return i - k + k % 16 / 4 * 8 + k / 16 * 4 + k % 4;
}

/// Rows of inputs in the forms that products take: of x [n, ldx] normed (norm null: as they are), or of
/// gate(x) * up. Outputs [n, width] each, null where not wanted; code and scale: rounded to bytes in groups
/// of 32 as kernels::ref::round_rows does it, a row's in the order of code_at(), scale [n, width / 32].
struct PrepareArgs {
  const void* x;
  int32_t x_is_f16;
  int32_t gate;
  int64_t ldx;
  const float* up;
  int64_t ld_up;
  const float* norm;
  float eps;
  int64_t n, width;
  float* f32;
  void* bf16;
  int8_t* code;
  float* scale;
};

/// Matrices that a product takes at once: queries, keys and values, say.
inline constexpr int kMostMatrices = 4;

/// y [n, ldy] (+)= w x + bias, a row's numbers whatever the other rows are. Tiles take code and scale, rows
/// take f32. The matrices have one n_in; their outputs stand side by side in a row of y.
struct MultiplyArgs {
  Weights w[kMostMatrices];
  const float* bias[kMostMatrices];
  int64_t n_matrix;
  const int8_t* code;
  const float* scale;
  const float* f32;
  int64_t n;
  float* y;
  int64_t ldy;
  int32_t accumulate;
};

/// One matrix and many rows, of bf16 x [n, n_in] and a matrix [n_out, n_in] that unpack() made bf16; n_in is
/// a multiple of 32.
struct GemmArgs {
  const void* x;
  const void* w;
  int64_t n, n_in, n_out;
  const float* bias;
  float* y;
  int64_t ldy;
  int32_t accumulate;
};

/// x [n, width] += factor * norm(y).
struct AddArgs {
  float* x;
  const float* y;
  const float* norm;
  float eps, factor;
  int64_t n, width;
};

/// `runs` runs of `width` numbers of each row are normed in place.
struct HeadNormArgs {
  float* x;
  int64_t ld, n, runs, width;
  const float* norm;
  float eps;
};

/// Rotates q and k of n rows (row r at r * ld) and stores keys and values where the cache has them: row r is
/// token position[r] of sequence[r] (null: all of the first), whose block b, of `block` tokens, is
/// table[sequence * ld_table + b] of the pool. angles [n, n_rot / 2, 2]: cosine, sine. factor [n] or null: on
/// queries. q_out f16 [n, n_head, head_dim]; q_plain the same before RoPE, or null. bad [n] becomes 1 for a
/// row whose key or value half precision cannot hold.
struct StoreArgs {
  const float *q, *k, *v;
  int64_t ld, n;
  int32_t n_head, n_head_kv, head_dim, n_rot;
  const float* angles;
  const float* factor;
  void* q_out;
  void* pool;
  const int32_t* table;
  int64_t ld_table;
  const int32_t* sequence;
  const int32_t* position;
  int32_t* bad;
  void* q_plain;
  int32_t block;
};

/// Attention of n rows of one sequence, positions first .. first + n - 1, each to all tokens up to its own,
/// or the last `window` of them (0: all). q, out f16 [n, n_head, head_dim]; head_dim 64 or 128.
struct PromptArgs {
  const void* q;
  void* out;
  const void* pool;
  const int32_t* table;
  int32_t n_head, n_head_kv, head_dim, window;
  int64_t first, n;
  float scale;
};

/// Sums and second moments of rows: matrix m has, of row r of x, the n_sub vectors of `width` numbers that
/// begin at r * ld + m * stride + s * width. x is float32 or bf16. centre [n_matrix, width] is taken away
/// from each vector; makes_centre: it is first made the mean of the rows (n_sub 1). sum [n_matrix, width] and
/// moments [n_matrix, width, width], both sides of the diagonal: set, or added to if accumulate is not 0.
/// Products are summed in float32 over kMomentVectors vectors, those sums in double. workspace:
/// moments_bytes(). width: at most 256.
inline constexpr int64_t kMomentVectors = 256;
struct MomentsArgs {
  const void* x;
  int32_t x_is_bf16, accumulate;
  int64_t ld, n, stride;
  int32_t n_matrix, n_sub, width, makes_centre;
  float* centre;
  double* sum;
  double* moments;
  float* workspace;
};
/// Pieces of the rows whose float32 sums are apart.
constexpr int64_t moment_slices(int64_t n, int64_t n_sub) {
  const int64_t rows = kMomentVectors / n_sub < 1 ? 1 : kMomentVectors / n_sub;
  return (n + rows - 1) / rows;
}
constexpr int64_t moments_bytes(int64_t n, int64_t n_sub, int64_t n_matrix, int64_t width) {
  return moment_slices(n, n_sub) * n_matrix * width * (width + 1) * 4;
}

/// Every step-th row of x [.., ld], from row `first` on, n of them: to f16 [n, width].
struct SampleArgs {
  const float* x;
  int64_t ld, first, step, n, width;
  void* to;
};

/// How much attention the tokens of a klt page get from the sampled queries after it (kv/klt/klt_anchor.h).
/// Page p has the tokens at positions position + 64 p ..; keys before RoPE, that of position `position`
/// first, n_token of them in all; sinks [n_sink, ld] float32, rotated. samples f16 [.., n_head, head_dim]:
/// queries before RoPE at positions position + 16 i. Query i of page p, at 64 (p + 1) + 16 i, i < 4, judges
/// if fewer than n_after tokens come between the page and it and it is there; it sees the sinks, the page,
/// and what follows up to itself. rope: as narrows_cuda_pages. share [n_page, n_head_kv, 64]: sums of
/// probabilities over queries and heads of the group. n_sink is at most 128, group at most 8; head_dim 64 or
/// 128.
struct KltSharesArgs {
  const float *keys, *sinks;
  int64_t ld, n_token, position;
  const void* samples;
  const float* rope;
  int32_t n_head, n_head_kv, head_dim, n_sink, n_after, n_page;
  float scale;
  float* share;
};

/// Writes klt pages: of rows k, v [64 n_page, ld] before RoPE into the pages table[p] of the pool, all bytes,
/// as narrows_cuda_klt_part describes them, heads of a part in `width` channels (at most 256). project
/// [n_part][2][width][width]: of keys and values, z = (x - mean) project, a column a coordinate. bits uint8
/// [n_part][2][32]: of each octet of coordinates, 0 where there is none. anchors [n_page]: tokens stored as
/// their mean. bad [n_page] becomes 1 for a page with a number that cannot be stored, see quant_latents() of
/// kernels/ops.h.
struct KltEncodeArgs {
  const float *k, *v;
  int64_t ld;
  const uint64_t* anchors;
  const narrows_cuda_klt_part* parts;
  const float* project;
  const uint8_t* bits;
  int32_t n_part, width, n_page, reserved;
  void* pool;
  const int32_t* table;
  int64_t page_bytes;
  int32_t* bad;
};

struct CopyArgs {
  void* to;
  const void* from;
  int64_t bytes;
};

/// One of the operators that a graph may hold. args: of its kind; workspace and bytes of the decode
/// operators.
enum Kind : int32_t { kPrepare, kMultiply, kAdd, kHeadNorm, kStore, kF16Decode, kKltDecode, kCopy };
struct Call {
  int32_t kind;
  const void* args;
  void* workspace;
  size_t bytes;
};

struct Api {
  int version;
  /// The sentence of this thread's last failure; never null.
  const char* (*error)();
  /// Cards; the CUDA version that the driver knows (0: there is no driver) and the library's own, 1000 major
  /// + 10 minor. With a driver of an older major there are none.
  int (*count)(int* n, int* driver, int* needed);
  /// Fails if the library has no machine code for the card.
  int (*info)(int device, Info* info);
  /// 0 with *p = null: there is no room.
  int (*allocate)(int device, int64_t bytes, void** p);
  void (*release)(int device, void* p);
  int (*make_stream)(int device, void** stream);
  void (*end_stream)(int device, void* stream);
  /// In the stream's order; host memory is free again, or holds what was asked for, when they return.
  int (*upload)(int device, void* to, const void* from, int64_t bytes, void* stream);
  int (*download)(int device, void* to, const void* from, int64_t bytes, void* stream);
  /// n runs of `bytes`, to_ld and from_ld bytes apart.
  int (*download_rows)(int device, void* to, int64_t to_ld, const void* from, int64_t from_ld, int64_t bytes,
                       int64_t n, void* stream);
  int (*copy)(int device, void* to, const void* from, int64_t bytes, void* stream);
  int (*fill)(int device, void* to, int byte, int64_t bytes, void* stream);
  int (*wait)(int device, void* stream);

  int (*prepare)(int device, const PrepareArgs*, void* stream);
  int (*multiply)(int device, const MultiplyArgs*, void* stream);
  int (*unpack)(int device, const Weights*, void* bf16, void* stream);
  int (*gemm)(int device, const GemmArgs*, void* stream);
  int (*add)(int device, const AddArgs*, void* stream);
  int (*head_norm)(int device, const HeadNormArgs*, void* stream);
  int (*store)(int device, const StoreArgs*, void* stream);
  int (*prompt)(int device, const PromptArgs*, void* stream);
  int (*f16_workspace)(int device, const narrows_cuda_f16_args*, size_t* bytes);
  int (*f16_decode)(int device, const narrows_cuda_f16_args*, void* workspace, size_t bytes, void* stream);
  int (*klt_workspace)(int device, const narrows_cuda_klt_args*, size_t* bytes);
  int (*klt_decode)(int device, const narrows_cuda_klt_args*, void* workspace, size_t bytes, void* stream);
  int (*klt_selection)(int device, const narrows_cuda_klt_args*, narrows_cuda_selection* at);

  /// What n calls would do, one after the other, as one piece of work that may be launched again and again;
  /// args and what they point to on the host are not needed after. Launches nothing.
  int (*make_graph)(int device, const Call* calls, int64_t n, void** graph);
  int (*launch_graph)(int device, void* graph, void* stream);
  void (*end_graph)(int device, void* graph);

  /// n runs of `bytes` on the device, to_ld and from_ld bytes apart.
  int (*copy_rows)(int device, void* to, int64_t to_ld, const void* from, int64_t from_ld, int64_t bytes,
                   int64_t n, void* stream);
  int (*moments)(int device, const MomentsArgs*, void* stream);
  int (*sample)(int device, const SampleArgs*, void* stream);
  int (*klt_shares)(int device, const KltSharesArgs*, void* stream);
  int (*klt_encode)(int device, const KltEncodeArgs*, void* stream);
};

/// What the library exports as kApiSymbol.
using ApiFunction = const Api*();

}  // namespace narrows::device
