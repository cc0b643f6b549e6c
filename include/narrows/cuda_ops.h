/* Attention of a decode step on a CUDA device, as operators for an engine or for Python's ctypes.
 *
 * Every pointer but the argument structs themselves points to device memory. An operator allocates nothing, throws
 * nothing and does not wait for the device: it checks what the host can check, launches on the stream given and returns a
 * narrows_cuda_status. Lengths, tables and positions are read on the device, so a captured CUDA graph serves a growing
 * context; what the host gives (n_max, ...) only bounds them. Shapes are row-major, fastest dimension last; f16 is IEEE
 * half. Nothing beyond a length or count is read into a result: tails of blocks and pages may hold NaN.
 *
 * Work space: narrows_cuda_*_workspace() says how many bytes, aligned to 256. It must be zeros before its first use by one
 * operator with one set of sizes; every call leaves the part that must be zero as zeros (klt: the first 4 n_seq n_head_kv bytes, whatever the other sizes are).
 * One work space serves one stream.
 */
#ifndef NARROWS_CUDA_OPS_H
#define NARROWS_CUDA_OPS_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define NARROWS_CUDA_API __attribute__((visibility("default")))
#else
#define NARROWS_CUDA_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum narrows_cuda_status {
  NARROWS_CUDA_OK = 0,
  NARROWS_CUDA_BAD_ARGUMENT = 1, /* a null pointer, a size below 1, heads that do not divide */
  NARROWS_CUDA_UNSUPPORTED = 2,  /* a head_dim, rank or bit rate that no kernel was built for */
  NARROWS_CUDA_SMALL_WORKSPACE = 3,
  NARROWS_CUDA_LAUNCH_FAILED = 4 /* what cudaGetLastError() said: narrows_cuda_last_error() */
};

/* Name of the CUDA error of this thread's last NARROWS_CUDA_LAUNCH_FAILED; never null. */
NARROWS_CUDA_API const char* narrows_cuda_last_error(void);

/* Tokens of a page of the SALS and klt caches, and of a block of exact tokens beside them. */
#define NARROWS_CUDA_PAGE 64
#define NARROWS_CUDA_BLOCK 16

/* The heads of a step. group = n_head / n_head_kv query heads share a KV head; head_dim is 64 or 128 (f16 operator: 256
 * too). q and out are f16 [n_seq][n_head][head_dim] with q_stride and out_stride elements between sequences, a multiple
 * of 8, pointers aligned to 16. scale multiplies q . k. */
struct narrows_cuda_heads {
  int32_t n_seq, n_head, n_head_kv, head_dim;
  const void* q;
  void* out;
  int64_t q_stride, out_stride;
  float scale;
};

/* Exact tokens in blocks of `block` tokens (16 or 64): f16 keys, rotated, [n_head_kv][block][head_dim], then values of the
 * same shape. table [n_seq][ld]: indices of a sequence's blocks in the pool. */
struct narrows_cuda_blocks {
  const void* pool;
  const int32_t* table;
  int32_t ld;
  int32_t block;
};

/* --- f16: attention to all tokens of a sequence, or to its last `window` ones (0: all). Token t is in block
 * table[seq][t / block]. q is rotated. n_tokens [n_seq], each 0 to n_max; a sequence of none gives zeros. */
struct narrows_cuda_f16_args {
  struct narrows_cuda_heads heads;
  struct narrows_cuda_blocks blocks;
  const int32_t* n_tokens;
  int32_t n_max;
  int32_t window;
};

NARROWS_CUDA_API int narrows_cuda_f16_workspace(const struct narrows_cuda_f16_args* args, size_t* bytes);
NARROWS_CUDA_API int narrows_cuda_f16_decode(const struct narrows_cuda_f16_args* args, void* workspace, size_t bytes, void* stream);

/* Rebuilt keys that stay from step to step: `capacity` rows (a multiple of 16, at most 65520, at least max_budget) a list;
 * a list is a sequence (SALS: rows of n_head_kv * head_dim) or a KV head of a sequence (klt: rows of head_dim).
 * keys f16 [n_list][capacity][row], token_of int32 [n_list][capacity] (-1: none), slot_of uint16 [n_list][ld] (0xFFFF: not
 * held), hand uint32 [n_list]: where the next key that leaves is looked for. A new list has token_of -1, slot_of 0xFFFF,
 * hand 0. Of a token that is in pages for good the key never changes, so what is held never changes a result. */
struct narrows_cuda_kept {
  void* keys;
  int32_t* token_of;
  uint16_t* slot_of;
  uint32_t* hand;
  int32_t capacity;
  int32_t ld;
};

/* Encoded tokens and exact ones beside them, as the SALS and klt caches have them.
 * Token t of the pages (position n_sink + t) is in page table[seq][t / 64] of the pool, page_bytes apart (a multiple of 16,
 * pool aligned to 16). n_tokens [n_seq], each 0 to n_max (at most 2^20; klt: whole pages). budget [n_seq]: most tokens
 * read of them, at most max_budget. rope f32 [positions][head_dim / 2][2]: cosine and sine of pair (i, i + head_dim / 2).
 * position [n_seq]: of the query, whose q is not rotated yet.
 * exact: blocks of NARROWS_CUDA_BLOCK tokens; count uint8 [n_seq][ld] of the tokens in each, n_exact int32 [n_seq] blocks. */
struct narrows_cuda_pages {
  const void* pool;
  const int32_t* table;
  int32_t ld;
  int32_t n_max;
  int64_t page_bytes;
  const int32_t* n_tokens;
  const int32_t* budget;
  int32_t max_budget;
  int32_t n_sink;
  const float* rope;
  const int32_t* position;
  struct narrows_cuda_blocks exact;
  const uint8_t* exact_count;
  const int32_t* n_exact;
};

/* --- SALS (arXiv:2510.24273). A page: latents f16 [64][rank], the first rank_score of a row are scored; at codes_offset
 * value codes uint8 [64][D * bits / 8], groups of 32 along D = n_head_kv * head_dim as kernels::dequant_groups reads them;
 * at params_offset f16 [64][D / 32][2]: scale, zero. (The CPU's page with the index part token by token.) value_bits 2 or 4, or
 * 16: no params, and f16 values [64][D] at codes_offset. Offsets are multiples of 16; rank a multiple of 64, at most 1024; rank_score
 * a multiple of 32. basis f16 [D][rank]. kept.keys may be null: then keys are rebuilt at every step. */
struct narrows_cuda_sals_args {
  struct narrows_cuda_heads heads;
  struct narrows_cuda_pages pages;
  struct narrows_cuda_kept kept;
  const void* basis;
  int32_t rank, rank_score, value_bits, reserved;
  int64_t codes_offset, params_offset;
};

NARROWS_CUDA_API int narrows_cuda_sals_workspace(const struct narrows_cuda_sals_args* args, size_t* bytes);
NARROWS_CUDA_API int narrows_cuda_sals_decode(const struct narrows_cuda_sals_args* args, void* workspace, size_t bytes, void* stream);

/* Rows of bit planes (kernels::PlaneRow): plane j of a token's row is octets[j] bytes at offset[j], bit i of byte o is
 * coordinate 8 o + i; a coordinate of b bits is the signs of A (+-1 +- 1/2 ..). `at`: of row 0 in the page; `stride` between
 * rows, both multiples of 16, so that the bytes after the last plane are padding. */
struct narrows_cuda_planes {
  int32_t at, stride, n_plane, n_octet;
  int32_t octets[8], offset[8];
};

/* One part of a klt page: `heads` KV heads whose channels share a transform, at most 256 channels.
 * A page begins with its anchors, a uint64. key_scale_at, value_scale_at: a byte a coordinate, A = 2^((s - 128) / 8).
 * index: the first n_index key coordinates (a multiple of 8, at most 128), rest: the others, value: all value coordinates.
 * The three are the CPU's planes token by token (its index has a plane of 64 tokens a coordinate).
 * key_decode bf16 pairs, uint32 [n_key / 2][width]: low half row 2 i, high half row 2 i + 1 of the inverse transform (n_key a multiple
 * of 16, padded with zeros); key_mean f32 [width]; value_decode f16 [n_value][width], value_mean f32 [width]. */
struct narrows_cuda_klt_part {
  int32_t key_scale_at, value_scale_at;
  int32_t n_key, n_value, n_index, reserved;
  struct narrows_cuda_planes index, rest, value;
  const uint32_t* key_decode;
  const float* key_mean;
  const void* value_decode;
  const float* value_mean;
};

/* --- klt. parts: DEVICE array [n_part], n_part * heads_of_part = n_head_kv; host_parts: the same on the host.
 * turns f32 [pages][head_dim / 2][2]: cosine and sine of a page's centre, times what averaging over the page leaves.
 * mass: share of the attention that selecting stops at, in (0, 1]; 1: the whole budget is read. */
struct narrows_cuda_klt_args {
  struct narrows_cuda_heads heads;
  struct narrows_cuda_pages pages;
  struct narrows_cuda_kept kept;
  const struct narrows_cuda_klt_part* parts;
  const struct narrows_cuda_klt_part* host_parts;
  int32_t n_part;
  float mass;
  const float* turns;
};

NARROWS_CUDA_API int narrows_cuda_klt_workspace(const struct narrows_cuda_klt_args* args, size_t* bytes);
NARROWS_CUDA_API int narrows_cuda_klt_decode(const struct narrows_cuda_klt_args* args, void* workspace, size_t bytes, void* stream);

/* For tests and benches: where the last call left what it selected, [n_list][max_budget] int32 ascending, their number [n_list], and
 * how many of them had to be rebuilt [n_list]: offsets in bytes in the work space. */
struct narrows_cuda_selection {
  size_t selected, n_selected, n_missing;
};
NARROWS_CUDA_API int narrows_cuda_sals_selection(const struct narrows_cuda_sals_args* args, struct narrows_cuda_selection* at);
NARROWS_CUDA_API int narrows_cuda_klt_selection(const struct narrows_cuda_klt_args* args, struct narrows_cuda_selection* at);

#ifdef __cplusplus
}
#endif

#endif
