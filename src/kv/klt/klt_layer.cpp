// Statistics -> transforms -> pages, and pages back to keys and values.
#include "kv/klt/klt_layer.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>

namespace narrows {

using kernels::ops;

namespace {

/// Pages that are worth an encoder of their own.
constexpr int64_t kLeastRun = 4;

/// Tokens whose statistics are worth the threads of a prompt. A step's single token is not, and those threads
/// would then spin beside the step's own: 81 instead of 290 tokens a second.
constexpr int64_t kLeastShared = 32;

}  // namespace

// --- statistics ---

KltStatistics::KltStatistics(const AttentionShape& shape)
    : shape_(shape), heads_(heads_of_part(shape.n_head_kv, shape.head_dim)) {
  query_.assign(static_cast<size_t>(shape.n_head_kv), KeyMoments(shape.head_dim));
}

void KltStatistics::add(const float* k, const float* v, int64_t n, Workers* workers) {
  // Only now: layers that wait for tokens need room for queries alone.
  for (int64_t h = 0; key_.size() * static_cast<size_t>(heads_) < query_.size(); h += heads_) {
    key_.emplace_back(heads_ * shape_.head_dim);
    value_.emplace_back(heads_ * shape_.head_dim);
  }
  for_each(workers, 2 * static_cast<int64_t>(key_.size()), [&](int64_t task) {
    const int64_t p = task / 2, channel = p * heads_ * shape_.head_dim;
    CentredMoments& moments = task % 2 == 0 ? key_[static_cast<size_t>(p)] : value_[static_cast<size_t>(p)];
    moments.add((task % 2 == 0 ? k : v) + channel, shape_.width(), n);
  });
}

void KltStatistics::add_queries(const float* q, int64_t n, Workers* workers) {
  const int64_t d = shape_.head_dim;
  for_each(n < kLeastShared ? nullptr : workers, shape_.n_head_kv, [&](int64_t h_kv) {
    std::vector<float> rows(static_cast<size_t>(n * d));
    for (int64_t h = h_kv * shape_.group(); h < (h_kv + 1) * shape_.group(); ++h) {
      for (int64_t t = 0; t < n; ++t) std::copy_n(q + (t * shape_.n_head + h) * d, d, rows.data() + t * d);
      query_[static_cast<size_t>(h_kv)].add(rows.data(), n);
    }
  });
  n_queries_ += n;
}

void KltStatistics::add_queries(const KltStatistics& other) {
  for (size_t h = 0; h < query_.size(); ++h) query_[h].add(other.query_[h]);
  n_queries_ += other.n_queries_;
}

void KltStatistics::add_query_sums(int64_t n, const double* sum, const double* moments) {
  const int64_t d = shape_.head_dim;
  for (size_t h = 0; h < query_.size(); ++h, sum += d, moments += d * d)
    query_[h].add_sums(n * shape_.group(), sum, moments);
  n_queries_ += n;
}

void KltStatistics::set_sums(bool of_values, int64_t n, const float* centre, const double* sum,
                             const double* moments) {
  const int64_t width = heads_ * shape_.head_dim;
  std::vector<CentredMoments>& to = of_values ? value_ : key_;
  to.clear();
  for (int64_t p = 0; p < shape_.n_head_kv / heads_; ++p)
    to.emplace_back(width).set_sums(centre + p * width, n, sum + p * width, moments + p * width * width);
}

void KltStatistics::save_queries(SnapshotWriter& out) const {
  out.number(n_queries_);
  for (const KeyMoments& m : query_) m.save(out);
}

void KltStatistics::load_queries(SnapshotReader& in) {
  n_queries_ = in.count(0, int64_t{1} << 40);
  for (KeyMoments& m : query_) m.load(in);
}

Result<KltLayerBasis> KltStatistics::basis(const DistanceAverage& distances,
                                           const std::vector<double>& value_weight, Workers* workers) const {
  const int64_t square = shape_.head_dim * shape_.head_dim;
  const size_t n_part = key_.size();
  KltLayerBasis out{std::vector<KltBasis>(n_part), std::vector<KltBasis>(n_part)};
  std::vector<Status> status(2 * n_part);
  for_each(workers, static_cast<int64_t>(status.size()), [&](int64_t task) {
    const auto p = static_cast<size_t>(task / 2), first = p * static_cast<size_t>(heads_);
    const bool is_key = task % 2 == 0;
    std::vector<double> weight;
    for (size_t h = first; is_key && h < first + static_cast<size_t>(heads_); ++h) {
      std::vector<double> c = query_[h].moments();
      for (double& x : c) x /= static_cast<double>(std::max<int64_t>(1, query_[h].n_tokens()));
      const std::vector<double> seen = distances.apply(c.data());
      weight.insert(weight.end(), seen.begin(), seen.end());
    }
    if (!is_key) {
      const auto begin = value_weight.begin() + static_cast<int64_t>(first) * square;
      weight.assign(begin, begin + heads_ * square);
    }
    Result<KltBasis> made = make_klt_basis(is_key ? key_[p] : value_[p], weight, shape_.head_dim);
    status[static_cast<size_t>(task)] = made.status();
    if (made.ok()) (is_key ? out.key : out.value)[p] = std::move(*made);
  });
  for (const Status& s : status) {
    if (!s.ok()) return s;
  }
  return out;
}

// --- layer ---

KltLayer::KltLayer(int64_t layer, const AttentionShape& shape, const kernels::RopeTable* rope,
                   const WindowPlan& plan, const KvProfile& profile, const KltOptions& options,
                   std::shared_ptr<const DistanceAverage> distances, ValueWeightFn value_weight)
    : WindowedLayer(shape, rope, plan, 0),
      layer_(layer),
      options_(options),
      distances_(std::move(distances)),
      value_weight_(std::move(value_weight)),
      heads_(heads_of_part(shape.n_head_kv, shape.head_dim)),
      samples_(shape, plan.n_sink),
      parts_(std::make_shared<const std::vector<KltPart>>()),
      hot_keys_(static_cast<size_t>(shape.n_head_kv), KltHotKeys(shape.head_dim)),
      profile_(profile) {}

Status KltLayer::use_basis(const KltLayerBasis& basis) {
  Status s = set_transforms(basis);
  from_file_ = s.ok();
  return s;
}

int64_t KltLayer::segment_of(int64_t pos) const {
  if (!plan().segmented) return 0;
  // The later half of what the transforms are made from: enough queries, and less to keep for each segment.
  // All that come later count as one: no segment that may be forgotten ends among them.
  if (pos < plan().n_exact / 2) return -1;
  return (std::min(pos, plan().n_exact) - plan().n_sink) / kSegmentTokens;
}

int64_t KltLayer::n_queries_seen() const {
  int64_t n = 0;
  for (const QueryStatistics& s : queries_) n += s.sums->n_queries();
  return n;
}

int64_t KltLayer::query_stride() const {
  const bool needs_all = !has_codec() && n_queries_seen() < kKltEnd;
  return needs_all || n_sink() % kQueryStride != 0 ? 1 : kQueryStride;
}

void KltLayer::observe_queries(const float* q, int64_t n) {
  if (options_.anchors > 0) samples_.add(q, n);
  if (has_codec()) return;
  // A step is counted when its query comes here, a prompt's tokens are not.
  const int64_t segment = segment_of(n_tokens());
  if (segment < 0) return;
  if (n_queries_seen() >= kKltEnd) return;
  if (queries_.empty() || queries_.back().segment != segment)
    queries_.push_back({segment, std::make_shared<KltStatistics>(shape())});
  std::shared_ptr<KltStatistics>& sums = queries_.back().sums;
  if (sums.use_count() > 1) sums = std::make_shared<KltStatistics>(*sums);
  sums->add_queries(q, n, workers());
}

Status KltLayer::set_transforms(const KltLayerBasis& basis) {
  std::vector<KltTransform> keys, values;
  for (size_t p = 0; p < basis.key.size(); ++p) {
    Result<KltTransform> key = make_klt_transform(basis.key[p], options_.key_rate);
    if (!key.ok()) return key.status();
    Result<KltTransform> value = make_klt_transform(basis.value[p], options_.value_rate);
    if (!value.ok()) return value.status();
    keys.push_back(std::move(*key));
    values.push_back(std::move(*value));
  }
  set_parts(std::move(keys), std::move(values));
  return {};
}

void KltLayer::set_parts(std::vector<KltTransform> keys, std::vector<KltTransform> values) {
  std::vector<KltPart> parts;
  int64_t page_bytes = kPageHeader;
  const auto n_part = static_cast<int64_t>(keys.size());
  for (int64_t p = 0; p < n_part; ++p) {
    parts.emplace_back(p * heads_ * shape().head_dim, std::move(keys[static_cast<size_t>(p)]),
                       std::move(values[static_cast<size_t>(p)]),
                       ceil_div(ceil_div(options_.n_index, n_part), kernels::kOctet) * kernels::kOctet,
                       page_bytes);
    page_bytes = parts.back().layout().end();
  }
  parts_ = std::make_shared<const std::vector<KltPart>>(std::move(parts));
  set_page_bytes(page_bytes);
  queries_.clear();
}

Status KltLayer::make_codec(const Incoming& incoming) {
  const int64_t width = shape().width();
  const int64_t n_held = n_tokens();
  const int64_t n_all = n_held + incoming.n;
  if (has_codec() || n_all < tokens_for_klt(width)) return {};

  KltStatistics statistics(shape());
  for (const QueryStatistics& s : queries_) statistics.add_queries(*s.sums);
  const int64_t end = std::min(n_all, kKltEnd);
  std::vector<float> k(static_cast<size_t>(kPageTokens * width));
  std::vector<float> v(k.size());
  for (int64_t pos = kKltBegin; pos < std::min(end, n_held); pos += kPageTokens) {
    const int64_t n = std::min({kPageTokens, end - pos, n_held - pos});
    read(pos, n, k.data(), v.data());
    rotate_keys(shape(), rope(), pos, n, /*inverse=*/true, k.data(), k.data());
    statistics.add(k.data(), v.data(), n);
  }
  const int64_t skip = std::max<int64_t>(0, kKltBegin - n_held);
  if (source_ != nullptr) {
    if (Status s = source_->set_rows(skip, end - n_held - skip, statistics); !s.ok()) return s;
  } else if (end > n_held + skip)
    statistics.add(incoming.k + skip * width, incoming.v + skip * width, end - n_held - skip, workers());

  std::vector<double> value_weight;
  if (Status s =
          source_ != nullptr ? source_->value_weight(value_weight) : value_weight_(layer_, value_weight);
      !s.ok())
    return s;
  const Result<KltLayerBasis> basis = statistics.basis(*distances_, value_weight, workers());
  if (!basis.ok()) return basis.status();
  return set_transforms(*basis);
}

int64_t KltLayer::codec_bytes() const {
  int64_t n = samples_.bytes();
  for (const KltPart& part : *parts_) n += part.bytes();
  return n;
}

int64_t KltLayer::hot_bytes() const {
  int64_t n = 0;
  for (const KltHotKeys& keys : hot_keys_) n += keys.bytes();
  return n;
}

void KltLayer::drop_codec() {
  for (KltHotKeys& keys : hot_keys_) keys.clear();
  if (from_file_) return;
  // This runs after a failure, and must not fail itself: it makes nothing.
  static const auto none = std::make_shared<const std::vector<KltPart>>();
  parts_ = none;
  queries_.clear();
}

void KltLayer::share_codec(const WindowedLayer& other, int64_t n) {
  const auto& from = static_cast<const KltLayer&>(other);
  parts_ = from.parts_;
  from_file_ = from.from_file_;
  queries_ = from.queries_;
  samples_ = from.samples_;
  samples_.drop_from(n);
  forget_from(n);
}

// A saved codec: whether there are transforms, and they, or else what queries have shown so far.

void KltLayer::save_codec(SnapshotWriter& out) const {
  out.number(int64_t{has_codec()});
  for (const KltPart& part : *parts_) {
    part.key_transform().save(out);
    part.value().save(out);
  }
  samples_.save(out);
  if (has_codec()) return;
  out.number(static_cast<int64_t>(queries_.size()));
  for (const QueryStatistics& s : queries_) {
    out.number(s.segment);
    s.sums->save_queries(out);
  }
}

void KltLayer::load_codec(SnapshotReader& in) {
  if (in.count(0, 1) != 0) {
    std::vector<KltTransform> keys, values;
    for (int64_t h = 0; h < shape().n_head_kv && in.ok(); h += heads_) {
      keys.push_back(load_klt_transform(in, heads_ * shape().head_dim, shape().head_dim));
      values.push_back(load_klt_transform(in, heads_ * shape().head_dim, shape().head_dim));
    }
    if (in.ok()) set_parts(std::move(keys), std::move(values));
    samples_.load(in, rope().n_ctx());
    return;
  }
  samples_.load(in, rope().n_ctx());
  std::vector<QueryStatistics> queries(static_cast<size_t>(in.count(0, 2 * kKltEnd / kSegmentTokens)));
  int64_t last = -1;
  for (QueryStatistics& s : queries) {
    s.segment = last = in.count(last + 1, rope().n_ctx());
    s.sums = std::make_shared<KltStatistics>(shape());
    s.sums->load_queries(in);
    if (!in.ok()) return;
  }
  // Transforms of a basis file, if this layer has one, need no queries.
  if (!has_codec()) queries_ = std::move(queries);
}

int64_t KltLayer::count_kept(int64_t n_page) const {
  int64_t n = 0;
  for (int64_t p = 0; p < n_page && options_.anchors > 0; ++p) n += std::popcount(anchors(p));
  return n;
}

void KltLayer::forget_from(int64_t n) {
  for (KltHotKeys& keys : hot_keys_) keys.clear();  // of tokens that may come anew as others
  if (!plan().segmented) return;
  const int64_t segment = n > plan().n_sink ? (n - plan().n_sink) / kSegmentTokens : 0;
  std::erase_if(queries_, [&](const QueryStatistics& s) { return s.segment >= segment; });
}

// --- pages

class KltLayer::AnchorScan {
 public:
  AnchorScan(const KltLayer& layer, const Incoming& incoming)
      : layer_(layer),
        incoming_(incoming),
        width_(layer.shape().width()),
        n_sink_(layer.n_sink()),
        n_after_(layer.n_judging()),
        sinks_(layer.rotated_sinks(incoming)),
        keys_(static_cast<size_t>(2 * kPageTokens * width_)),
        values_(static_cast<size_t>(kPageTokens * width_)) {}

  /// Anchors of the page that begins at `token`; pages come in order, without gaps.
  AnchorBits next(int64_t token, int64_t most) {
    if (ahead_ == 0) ahead_ = read(token, kPageTokens, 0);
    if (ahead_ < kPageTokens + n_after_) ahead_ += read(token + ahead_, kPageTokens, ahead_);
    const AnchorSearch search{.sinks = sinks_.data(),
                              .n_sink = n_sink_,
                              .page = keys_.data(),
                              .n_after = std::min(ahead_ - kPageTokens, n_after_),
                              .pos = n_sink_ + token};
    const AnchorBits found = find_anchors(layer_.shape(), layer_.rope(), layer_.samples_, search, most);
    ahead_ -= kPageTokens;
    std::copy_n(keys_.data() + kPageTokens * width_, ahead_ * width_, keys_.data());
    return found;
  }

 private:
  /// Up to n tokens from `token` on, into row `row` of keys_; how many there were.
  int64_t read(int64_t token, int64_t n, int64_t row) {
    n = std::min(n, layer_.n_tokens() + incoming_.n - n_sink_ - token);
    if (n <= 0) return 0;
    layer_.gather(token, n, incoming_, KeyForm::rotated, keys_.data() + row * width_, values_.data());
    return n;
  }

  const KltLayer& layer_;
  const Incoming& incoming_;
  int64_t width_;
  int64_t n_sink_;
  int64_t n_after_;
  std::vector<float> sinks_;
  std::vector<float> keys_;    ///< rotated, the page's and the next's
  std::vector<float> values_;  ///< read with them
  int64_t ahead_ = 0;          ///< rows of keys_ that are filled
};

std::vector<float> KltLayer::rotated_sinks(const Incoming& incoming) const {
  const int64_t width = shape().width(), held = std::min(n_sink(), n_tokens());
  std::vector<float> rotated(static_cast<size_t>(n_sink() * width));
  std::vector<float> v(rotated.size());
  sinks().read(0, std::min(held, sinks().size()), rotated.data(), v.data());
  if (held < n_sink()) {
    const Rows come = rows_of(incoming, 0, n_sink() - held);
    rotate_keys(shape(), rope(), held, n_sink() - held, false, come.k, rotated.data() + held * width);
  }
  return rotated;
}

Status KltLayer::encode(int64_t first, int64_t last, const Incoming& incoming) {
  if (source_ != nullptr) return encode_there(first, last, incoming);
  std::optional<AnchorScan> scan;
  if (options_.anchors > 0 && samples_.bytes() > 0) scan.emplace(*this, incoming);
  int64_t n_anchor = n_kept();
  for (int64_t token = first; token < last; token += kPageTokens) {  // whole pages: the plan's unit
    const int64_t p = token / kPageTokens;
    const AnchorBits anchors = scan ? scan->next(token, options_.anchors * (p + 1) - n_anchor) : 0;
    for (int64_t t = 0; t < kPageTokens; ++t) {
      if ((anchors >> t & 1) != 0) keep_exact(token + t);
    }
    n_anchor += std::popcount(anchors);
    std::memcpy(mutable_page(p), &anchors, sizeof(anchors));
  }

  // Runs of pages, one a thread: an encoder costs as much as some pages.
  const int64_t first_page = first / kPageTokens, n_pages = last / kPageTokens - first_page;
  const int64_t n_run =
      std::clamp<int64_t>(n_pages / kLeastRun, 1, workers() == nullptr ? 1 : workers()->n_threads());
  std::vector<int64_t> bad(static_cast<size_t>(n_run), -1);
  for_each(workers(), n_run, [&](int64_t run) {
    bad[static_cast<size_t>(run)] =
        encode_pages(first_page + n_pages * run / n_run, first_page + n_pages * (run + 1) / n_run, incoming);
  });
  for (const int64_t p : bad) {
    if (p >= 0) return non_finite_token(n_sink() + p * kPageTokens);
  }
  return {};
}

int64_t KltLayer::encode_pages(int64_t first, int64_t last, const Incoming& incoming) {
  const int64_t width = shape().width();
  const int64_t n_held = n_tokens() - n_sink();  // as an index into the pages; may be negative
  std::vector<float> k(static_cast<size_t>(kPageTokens * width));
  std::vector<float> v(k.size());
  std::vector<KltEncoder> encoders;
  encoders.reserve(parts_->size());
  for (const KltPart& part : *parts_) encoders.emplace_back(part);
  for (int64_t p = first; p < last; ++p) {
    const int64_t token = p * kPageTokens;
    const float* keys = k.data();
    const float* values = v.data();
    if (token >= n_held) {
      keys = incoming.k + (token - n_held) * width;
      values = incoming.v + (token - n_held) * width;
    } else {
      gather(token, kPageTokens, incoming, KeyForm::plain, k.data(), v.data());
    }
    for (KltEncoder& encoder : encoders) {
      if (!encoder.encode(keys, values, width, anchors(p), mutable_page(p))) return p;
    }
  }
  return -1;
}

AnchorBits KltLayer::anchors(int64_t p) const {
  AnchorBits bits = 0;
  std::memcpy(&bits, page(p), sizeof(bits));
  return bits;
}

void KltLayer::decode(int64_t first, int64_t n, float* k, float* v) const {
  read_pages(first, n, k, v);
  int64_t kept = n_sink();  // row of sinks() of the next anchor
  for (int64_t p = 0; p < n_page() && p * kPageTokens < first + n; ++p) {
    for (AnchorBits bits = anchors(p); bits != 0; bits &= bits - 1, ++kept) {
      const int64_t row = p * kPageTokens + std::countr_zero(bits) - first;
      if (row >= 0 && row < n) sinks().read(kept, 1, k + row * shape().width(), v + row * shape().width());
    }
  }
}

void KltLayer::read_pages(int64_t first, int64_t n, float* k, float* v) const {
  const int64_t width = shape().width();
  KltScratch scratch(heads_ * shape().head_dim);
  if (!scratch.ok()) throw std::bad_alloc();
  int32_t slots[kPageTokens];
  for (int64_t done = 0; done < n;) {
    const int64_t slot = (first + done) % kPageTokens;
    const int64_t m = std::min(n - done, kPageTokens - slot);
    for (int64_t t = 0; t < m; ++t) slots[t] = static_cast<int32_t>(slot + t);
    for (const KltPart& part : *parts_) {
      part.read_rows(page((first + done) / kPageTokens), slots, m, 0, scratch);
      part.rebuild_keys(scratch.key.data(), scratch.ld, m, 0, part.width(),
                        k + done * width + part.first_channel(), width);
      part.rebuild_values(scratch.value.data(), scratch.ld, m, v + done * width + part.first_channel(),
                          width);
    }
    done += m;
  }
  rotate_keys(shape(), rope(), n_sink() + first, n, /*inverse=*/false, k, k);
  // As hot keys hold them: a step and a later prompt read the same numbers.
  std::vector<kernels::f16_t> half(static_cast<size_t>(width));
  for (int64_t t = 0; t < n; ++t) {
    ops().f32_to_f16(k + t * width, half.data(), width);
    ops().f16_to_f32(half.data(), k + t * width, width);
  }
}

}  // namespace narrows
