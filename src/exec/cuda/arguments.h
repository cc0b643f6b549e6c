// What the host decides before a launch: arguments checked, the work cut for the device, the work space laid
// out. Plain C++ without CUDA, so that tests need no device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "narrows/cuda_ops.h"

namespace narrows::cuda {

/// Query heads that a block attends with; larger groups take several.
inline constexpr int kTileHeads = 8;
/// Pages that a block scores at most: the rows of a tensor core's product.
inline constexpr int kScorePages = 16;
/// Tokens that a block of SALS scores: a tile a warp.
inline constexpr int kSalsScoreTokens = 64;
/// Threads that make an SM busy in the attention kernels: blocks of 128 threads, four an SM.
inline constexpr int kBlocksOfSm = 4;
inline constexpr int kKltBlocksOfSm = 2;
/// Bins of the histogram of a selection's keys, and tokens that one bin leaves undecided to be compared
/// directly.
inline constexpr int kSelectBins = 4096;
inline constexpr int kSelectFew = 1024;
/// Words: the bins, then the mass in every 16 of them.
inline constexpr int kKltHistogram = kSelectBins + kSelectBins / 16;
/// What plans are made for when nobody asked a device: an H100.
inline constexpr int kSmOfH100 = 132;

/// Parts [1, most] of each of n_list lists, so that all blocks together fill whole rounds of the device as
/// well as they can.
int plan_splits(int64_t n_list, int64_t most, int n_sm, int blocks_of_sm);

struct F16Plan {
  int group = 0, n_chunk = 0, n_split = 0;
  size_t states = 0, bytes = 0;
};

/// Of SALS and klt alike: lists are sequences or KV heads of sequences.
struct SelectionPlan {
  size_t selected = 0, n_selected = 0, slot = 0, missing = 0, n_missing = 0;
};

struct SalsPlan {
  int group = 0, n_split = 0, n_project = 0, n_chunk = 0;
  SelectionPlan at;
  size_t counter = 0, project_counter = 0, projected = 0, latent_query = 0, query = 0, scores = 0, logits = 0,
         states = 0, bytes = 0;
};

struct KltPlan {
  int group = 0;
  int columns = 0;        ///< query heads of a KV head, rounded up to a power of two
  int heads_of_part = 0;  ///< KV heads
  int n_sm = 0;           ///< of the device
  int score_pages = 0;    ///< that a block scores, at most kScorePages
  int n_chunk = 0;        ///< of as many pages, in scoring
  int n_split = 0;        ///< of what is selected, in attending
  int ld_latent = 0;      ///< floats of a head's sum of value latents
  int most_planes = 0;    ///< bytes of the longest row of value planes
  SelectionPlan at;
  size_t counter = 0, scores = 0, totals = 0, exact = 0, latents = 0, states = 0, bytes = 0;
  /// Of selecting, a list each: kKltHistogram counts, a Decision, a bit a token, kSelectFew tokens with their
  /// keys, rows for a whole budget.
  size_t hist = 0, decision = 0, taken = 0, few = 0, rows = 0;
};

/// Each returns a narrows_cuda_status; the plan is whole if it is NARROWS_CUDA_OK.
int plan_f16(const narrows_cuda_f16_args& args, int n_sm, F16Plan& plan);
int plan_sals(const narrows_cuda_sals_args& args, int n_sm, SalsPlan& plan);
int plan_klt(const narrows_cuda_klt_args& args, int n_sm, KltPlan& plan);

}  // namespace narrows::cuda
