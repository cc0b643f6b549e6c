// append() of tokens that lie on a device, which makes sums, shares of attention and pages there: the host
// makes the transforms and picks anchors.
#include <algorithm>
#include <bit>

#include "kv/klt/klt_layer.h"

namespace narrows {

bool KltLayer::can_append_from() const {
  if (plan().segmented) return false;
  if (n_tokens() == 0) return true;
  if (!has_codec() || n_tokens() < n_sink()) return false;
  // The samples of tokens that are held are sent there.
  for (int64_t pos = n_sink() + n_in_pages(); options_.anchors > 0 && pos < n_tokens(); pos += kQueryStride) {
    if (samples_.at(pos) == nullptr) return false;
  }
  return true;
}

Status KltLayer::append_from(KltRowSource& source, int64_t n) {
  const bool samples = options_.anchors > 0;
  Status status;
  try {
    if (!has_codec()) {
      queries_.push_back({0, std::make_shared<KltStatistics>(shape())});
      status = source.add_queries(*queries_.back().sums);
    }
    source_ = &source;
    if (status.ok()) status = append_rows(source, n);
    source_ = nullptr;
    if (status.ok() && samples) {
      // What is no longer needed is that of tokens in pages.
      const int64_t first = n_sink() + n_in_pages();
      std::vector<kernels::f16_t> rows;
      status = source.samples(first, rows);
      if (status.ok()) samples_.replace(first, n_tokens(), std::move(rows));
    }
  } catch (const std::bad_alloc&) {
    source_ = nullptr;
    status = no_memory_for_tokens(n_tokens() + n);
  }
  return status;
}

Status KltLayer::encode_there(int64_t first, int64_t last, const Incoming& incoming) {
  const int64_t n_page = (last - first) / kPageTokens, pos = n_sink() + first;
  std::vector<AnchorBits> anchors(static_cast<size_t>(n_page), 0);
  if (options_.anchors > 0) {
    std::vector<float> share;
    if (Status s = source_->find_shares(pos, n_page, n_judging(), rotated_sinks(incoming), share); !s.ok())
      return s;
    const int64_t end = n_tokens() + incoming.n;
    int64_t n_anchor = n_kept();
    for (int64_t i = 0; i < n_page; ++i) {
      const int64_t n_after = std::min(end - pos - (i + 1) * kPageTokens, n_judging());
      const int64_t n_query = ceil_div(n_after, kQueryStride);
      if (n_query <= 0) continue;
      const int64_t most = options_.anchors * (first / kPageTokens + i + 1) - n_anchor;
      anchors[static_cast<size_t>(i)] = pick_anchors(
          share.data() + i * kPageTokens, kAnchorShare * static_cast<float>(n_query * shape().n_head), most);
      n_anchor += std::popcount(anchors[static_cast<size_t>(i)]);
      for (AnchorBits bits = anchors[static_cast<size_t>(i)]; bits != 0; bits &= bits - 1)
        keep_exact(first + i * kPageTokens + std::countr_zero(bits));
    }
  }
  const int64_t first_page = first / kPageTokens;
  const Result<int64_t> bad =
      source_->encode(first_page, anchors, [this](int64_t p) { return mutable_page(p); });
  if (!bad.ok()) return bad.status();
  return *bad < 0 ? Status() : non_finite_token(n_sink() + *bad * kPageTokens);
}

}  // namespace narrows
