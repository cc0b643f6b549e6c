#include "kv/klt/cuda/klt_rows.h"

#include <algorithm>

#include "kv/kv_cache.h"

namespace narrows {

using device::Api;
using kernels::f16_t;

namespace {

constexpr int64_t kFloat = sizeof(float), kDouble = sizeof(double);
/// Pages that are fetched at once.
constexpr int64_t kFetchPages = 64;

/// Sums, then moments.
int64_t sums_bytes(int64_t n_matrix, int64_t width) { return n_matrix * width * (width + 1) * kDouble; }

}  // namespace

int64_t KltRows::bytes_for(const KltLayer& layer, int64_t n_new) {
  const AttentionShape& s = layer.shape();
  return (n_new + 2 * kPageTokens) * (2 * s.width() * kFloat + s.n_head * s.head_dim * 2 / kQueryStride);
}

Status KltRows::begin(int64_t index, const KltLayer& layer, int64_t n_new) {
  index_ = index;
  layer_ = &layer;
  shape_ = layer.shape();
  n_held_ = layer.n_tokens();
  n_new_ = n_new;
  sampled_ = layer.n_sink() + layer.n_in_pages();
  origin_ = std::min(n_held_, sampled_);
  n_taken_ = n_query_ = 0;
  status_ = {};
  codec.reset();
  pages.clear();
  wants_output_ =
      layer.parts().empty() && n_held_ + n_new >= tokens_for_klt(shape_.width()) && !weights_.knows(index);
  if (stream_ == nullptr) {
    Result<std::unique_ptr<device::Stream>> made = device::Stream::create(card_->device());
    if (!made.ok()) return made.status();
    stream_ = std::move(*made);
  }
  static_cast<void>(stream_->take_error());
  if (Status s = make_room(); !s.ok()) return s;
  return n_held_ > origin_ ? send_held() : Status();
}

Status KltRows::make_room() {
  const int64_t rows = n_held_ - origin_ + n_new_, width_q = shape_.n_head * shape_.head_dim;
  const int64_t n_sample = std::max<int64_t>(0, ceil_div(n_held_ + n_new_ - sampled_, kQueryStride));
  const int64_t n_kv = shape_.n_head_kv, hd = shape_.head_dim, n_part = shape_.width() / part_width();
  const bool sums = layer_->parts().empty();
  const int64_t n_first = std::min(n_new_, kKltEnd);
  for (const auto& [buffer, bytes] : std::initializer_list<std::pair<device::Buffer*, int64_t>>{
           {&k_, rows * shape_.width() * kFloat},
           {&v_, rows * shape_.width() * kFloat},
           {&samples_, layer_->options().anchors > 0 ? n_sample * width_q * 2 : 0},
           {&queries_, sums ? sums_bytes(n_kv, hd) : 0},
           {&output_, wants_output_ ? sums_bytes(n_kv, hd) : 0},
           {&rows_sums_, sums ? sums_bytes(n_part, part_width()) + shape_.width() * kFloat : 0},
           {&own_work_, sums ? device::moments_bytes(n_first, 1, n_part, part_width()) : 0}}) {
    if (bytes == 0) continue;
    if (Status s = grow(*buffer, bytes); !s.ok()) return s;
  }
  return {};
}

/// Tokens that wait in the window, and their sampled queries.
Status KltRows::send_held() {
  const int64_t n = n_held_ - origin_, width = shape_.width();
  std::vector<float> k(static_cast<size_t>(n * width)), v(k.size());
  layer_->read(origin_, n, k.data(), v.data());
  rotate_keys(shape_, layer_->rope(), origin_, n, /*inverse=*/true, k.data(), k.data());
  stream_->upload(k_.data(), k.data(), std::ssize(k) * kFloat);
  stream_->upload(v_.data(), v.data(), std::ssize(v) * kFloat);
  const int64_t width_q = shape_.n_head * shape_.head_dim;
  for (int64_t pos = sampled_, i = 0; layer_->options().anchors > 0 && pos < n_held_;
       pos += kQueryStride, ++i)
    stream_->upload(samples_.data<f16_t>() + i * width_q, layer_->samples().at(pos), width_q * 2);
  stream_->wait();
  return stream_->take_error();
}

void KltRows::take(const float* q, const float* k, const float* v, int64_t ld, int64_t n,
                   device::Stream& stream) {
  const int64_t pos = n_held_ + n_taken_, bytes = shape_.width() * kFloat,
                width_q = shape_.n_head * shape_.head_dim;
  for (const auto& [to, from] : {std::pair{&k_, k}, std::pair{&v_, v}}) {
    auto* const at = const_cast<float*>(row(*to, pos));
    stream.run([&](const Api& api, int d) {
      return api.copy_rows(d, at, bytes, from, ld * kFloat, bytes, n, stream.get());
    });
  }
  if (layer_->options().anchors > 0) {
    const int64_t i = std::max<int64_t>(0, ceil_div(pos - sampled_, kQueryStride));  // of the next sample
    const int64_t first = sampled_ + i * kQueryStride - pos;
    const device::SampleArgs args = {q,
                                     ld,
                                     first,
                                     kQueryStride,
                                     first < n ? ceil_div(n - first, kQueryStride) : 0,
                                     width_q,
                                     samples_.data<f16_t>() + i * width_q};
    if (args.n > 0) stream.op(&Api::sample, args);
  }
  if (layer_->parts().empty() && n_query_ < kKltEnd) {
    device::MomentsArgs args{};
    args.x = q;
    args.ld = ld;
    args.n = n;
    args.accumulate = n_query_ > 0 ? 1 : 0;
    add_moments(args, queries_, work_, stream);
    n_query_ += n;
  }
  n_taken_ += n;
}

void KltRows::take_output(const void* bf16, int64_t n_out, device::Stream& stream) {
  device::MomentsArgs args{};
  args.x = bf16;
  args.x_is_bf16 = 1;
  args.ld = shape_.n_head * shape_.head_dim;
  args.n = n_out;
  add_moments(args, output_, work_, stream);
}

/// Of queries, or what they meet: KV heads' groups.
void KltRows::add_moments(device::MomentsArgs args, device::Buffer& sums, device::Buffer& work,
                          device::Stream& stream) {
  const int64_t n_kv = shape_.n_head_kv, hd = shape_.head_dim;
  args.stride = shape_.group() * hd;
  args.n_matrix = static_cast<int32_t>(n_kv);
  args.n_sub = static_cast<int32_t>(shape_.group());
  args.width = static_cast<int32_t>(hd);
  args.sum = sums.data<double>();
  args.moments = args.sum + n_kv * hd;
  const int64_t bytes = device::moments_bytes(args.n, args.n_sub, n_kv, hd);
  if (work.bytes() < bytes) {
    stream.wait();
    stream.fail(grow(work, bytes));
  }
  args.workspace = work.data<float>();
  if (stream.ok()) stream.op(&Api::moments, args);
}

// --- what append_from() asks for

void KltRows::read(int64_t first, int64_t n, float* k, float* v) {
  const int64_t count = n * shape_.width();
  stream_->download(k, row(k_, n_held_ + first), count * kFloat);
  stream_->download(v, row(v_, n_held_ + first), count * kFloat);
  if (stream_->ok()) return;
  status_ = stream_->take_error();
  std::fill_n(k, count, 0.0F);
  std::fill_n(v, count, 0.0F);
}

Status KltRows::fetch(const device::Buffer& sums, int64_t n_matrix, int64_t width, Sums& to) {
  to.sum.resize(static_cast<size_t>(n_matrix * width));
  to.moments.resize(to.sum.size() * static_cast<size_t>(width));
  stream_->download(to.sum.data(), sums.data(), std::ssize(to.sum) * kDouble);
  stream_->download(to.moments.data(), sums.data<double>() + to.sum.size(), std::ssize(to.moments) * kDouble);
  return stream_->take_error();
}

Status KltRows::add_queries(KltStatistics& to) {
  if (n_query_ == 0) return {};
  Sums sums;
  if (Status s = fetch(queries_, shape_.n_head_kv, shape_.head_dim, sums); !s.ok()) return s;
  to.add_query_sums(n_query_, sums.sum.data(), sums.moments.data());
  return {};
}

Status KltRows::set_rows(int64_t first, int64_t n, KltStatistics& to) {
  const int64_t width = part_width(), n_part = shape_.width() / width;
  device::MomentsArgs args{};
  args.ld = shape_.width();
  args.n = n;
  args.stride = width;
  args.n_matrix = static_cast<int32_t>(n_part);
  args.n_sub = 1;
  args.width = static_cast<int32_t>(width);
  args.makes_centre = 1;
  args.sum = rows_sums_.data<double>();
  args.moments = args.sum + shape_.width();
  args.centre = reinterpret_cast<float*>(rows_sums_.data<char>() + sums_bytes(n_part, width));
  args.workspace = own_work_.data<float>();
  for (const bool of_values : {false, true}) {
    args.x = row(of_values ? v_ : k_, n_held_ + first);
    stream_->op(&Api::moments, args);
    std::vector<float> centre(static_cast<size_t>(shape_.width()));
    stream_->download(centre.data(), args.centre, std::ssize(centre) * kFloat);
    Sums sums;
    if (Status s = fetch(rows_sums_, n_part, width, sums); !s.ok()) return s;
    to.set_sums(of_values, n, centre.data(), sums.sum.data(), sums.moments.data());
  }
  return {};
}

Status KltRows::value_weight(std::vector<double>& weight) {
  if (weights_.get(index_, weight)) return {};
  if (!wants_output_) return {StatusCode::internal, "a prompt's layer without its output's matrix"};
  Sums sums;
  if (Status s = fetch(output_, shape_.n_head_kv, shape_.head_dim, sums); !s.ok()) return s;
  weight = std::move(sums.moments);
  weights_.put(index_, weight);
  return {};
}

Status KltRows::find_shares(int64_t pos, int64_t n_page, int64_t n_after, const std::vector<float>& sinks,
                            std::vector<float>& share) {
  const int64_t n_kv = shape_.n_head_kv, end = n_held_ + n_new_;
  const auto tables = card_->tables(*layer_, end, (end + end / 4) / kPageTokens + 1);
  if (!tables.ok()) return tables.status();
  if (Status s = grow(sinks_, std::ssize(sinks) * kFloat + 16); !s.ok()) return s;
  if (Status s = grow(share_, n_page * n_kv * kPageTokens * kFloat); !s.ok()) return s;
  stream_->upload(sinks_.data(), sinks.data(), std::ssize(sinks) * kFloat);
  device::KltSharesArgs args{};
  args.keys = row(k_, pos);
  args.sinks = sinks_.data<float>();
  args.ld = shape_.width();
  args.n_token = end - pos;
  args.position = pos;
  args.samples = samples_.data<f16_t>() + (pos - sampled_) / kQueryStride * shape_.n_head * shape_.head_dim;
  args.rope = (*tables)->rope.data<const float>();
  args.n_head = static_cast<int32_t>(shape_.n_head);
  args.n_head_kv = static_cast<int32_t>(n_kv);
  args.head_dim = static_cast<int32_t>(shape_.head_dim);
  args.n_sink = static_cast<int32_t>(layer_->n_sink());
  args.n_after = static_cast<int32_t>(n_after);
  args.n_page = static_cast<int32_t>(n_page);
  args.scale = shape_.scale;
  args.share = share_.data<float>();
  stream_->op(&Api::klt_shares, args);
  std::vector<float> by_head(static_cast<size_t>(n_page * n_kv * kPageTokens));
  stream_->download(by_head.data(), share_.data(), std::ssize(by_head) * kFloat);
  if (Status s = stream_->take_error(); !s.ok()) return s;
  share.assign(static_cast<size_t>(n_page * kPageTokens), 0.0F);
  const float* from = by_head.data();
  for (int64_t p = 0; p < n_page; ++p) {
    for (int64_t h = 0; h < n_kv; ++h) {
      for (int64_t t = 0; t < kPageTokens; ++t) share[static_cast<size_t>(p * kPageTokens + t)] += *from++;
    }
  }
  return {};
}

Result<int64_t> KltRows::encode(int64_t first, const std::vector<AnchorBits>& anchors,
                                const std::function<std::byte*(int64_t page)>& page) {
  const auto n_page = std::ssize(anchors);
  if (n_page == 0) return int64_t{-1};
  if (codec == nullptr || codec->of() != layer_->shared_parts()) {
    auto made = KltCodec::make(layer_->shared_parts(), page_pool->block_bytes(), card_->device(), *stream_);
    if (!made.ok()) return made.status();
    codec = std::move(*made);
  }
  std::vector<int32_t> table;
  for (int64_t i = 0; i < n_page; ++i) {
    Result<BlockPool::Block> block = page_pool->take();
    if (!block.ok()) return block.status();
    table.push_back(**block);
    pages.push_back(std::move(*block));
  }
  if (Status s = forward_.set(*codec, card_->device(), *stream_); !s.ok()) return s;
  const int64_t words = n_page * int64_t{sizeof(int32_t)};
  if (Status s = grow(lists_, 2 * n_page * kDouble); !s.ok()) return s;
  char* const lists = lists_.data<char>();
  stream_->upload(lists, anchors.data(), 2 * words);
  stream_->upload(lists + 2 * words, table.data(), words);
  stream_->fill(lists + 3 * words, 0, words);
  device::KltEncodeArgs args{};
  args.k = row(k_, layer_->n_sink() + first * kPageTokens);
  args.v = row(v_, layer_->n_sink() + first * kPageTokens);
  args.ld = shape_.width();
  args.anchors = reinterpret_cast<const uint64_t*>(lists);
  args.parts = codec->parts();
  args.project = forward_.project();
  args.bits = forward_.bits();
  args.n_part = static_cast<int32_t>(codec->host_parts().size());
  args.width = static_cast<int32_t>(part_width());
  args.n_page = static_cast<int32_t>(n_page);
  args.pool = page_pool->layer(0);
  args.table = reinterpret_cast<const int32_t*>(lists + 2 * words);
  args.page_bytes = page_pool->block_bytes();
  args.bad = reinterpret_cast<int32_t*>(lists + 3 * words);
  stream_->op(&Api::klt_encode, args);
  std::vector<int32_t> bad(anchors.size());
  stream_->download(bad.data(), args.bad, words);
  if (Status s = stream_->take_error(); !s.ok()) return s;
  const auto found = std::find(bad.begin(), bad.end(), 1);
  if (found != bad.end()) return first + (found - bad.begin());
  if (Status s = fetch_pages(pages.size() - anchors.size(), first, page); !s.ok()) return s;
  return int64_t{-1};
}

/// The host's copies of pages [first, ..) of `pages`.
Status KltRows::fetch_pages(size_t first, int64_t first_page,
                            const std::function<std::byte*(int64_t page)>& page) {
  const int64_t bytes = page_pool->block_bytes(), n_page = std::ssize(pages) - static_cast<int64_t>(first);
  std::vector<std::byte> come(static_cast<size_t>(std::min(kFetchPages, n_page) * bytes));
  const auto number = [&](int64_t i) { return *pages[first + static_cast<size_t>(i)]; };
  for (int64_t begin = 0; begin < n_page; begin += kFetchPages) {
    const int64_t n = std::min(kFetchPages, n_page - begin);
    for (int64_t i = 0; i < n;) {
      int64_t m = 1;  // a run of neighbours
      while (i + m < n && number(begin + i + m) == number(begin + i) + m) ++m;
      stream_->download(come.data() + i * bytes, page_pool->layer(0) + number(begin + i) * bytes, m * bytes);
      i += m;
    }
    if (Status s = stream_->take_error(); !s.ok()) return s;
    for_each(workers_, n,
             [&](int64_t i) { codec->restore(come.data() + i * bytes, page(first_page + begin + i)); });
  }
  return {};
}

Status KltRows::samples(int64_t pos, std::vector<f16_t>& rows) {
  const int64_t width_q = shape_.n_head * shape_.head_dim;
  const int64_t n = std::max<int64_t>(0, ceil_div(n_held_ + n_new_ - pos, kQueryStride));
  rows.resize(static_cast<size_t>(n * width_q));
  if (n == 0) return {};
  stream_->download(rows.data(), samples_.data<f16_t>() + (pos - sampled_) / kQueryStride * width_q,
                    std::ssize(rows) * 2);
  return stream_->take_error();
}

}  // namespace narrows
