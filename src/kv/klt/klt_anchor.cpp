// A page's search is one small product a KV head: sampled queries of its group times the keys' transposition.
#include "kv/klt/klt_anchor.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "kernels/ops.h"
#include "kv/layout.h"

namespace narrows {

using kernels::f16_t;
using kernels::ops;

void QuerySamples::add(const float* q, int64_t n) {
  const int64_t end = next_ + n;
  int64_t n_new = 0;
  for (int64_t pos = std::max(first_, next_); pos < end; ++pos) n_new += (pos - first_) % kQueryStride == 0;
  rows_.reserve(rows_.size() + static_cast<size_t>(n_new * width_));  // all that can fail
  for (int64_t pos = std::max(first_, next_); pos < end; ++pos) {
    if ((pos - first_) % kQueryStride != 0) continue;
    const size_t at = rows_.size();
    rows_.resize(at + static_cast<size_t>(width_));
    ops().f32_to_f16(q + (pos - next_) * width_, rows_.data() + at, width_);
  }
  next_ = end;
}

void QuerySamples::drop_before(int64_t pos) {
  const int64_t n =
      std::min((pos - first_ + kQueryStride - 1) / kQueryStride, static_cast<int64_t>(rows_.size()) / width_);
  if (n <= 0) return;
  rows_.erase(rows_.begin(), rows_.begin() + n * width_);
  first_ += n * kQueryStride;
  rows_.shrink_to_fit();
}

void QuerySamples::drop_from(int64_t pos) {
  next_ = pos;
  const int64_t n = pos > first_ ? (pos - first_ + kQueryStride - 1) / kQueryStride : 0;
  if (n * width_ < static_cast<int64_t>(rows_.size())) {
    rows_.resize(static_cast<size_t>(n * width_));
    rows_.shrink_to_fit();
  }
  // Positions before first_ may come again: the next one that is sampled, counted from the sinks.
  if (pos < first_)
    first_ = n_sink_ + std::max<int64_t>(0, pos - n_sink_ + kQueryStride - 1) / kQueryStride * kQueryStride;
}

void QuerySamples::save(SnapshotWriter& out) const {
  out.number(first_);
  out.number(next_);
  out.array(rows_);
}

void QuerySamples::load(SnapshotReader& in, int64_t n_ctx) {
  first_ = in.count(n_sink_, n_sink_ + n_ctx + kQueryStride);
  next_ = in.count(0, n_ctx);
  const int64_t n = next_ > first_ ? ceil_div(next_ - first_, kQueryStride) : 0;
  rows_ = in.array<f16_t>(static_cast<uint64_t>(n * width_));
  if ((first_ - n_sink_) % kQueryStride != 0) in.fail();
}

const f16_t* QuerySamples::at(int64_t pos) const {
  const int64_t off = pos - first_;
  if (off < 0 || off % kQueryStride != 0) return nullptr;
  const auto row = static_cast<size_t>(off / kQueryStride * width_);
  return row < rows_.size() ? rows_.data() + row : nullptr;
}

uint64_t pick_anchors(float* share, float least, int64_t most) {
  uint64_t anchors = 0;
  while (std::popcount(anchors) < most) {
    const float* best = std::max_element(share, share + kPageTokens);
    if (!(*best >= least)) break;
    anchors |= uint64_t{1} << (best - share);
    share[best - share] = 0;
  }
  return anchors;
}

uint64_t find_anchors(const AttentionShape& shape, const kernels::RopeTable& rope,
                      const QuerySamples& queries, const AnchorSearch& search, int64_t most) {
  const int64_t d = shape.head_dim, group = shape.group(), width = shape.width(), half = rope.n_rot() / 2;
  const int64_t n_key = search.n_sink + kPageTokens + search.n_after;
  std::vector<int64_t> after;  // distances of the judging queries from the page's end
  for (int64_t i = 0; i < search.n_after; ++i) {
    if (queries.at(search.pos + kPageTokens + i) != nullptr) after.push_back(i);
  }
  if (after.empty() || most <= 0) return 0;

  const auto n_query = static_cast<int64_t>(after.size());
  std::vector<float> q(static_cast<size_t>(n_query * shape.n_head * d));  // [n_query, n_head, d] rotated
  for (int64_t i = 0; i < n_query; ++i) {
    const int64_t pos = search.pos + kPageTokens + after[static_cast<size_t>(i)];
    float* row = q.data() + i * shape.n_head * d;
    ops().f16_to_f32(queries.at(pos), row, shape.n_head * d);
    float cos[kMaxHeadDim / 2];
    float sin[kMaxHeadDim / 2];
    rope.at(pos, cos, sin);
    ops().rope_rows(row, shape.n_head, d, 2 * half, cos, sin, 0, false, row);
  }
  std::vector<float> rows(static_cast<size_t>(group * n_query * d));
  std::vector<float> key_t(static_cast<size_t>(d * n_key));
  std::vector<float> score(static_cast<size_t>(group * n_query * n_key));
  float share[kPageTokens] = {};
  for (int64_t h = 0; h < shape.n_head_kv; ++h) {
    for (int64_t t = 0; t < n_key; ++t) {
      const float* key =
          (t < search.n_sink ? search.sinks + t * width : search.page + (t - search.n_sink) * width) + h * d;
      for (int64_t c = 0; c < d; ++c) key_t[static_cast<size_t>(c * n_key + t)] = key[c];
    }
    for (int64_t i = 0; i < n_query; ++i) {
      std::copy_n(q.data() + (i * shape.n_head + h * group) * d, group * d, rows.data() + i * group * d);
    }
    ops().gemm(n_query * group, n_key, d, rows.data(), d, key_t.data(), n_key, score.data(), n_key, false);
    for (int64_t r = 0; r < n_query * group; ++r) {
      float* s = score.data() + r * n_key;
      const int64_t seen = search.n_sink + kPageTokens + after[static_cast<size_t>(r / group)] + 1;
      for (int64_t t = 0; t < seen; ++t) s[t] *= shape.scale;
      float top = 0;
      float sum = 0;
      ops().softmax_part(s, seen, &top, &sum);
      for (int64_t t = 0; t < kPageTokens; ++t) share[t] += s[search.n_sink + t] / sum;
    }
  }

  return pick_anchors(share, kAnchorShare * static_cast<float>(n_query * shape.n_head), most);
}

}  // namespace narrows
