// Checks of arguments and plans of the CUDA operators. Nothing here touches a device.
#include "exec/cuda/arguments.h"

#include <algorithm>

namespace narrows::cuda {

namespace {

constexpr int kMostSplits = 128;
/// Tokens of a share that a block of the klt attention has threads for.
constexpr int64_t kKltShare = 240;
constexpr int64_t kMostTokens = int64_t{1} << 20;
constexpr int64_t kMostSequences = 65535;  // of a grid
constexpr int kWidestPart = 256;
constexpr int kMostIndex = 64;
/// Blocks of 128 threads are given about as many selected tokens each, at least.
constexpr int64_t kLeastShare = 64;

/// Lays out parts of a work space, each at a multiple of 256 bytes.
class Layout {
 public:
  size_t add(int64_t count, int64_t each) {
    const size_t at = bytes_;
    bytes_ += (static_cast<size_t>(count) * static_cast<size_t>(each) + 255) / 256 * 256;
    return at;
  }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_ = 0;
};

bool is_aligned(const void* p, size_t to) { return reinterpret_cast<uintptr_t>(p) % to == 0; }

int check_heads(const narrows_cuda_heads& h, bool wide) {
  if (h.n_seq < 1 || h.n_seq > kMostSequences || h.n_head < 1 || h.n_head_kv < 1 ||
      h.n_head % h.n_head_kv != 0 || h.n_head > 65535)
    return NARROWS_CUDA_BAD_ARGUMENT;
  if (h.q == nullptr || h.out == nullptr || !is_aligned(h.q, 16) || !is_aligned(h.out, 16))
    return NARROWS_CUDA_BAD_ARGUMENT;
  const int64_t row = int64_t{h.n_head} * h.head_dim;
  if (h.q_stride < row || h.out_stride < row || h.q_stride % 8 != 0 || h.out_stride % 8 != 0)
    return NARROWS_CUDA_BAD_ARGUMENT;
  if (!(h.scale > 0)) return NARROWS_CUDA_BAD_ARGUMENT;
  if (h.head_dim != 64 && h.head_dim != 128 && !(wide && h.head_dim == 256)) return NARROWS_CUDA_UNSUPPORTED;
  return NARROWS_CUDA_OK;
}

int check_blocks(const narrows_cuda_blocks& b) {
  if (b.pool == nullptr || b.table == nullptr || b.ld < 1 || !is_aligned(b.pool, 16))
    return NARROWS_CUDA_BAD_ARGUMENT;
  return b.block == 16 || b.block == 64 ? NARROWS_CUDA_OK : NARROWS_CUDA_UNSUPPORTED;
}

int check_pages(const narrows_cuda_pages& p) {
  if (p.pool == nullptr || p.table == nullptr || p.n_tokens == nullptr || p.budget == nullptr ||
      p.rope == nullptr || p.position == nullptr || p.exact_count == nullptr || p.n_exact == nullptr)
    return NARROWS_CUDA_BAD_ARGUMENT;
  if (!is_aligned(p.pool, 16) || !is_aligned(p.rope, 16) || p.page_bytes < 16 || p.page_bytes % 16 != 0)
    return NARROWS_CUDA_BAD_ARGUMENT;
  if (p.n_max < 1 || p.n_max > kMostTokens || p.ld < (p.n_max + NARROWS_CUDA_PAGE - 1) / NARROWS_CUDA_PAGE ||
      p.max_budget < 1 || p.max_budget > p.n_max || p.n_sink < 0)
    return NARROWS_CUDA_BAD_ARGUMENT;
  if (p.exact.block != NARROWS_CUDA_BLOCK) return NARROWS_CUDA_BAD_ARGUMENT;
  return check_blocks(p.exact);
}

int check_kept(const narrows_cuda_kept& k, const narrows_cuda_pages& p) {
  if (k.keys == nullptr || k.token_of == nullptr || k.slot_of == nullptr || k.hand == nullptr ||
      !is_aligned(k.keys, 16))
    return NARROWS_CUDA_BAD_ARGUMENT;
  if (k.capacity < p.max_budget || k.capacity % 16 != 0 || k.capacity > 65520 || k.ld < p.n_max)
    return NARROWS_CUDA_BAD_ARGUMENT;
  return NARROWS_CUDA_OK;
}

/// Of `rows` rows; false if a byte lies outside its row.
bool is_row(const narrows_cuda_planes& p, int64_t page_bytes, int octets) {
  if (p.n_plane < 0 || p.n_plane > 8 || p.n_octet != octets || p.at < 0 || p.at % 16 != 0 || p.stride < 0 ||
      p.stride % 8 != 0 || p.at + int64_t{p.stride} * NARROWS_CUDA_PAGE > page_bytes)
    return false;
  if (p.n_plane == 0) return octets == 0;
  if (p.octets[0] != octets) return false;
  for (int j = 0; j < p.n_plane; ++j) {
    if (p.octets[j] < 1 || (j > 0 && p.octets[j] > p.octets[j - 1]) || p.offset[j] < 0 ||
        p.offset[j] + p.octets[j] > p.stride)
      return false;
  }
  return true;
}

int check_part(const narrows_cuda_klt_part& part, int64_t page_bytes, int64_t width) {
  if (part.key_decode == nullptr || part.key_mean == nullptr || part.value_decode == nullptr ||
      part.value_mean == nullptr)
    return NARROWS_CUDA_BAD_ARGUMENT;
  if (part.n_key < 16 || part.n_key % 16 != 0 || part.n_key > width + 8 || part.n_value < 8 ||
      part.n_value % 8 != 0 || part.n_value > width || part.n_index < 8 || part.n_index % 8 != 0 ||
      part.n_index > part.n_key)
    return NARROWS_CUDA_BAD_ARGUMENT;
  if (part.n_index > kMostIndex || part.n_key > kWidestPart) return NARROWS_CUDA_UNSUPPORTED;
  const int rest = part.rest.n_octet;
  if (part.key_scale_at < 8 || part.key_scale_at + part.n_key > page_bytes || part.value_scale_at < 8 ||
      part.value_scale_at % 4 != 0 || part.value_scale_at + part.n_value > page_bytes)
    return NARROWS_CUDA_BAD_ARGUMENT;
  if (rest < 0 || part.n_index + rest * 8 > part.n_key || part.n_key - (part.n_index + rest * 8) > 8)
    return NARROWS_CUDA_BAD_ARGUMENT;
  if (!is_row(part.index, page_bytes, part.n_index / 8) || !is_row(part.rest, page_bytes, rest) ||
      !is_row(part.value, page_bytes, part.n_value / 8))
    return NARROWS_CUDA_BAD_ARGUMENT;
  return NARROWS_CUDA_OK;
}

SelectionPlan plan_selection(Layout& layout, int64_t n_list, int64_t budget) {
  SelectionPlan at;
  at.selected = layout.add(n_list * budget, 4);
  at.n_selected = layout.add(n_list, 4);
  at.slot = layout.add(n_list * budget, 2);
  at.missing = layout.add(n_list * budget, 4);
  at.n_missing = layout.add(n_list, 4);
  return at;
}

}  // namespace

int plan_splits(int64_t n_list, int64_t most, int n_sm, int blocks_of_sm) {
  const int64_t slots = std::max<int64_t>(1, int64_t{n_sm} * blocks_of_sm);
  most = std::clamp<int64_t>(most, 1, kMostSplits);
  int best = 1;
  double least = 0;
  for (int64_t n = 1; n <= most; ++n) {
    const int64_t rounds = (n_list * n + slots - 1) / slots;
    // A share costs its length and, for its start and end, a little more.
    const double time =
        static_cast<double>(rounds) * (1.0 / static_cast<double>(n) + 0.5 / static_cast<double>(most));
    if (n == 1 || time < least * 0.98) {
      least = time;
      best = static_cast<int>(n);
    }
  }
  return best;
}

int plan_f16(const narrows_cuda_f16_args& args, int n_sm, F16Plan& plan) {
  const narrows_cuda_heads& h = args.heads;
  if (const int status = check_heads(h, true); status != NARROWS_CUDA_OK) return status;
  if (const int status = check_blocks(args.blocks); status != NARROWS_CUDA_OK) return status;
  if (args.n_tokens == nullptr || args.n_max < 1 || args.n_max > (1 << 30) || args.window < 0 ||
      int64_t{args.blocks.ld} * args.blocks.block < args.n_max)
    return NARROWS_CUDA_BAD_ARGUMENT;
  plan.group = h.n_head / h.n_head_kv;
  plan.n_chunk = (plan.group + kTileHeads - 1) / kTileHeads;
  const int64_t seen = args.window > 0 ? std::min(args.n_max, args.window) : args.n_max;
  const int64_t n_list = int64_t{h.n_seq} * h.n_head_kv * plan.n_chunk;
  plan.n_split = plan_splits(n_list, (seen + 4 * kLeastShare - 1) / (4 * kLeastShare), n_sm,
                             h.head_dim == 256 ? 2 : kBlocksOfSm);
  Layout layout;
  layout.add(n_list, 4);
  plan.states = layout.add(int64_t{h.n_seq} * h.n_head * plan.n_split, (h.head_dim + 4) * 4);
  plan.bytes = layout.bytes();
  return NARROWS_CUDA_OK;
}

int plan_sals(const narrows_cuda_sals_args& args, int n_sm, SalsPlan& plan) {
  const narrows_cuda_heads& h = args.heads;
  if (const int status = check_heads(h, false); status != NARROWS_CUDA_OK) return status;
  if (const int status = check_pages(args.pages); status != NARROWS_CUDA_OK) return status;
  if (args.kept.keys != nullptr) {
    if (const int status = check_kept(args.kept, args.pages); status != NARROWS_CUDA_OK) return status;
  }
  const int64_t width = int64_t{h.n_head_kv} * h.head_dim;
  if (args.basis == nullptr || !is_aligned(args.basis, 16) || args.rank < 1 || args.rank_score < 1 ||
      args.rank_score > args.rank || args.codes_offset % 16 != 0 || args.params_offset % 16 != 0)
    return NARROWS_CUDA_BAD_ARGUMENT;
  if (args.value_bits != 2 && args.value_bits != 4 && args.value_bits != 16) return NARROWS_CUDA_UNSUPPORTED;
  if (args.rank % 64 != 0 || args.rank > 1024 || args.rank_score % 32 != 0) return NARROWS_CUDA_UNSUPPORTED;
  const int64_t page = NARROWS_CUDA_PAGE;
  if (args.codes_offset < page * args.rank * 2 ||
      args.codes_offset + page * width * args.value_bits / 8 > args.pages.page_bytes)
    return NARROWS_CUDA_BAD_ARGUMENT;
  if (args.value_bits != 16 &&
      (args.params_offset < 0 || args.params_offset + page * (width / 32) * 4 > args.pages.page_bytes))
    return NARROWS_CUDA_BAD_ARGUMENT;
  plan.group = h.n_head / h.n_head_kv;
  if (plan.group > kTileHeads) return NARROWS_CUDA_UNSUPPORTED;
  const int64_t budget = args.pages.max_budget;
  plan.n_split = plan_splits(int64_t{h.n_seq} * h.n_head_kv, (budget + kLeastShare - 1) / kLeastShare, n_sm,
                             kBlocksOfSm);
  // A share's scores and values are in shared memory, of which every target has room for two blocks or more.
  const int64_t a_token = 4 + 4 * plan.group + h.head_dim * args.value_bits / 8 + h.head_dim / 8;
  while (plan.n_split < kMostSplits && budget / plan.n_split * a_token > 20000) ++plan.n_split;
  plan.n_project = static_cast<int>((width + 127) / 128);
  plan.n_chunk = (args.pages.n_max + kSalsScoreTokens - 1) / kSalsScoreTokens;
  Layout layout;
  plan.counter = layout.add(int64_t{h.n_seq} * h.n_head_kv, 4);
  plan.project_counter = layout.add(h.n_seq, 4);
  plan.at = plan_selection(layout, h.n_seq, budget);
  plan.latent_query = layout.add(int64_t{h.n_seq} * 2 * args.rank_score, 2);
  plan.projected = layout.add(int64_t{plan.n_project} * h.n_seq * args.rank_score, 4);
  plan.query = layout.add(int64_t{h.n_seq} * h.n_head * h.head_dim, 4);
  plan.scores = layout.add(int64_t{h.n_seq} * args.pages.n_max, 4);
  plan.logits = layout.add(int64_t{h.n_seq} * h.n_head * (h.head_dim / 64) * budget, 4);
  plan.states = layout.add(int64_t{h.n_seq} * h.n_head * plan.n_split, (h.head_dim + 4) * 4);
  plan.bytes = layout.bytes();
  return NARROWS_CUDA_OK;
}

int plan_klt(const narrows_cuda_klt_args& args, int n_sm, KltPlan& plan) {
  const narrows_cuda_heads& h = args.heads;
  if (const int status = check_heads(h, false); status != NARROWS_CUDA_OK) return status;
  if (const int status = check_pages(args.pages); status != NARROWS_CUDA_OK) return status;
  if (const int status = check_kept(args.kept, args.pages); status != NARROWS_CUDA_OK) return status;
  if (args.parts == nullptr || args.host_parts == nullptr || args.turns == nullptr || args.n_part < 1 ||
      h.n_head_kv % args.n_part != 0 || !(args.mass > 0) || args.mass > 1 || !is_aligned(args.turns, 16))
    return NARROWS_CUDA_BAD_ARGUMENT;
  plan.heads_of_part = h.n_head_kv / args.n_part;
  const int64_t width = int64_t{plan.heads_of_part} * h.head_dim;
  if (width > kWidestPart) return NARROWS_CUDA_UNSUPPORTED;
  plan.most_planes = 0;
  for (int i = 0; i < args.n_part; ++i) {
    if (const int status = check_part(args.host_parts[i], args.pages.page_bytes, width);
        status != NARROWS_CUDA_OK)
      return status;
    plan.most_planes = std::max(plan.most_planes, static_cast<int>(args.host_parts[i].value.stride));
  }
  plan.group = h.n_head / h.n_head_kv;
  if (plan.group > kTileHeads || plan.group * plan.heads_of_part > 32) return NARROWS_CUDA_UNSUPPORTED;
  plan.columns = 1;
  while (plan.columns < plan.group) plan.columns *= 2;
  plan.n_sm = n_sm;
  // Fewer pages a block where that keeps more of the device busy.
  const int64_t n_page = (int64_t{args.pages.n_max} + NARROWS_CUDA_PAGE - 1) / NARROWS_CUDA_PAGE;
  plan.score_pages = kScorePages;
  while (plan.score_pages > kScorePages / 4 &&
         int64_t{h.n_seq} * args.n_part * n_page < int64_t{n_sm} * plan.score_pages)
    plan.score_pages /= 2;
  plan.n_chunk = static_cast<int>((n_page + plan.score_pages - 1) / plan.score_pages);
  const int64_t budget = args.pages.max_budget, n_list = int64_t{h.n_seq} * h.n_head_kv;
  // A share is no more than a block's threads, and its rows and weights fit shared memory of every target.
  const int64_t room = std::min<int64_t>(kKltShare, 40000 / (plan.most_planes + 6 + 4 * plan.group));
  const int64_t least = (budget + room - 1) / room;
  plan.n_split = plan_splits(n_list * least, std::max<int64_t>(1, budget / (least * kLeastShare)), n_sm,
                             plan.group <= 2 ? kKltBlocksOfSm + 1 : kKltBlocksOfSm);
  plan.n_split = static_cast<int>(plan.n_split * least);
  plan.ld_latent = kWidestPart;
  const int64_t ld =
      (int64_t{args.pages.n_max} + NARROWS_CUDA_PAGE - 1) / NARROWS_CUDA_PAGE * NARROWS_CUDA_PAGE;
  Layout layout;
  plan.counter = layout.add(n_list, 4);
  plan.at = plan_selection(layout, n_list, budget);
  plan.scores = layout.add(int64_t{h.n_seq} * h.n_head * ld, 4);
  plan.totals = layout.add(int64_t{h.n_seq} * h.n_head * plan.n_chunk, 8);
  plan.exact = layout.add(int64_t{h.n_seq} * h.n_head, (h.head_dim + 4) * 4);
  plan.states = layout.add(int64_t{h.n_seq} * h.n_head * plan.n_split, 8);
  plan.latents = layout.add(int64_t{h.n_seq} * h.n_head * plan.n_split * plan.ld_latent, 4);
  plan.hist = layout.add(n_list * kKltHistogram, 4);
  plan.decision = layout.add(n_list, 16);
  plan.taken = layout.add(n_list * (ld / 32), 4);
  plan.few = layout.add(n_list * kSelectFew, 8);
  plan.rows = layout.add(n_list * budget, 2);
  plan.bytes = layout.bytes();
  return NARROWS_CUDA_OK;
}

}  // namespace narrows::cuda
