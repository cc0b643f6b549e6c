// The host side of the CUDA operators: refusals, plans and work spaces, without nvcc or a device.
#include "exec/cuda/arguments.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

namespace narrows::cuda {
namespace {

constexpr int kSm = 132;

/// Never read: the host looks at null and alignment alone.
template <class T>
T* some() {
  return reinterpret_cast<T*>(uintptr_t{4096});
}

narrows_cuda_heads heads(int n_seq, int n_head, int n_head_kv, int head_dim) {
  const int64_t row = int64_t{n_head} * head_dim;
  return {n_seq, n_head, n_head_kv, head_dim, some<void>(), some<void>(), row, row, 0.1F};
}

narrows_cuda_pages pages(int n_max, int budget, int64_t page_bytes) {
  narrows_cuda_pages p{};
  p.pool = some<void>();
  p.table = some<int32_t>();
  p.ld = (n_max + 63) / 64;
  p.n_max = n_max;
  p.page_bytes = page_bytes;
  p.n_tokens = some<int32_t>();
  p.budget = some<int32_t>();
  p.max_budget = budget;
  p.n_sink = 16;
  p.rope = some<float>();
  p.position = some<int32_t>();
  p.exact = {some<void>(), some<int32_t>(), 8, 16};
  p.exact_count = some<uint8_t>();
  p.n_exact = some<int32_t>();
  return p;
}

narrows_cuda_kept kept(int n_max, int capacity) {
  return {some<void>(), some<int32_t>(), some<uint16_t>(), some<uint32_t>(), capacity, n_max};
}

narrows_cuda_f16_args f16(int n_seq, int n_head, int n_head_kv, int head_dim, int n_max) {
  return {heads(n_seq, n_head, n_head_kv, head_dim),
          {some<void>(), some<int32_t>(), (n_max + 63) / 64, 64},
          some<int32_t>(),
          n_max,
          0};
}

narrows_cuda_sals_args sals(int n_seq, int n_head, int n_head_kv, int n_max, int budget, int rank, int bits) {
  const int64_t width = int64_t{n_head_kv} * 128;
  narrows_cuda_sals_args a{};
  a.heads = heads(n_seq, n_head, n_head_kv, 128);
  a.codes_offset = 64 * rank * 2;
  a.params_offset = a.codes_offset + 64 * width * bits / 8;
  a.pages = pages(n_max, budget, a.params_offset + (bits < 16 ? 64 * width / 32 * 4 : 0));
  a.basis = some<void>();
  a.rank = rank;
  a.rank_score = rank / 2;
  a.value_bits = bits;
  return a;
}

/// Octets of falling bits in rows at `at`.
narrows_cuda_planes rows(int at, const std::vector<int>& bits) {
  narrows_cuda_planes p{};
  p.at = at;
  p.n_octet = static_cast<int>(bits.size());
  for (int j = 0, n = 0; j < 8; ++j) {
    int covered = 0;
    for (const int b : bits) covered += b > j ? 1 : 0;
    if (covered == 0) break;
    p.octets[j] = covered;
    p.offset[j] = n;
    n += covered;
    p.n_plane = j + 1;
    p.stride = (n + 7) / 8 * 8;
  }
  return p;
}

struct Klt {
  explicit Klt(int n_seq = 2, int n_head = 8, int n_head_kv = 4, int n_max = 4096, int budget = 432) {
    part.key_scale_at = 16;
    part.n_key = part.n_value = 256;
    part.value_scale_at = 16 + 256;
    part.n_index = 32;
    part.index = rows(528, {7, 6, 6, 5});
    part.rest = rows(528 + 64 * part.index.stride, std::vector<int>(28, 2));
    part.value = rows(part.rest.at + 64 * part.rest.stride, std::vector<int>(32, 3));
    part.key_decode = some<uint32_t>();
    part.key_mean = part.value_mean = some<float>();
    part.value_decode = some<void>();
    args.heads = heads(n_seq, n_head, n_head_kv, 128);
    args.pages = pages(n_max, budget, part.value.at + 64 * part.value.stride);
    args.kept = kept(n_max, (budget + 63) / 64 * 64);
    args.parts = some<narrows_cuda_klt_part>();
    args.n_part = n_head_kv / 2;
    parts.assign(static_cast<size_t>(args.n_part), part);
    args.mass = 1;
    args.turns = some<float>();
  }
  int plan(KltPlan& to) {
    parts.assign(parts.size(), part);
    args.host_parts = parts.data();
    return plan_klt(args, kSm, to);
  }
  narrows_cuda_klt_part part{};
  std::vector<narrows_cuda_klt_part> parts;
  narrows_cuda_klt_args args{};
};

TEST(CudaArguments, SharesFillTheDevice) {
  EXPECT_EQ(plan_splits(512, 16, kSm, 4), 1);  // one round of 528 blocks, nearly full
  EXPECT_GE(plan_splits(8, 512, kSm, 4), 32);  // few lists: many shares
  EXPECT_EQ(plan_splits(1000000, 1, kSm, 4), 1);
  for (int64_t n = 1; n < 3000; n = n * 3 / 2 + 1) {
    for (const int64_t most : {1, 2, 7, 64, 100000}) {
      const int split = plan_splits(n, most, kSm, 4);
      EXPECT_GE(split, 1);
      EXPECT_LE(split, most);
      EXPECT_LE(split, 128);
    }
  }
}

TEST(CudaArguments, F16) {
  F16Plan plan;
  EXPECT_EQ(plan_f16(f16(16, 32, 8, 128, 4096), kSm, plan), NARROWS_CUDA_OK);
  EXPECT_EQ(plan.group, 4);
  EXPECT_EQ(plan.n_chunk, 1);
  EXPECT_GE(plan.bytes, plan.states + size_t{16} * 32 * static_cast<size_t>(plan.n_split) * 132 * 4);
  EXPECT_EQ(plan_f16(f16(1, 9, 1, 64, 1), kSm, plan), NARROWS_CUDA_OK);
  EXPECT_EQ(plan.n_chunk, 2);  // nine query heads: two blocks of up to eight

  EXPECT_EQ(plan_f16(f16(1, 8, 8, 96, 64), kSm, plan), NARROWS_CUDA_UNSUPPORTED);
  EXPECT_EQ(plan_f16(f16(1, 8, 3, 128, 64), kSm, plan), NARROWS_CUDA_BAD_ARGUMENT);
  EXPECT_EQ(plan_f16(f16(0, 8, 8, 128, 64), kSm, plan), NARROWS_CUDA_BAD_ARGUMENT);
  auto args = f16(1, 8, 8, 128, 200);
  args.blocks.ld = 3;  // 192 tokens
  EXPECT_EQ(plan_f16(args, kSm, plan), NARROWS_CUDA_BAD_ARGUMENT);
  args = f16(1, 8, 8, 128, 200);
  args.heads.q = reinterpret_cast<void*>(uintptr_t{4104});
  EXPECT_EQ(plan_f16(args, kSm, plan), NARROWS_CUDA_BAD_ARGUMENT);
  args = f16(1, 8, 8, 128, 200);
  args.heads.q_stride += 4;
  EXPECT_EQ(plan_f16(args, kSm, plan), NARROWS_CUDA_BAD_ARGUMENT);
}

TEST(CudaArguments, Sals) {
  SalsPlan plan;
  EXPECT_EQ(plan_sals(sals(16, 32, 32, 4096, 432, 512, 2), kSm, plan), NARROWS_CUDA_OK);
  auto args = sals(1, 32, 8, 4096, 432, 128, 4);
  EXPECT_EQ(plan_sals(args, kSm, plan), NARROWS_CUDA_OK);
  args.kept = kept(4096, 431);  // fewer than are selected
  EXPECT_EQ(plan_sals(args, kSm, plan), NARROWS_CUDA_BAD_ARGUMENT);
  args.kept = kept(4096, 448);
  EXPECT_EQ(plan_sals(args, kSm, plan), NARROWS_CUDA_OK);
  args.pages.page_bytes -= 16;
  EXPECT_EQ(plan_sals(args, kSm, plan), NARROWS_CUDA_BAD_ARGUMENT);
  EXPECT_EQ(plan_sals(sals(1, 32, 8, 4096, 432, 96, 4), kSm, plan), NARROWS_CUDA_UNSUPPORTED);
  EXPECT_EQ(plan_sals(sals(1, 32, 8, 4096, 432, 128, 3), kSm, plan), NARROWS_CUDA_UNSUPPORTED);
  EXPECT_EQ(plan_sals(sals(1, 32, 2, 4096, 432, 64, 4), kSm, plan),
            NARROWS_CUDA_UNSUPPORTED);  // 16 heads a KV head
}

TEST(CudaArguments, Klt) {
  KltPlan plan;
  Klt good;
  ASSERT_EQ(good.plan(plan), NARROWS_CUDA_OK);
  EXPECT_EQ(plan.group, 2);
  EXPECT_EQ(plan.heads_of_part, 2);
  EXPECT_EQ(plan.score_pages, 4);  // three sequences of two parts leave a device idle: fewer pages a block
  EXPECT_EQ(plan.n_chunk, 16);
  {
    Klt many(64);
    ASSERT_EQ(many.plan(plan), NARROWS_CUDA_OK);
    EXPECT_EQ(plan.score_pages, kScorePages);
    EXPECT_EQ(plan.n_chunk, 4);
  }
  EXPECT_LE(432 / plan.n_split + 1, 240);  // a share has no more tokens than its block has threads for
  {
    Klt k;
    k.args.mass = 0;
    EXPECT_EQ(k.plan(plan), NARROWS_CUDA_BAD_ARGUMENT);
  }
  {
    Klt k;
    k.part.value.stride = 60;  // rows are read in words of 8 bytes
    EXPECT_EQ(k.plan(plan), NARROWS_CUDA_BAD_ARGUMENT);
  }
  {
    Klt k;
    k.part.rest.offset[1] = k.part.rest.stride;  // a plane outside its row
    EXPECT_EQ(k.plan(plan), NARROWS_CUDA_BAD_ARGUMENT);
  }
  {
    Klt k;
    k.part.index.n_octet = 3;  // not what n_index says
    EXPECT_EQ(k.plan(plan), NARROWS_CUDA_BAD_ARGUMENT);
  }
  {
    Klt k;
    k.args.pages.page_bytes -= 16;  // the last row outside the page
    EXPECT_EQ(k.plan(plan), NARROWS_CUDA_BAD_ARGUMENT);
  }
  {
    Klt k(1, 64, 4);
    EXPECT_EQ(k.plan(plan), NARROWS_CUDA_UNSUPPORTED);  // 16 query heads a KV head
  }
}

/// Parts of a work space follow each other without overlap, each whole.
TEST(CudaArguments, WorkSpacesHoldTheirParts) {
  for (const int n_max : {64, 4096, 131072}) {
    Klt k(3, 8, 4, n_max, n_max < 432 ? n_max : 432);
    KltPlan plan;
    ASSERT_EQ(k.plan(plan), NARROWS_CUDA_OK);
    const size_t lists = 3 * 4, budget = static_cast<size_t>(k.args.pages.max_budget);
    const std::vector<std::pair<size_t, size_t>> parts = {
        {plan.counter, lists * 4},
        {plan.at.selected, lists * budget * 4},
        {plan.at.n_selected, lists * 4},
        {plan.at.slot, lists * budget * 2},
        {plan.at.missing, lists * budget * 4},
        {plan.at.n_missing, lists * 4},
        {plan.scores, size_t{3} * 8 * static_cast<size_t>(n_max) * 4},
        {plan.totals, size_t{3} * 8 * static_cast<size_t>(plan.n_chunk) * 8},
        {plan.exact, size_t{3} * 8 * 132 * 4},
        {plan.states, size_t{3} * 8 * static_cast<size_t>(plan.n_split) * 8},
        {plan.latents, size_t{3} * 8 * static_cast<size_t>(plan.n_split) * 256 * 4},
    };
    size_t end = 0;
    for (const auto& [at, bytes] : parts) {
      EXPECT_GE(at, end);
      EXPECT_EQ(at % 256, 0U);
      end = at + bytes;
    }
    EXPECT_LE(end, plan.bytes);
  }
}

}  // namespace
}  // namespace narrows::cuda
