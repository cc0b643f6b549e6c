#include "exec/cuda/klt_mixer.h"

#include <algorithm>
#include <cstring>

#include "kv/layout.h"

namespace narrows {

using device::Api;

namespace {

constexpr int64_t kWord = sizeof(int32_t);
constexpr int64_t kBlock = NARROWS_CUDA_BLOCK;

/// Words of a layer among numbers_: tables [n, ld], five numbers [n], counts uint8 [n, ld].
int64_t words_of_layer(int64_t n, int64_t ld) { return n * ld + 5 * n + n * ld / kWord; }

}  // namespace

void KltMixer::begin_step(int64_t n, int64_t n_layer, LayerOf layer_of) {
  n_ = n;
  n_layer_ = n_layer;
  layer_of_ = std::move(layer_of);
  wants_queries_ = false;
  std::vector<int64_t> positions;
  for (int64_t r = 0; r < n; ++r) {
    positions.push_back(view(r, 0).position);
    for (int64_t i = 0; i < n_layer; ++i) wants_queries_ |= layer_of_(r, i).wants_next_query();
  }
  angles_.begin(std::move(positions), [this](int64_t row, const LayerPlan& l) -> const kernels::RopeTable& {
    return layer_of_(row, l.index).rope();
  });
}

void KltMixer::send_rows(device::Stream& stream) {
  ld_ = 1;
  for (int64_t i = 0; i < n_layer_; ++i) {
    for (int64_t r = 0; r < n_; ++r) ld_ = std::max<int64_t>(ld_, std::ssize(view(r, i).exact));
  }
  ld_ = round_up(ld_, 16);
  const int64_t words = words_of_layer(n_, ld_);
  host_.assign(static_cast<size_t>(n_layer_ * words + 2 * n_), 0);
  for (int64_t r = 0; r < n_; ++r)
    host_[static_cast<size_t>(n_layer_ * words + n_ + r)] = static_cast<int32_t>(r);
  for (int64_t i = 0; i < n_layer_; ++i) {
    int32_t* table = host_.data() + i * words;
    int32_t* numbers = table + n_ * ld_;
    auto* counts = reinterpret_cast<uint8_t*>(numbers + 5 * n_);
    for (int64_t r = 0; r < n_; ++r) {
      const KltStepView& v = view(r, i);
      std::copy(v.exact.begin(), v.exact.end(), table + r * ld_);
      std::copy(v.exact_count.begin(), v.exact_count.end(), counts + r * ld_);
      const int64_t of_row[] = {v.index, v.position, v.n_in_pages > 0 ? std::ssize(v.exact) : v.index + 1,
                                v.n_in_pages, v.budget};
      for (int64_t k = 0; k < 5; ++k) numbers[k * n_ + r] = static_cast<int32_t>(of_row[k]);
    }
  }
  send_to_device(numbers_, host_.data(), std::ssize(host_) * kWord, stream);
}

/// n_exact: blocks where there are pages, tokens where there are none.
KltMixer::Places KltMixer::places(int64_t layer) const {
  const int32_t* table = numbers_.data<int32_t>() + layer * words_of_layer(n_, ld_);
  const int32_t* numbers = table + n_ * ld_;
  return {table,
          numbers,
          numbers + n_,
          numbers + 2 * n_,
          numbers + 3 * n_,
          numbers + 4 * n_,
          reinterpret_cast<const uint8_t*>(numbers + 5 * n_)};
}

void KltMixer::begin(std::span<const LayerPlan> layers, device::Stream& stream) {
  send_rows(stream);
  width_q_ = layers.front().mix.attention.width_q();
  const int64_t halves = n_ * width_q_ * 2, floats = n_layer_ * n_ * width_q_ * int64_t{sizeof(float)};
  for (const auto& [buffer, bytes] :
       {std::pair{&plain_, halves}, std::pair{&queries_, wants_queries_ ? floats : 0}}) {
    if (buffer->bytes() >= bytes) continue;
    stream.wait();
    stream.fail(stream.device().grow(*buffer, bytes, "the queries of a step"));
  }
  angles_.send(layers, stream);
}

void KltMixer::mix(const LayerPlan& layer, const DeviceRows& rows, device::Stream& stream) {
  if (!stream.ok()) return;
  const Places at = places(layer.index);
  device::StoreArgs store = angles_.store_args(layer, rows, stream);
  store.q_plain = plain_.data();
  store.pool = layer_of_(0, layer.index).on_device().card().exact()->layer(0);
  store.table = at.table;
  store.ld_table = ld_;
  store.position = at.index;
  store.sequence = numbers_.data<int32_t>() + n_layer_ * words_of_layer(n_, ld_) + n_;
  store.bad = numbers_.data<int32_t>() + n_layer_ * words_of_layer(n_, ld_);
  store.block = static_cast<int32_t>(kBlock);
  if (!stream.ok()) return;
  stream.op(&Api::store, store);
  if (wants_queries_) keep_queries(layer, rows, stream);
  if (rows.from == rows.n) return;
  attend(layer, rows, stream);
  if (seen_) show_row(layer, rows, seen_, stream);
}

void KltMixer::attend(const LayerPlan& layer, const DeviceRows& rows, device::Stream& stream) {
  for (int64_t r = 0; r < n_ && stream.ok();) {
    if (view(r, layer.index).n_in_pages > 0) {
      attend_klt(layer, rows, r++, stream);
      continue;
    }
    int64_t end = r + 1;
    while (end < n_ && view(end, layer.index).n_in_pages == 0) ++end;
    attend_exact(layer, rows, r, end - r, stream);
    r = end;
  }
}

void KltMixer::attend_exact(const LayerPlan& layer, const DeviceRows& rows, int64_t first, int64_t n,
                            device::Stream& stream) {
  const Places at = places(layer.index);
  narrows_cuda_f16_args args{};
  args.heads = heads_of(layer.mix.attention, rows.q16, rows, first, n);
  args.blocks = {layer_of_(0, layer.index).on_device().card().exact()->layer(0), at.table + first * ld_,
                 static_cast<int32_t>(ld_), static_cast<int32_t>(kBlock)};
  args.n_tokens = at.n_exact + first;
  int64_t longest = 0;
  for (int64_t r = first; r < first + n; ++r) longest = std::max(longest, view(r, layer.index).index + 1);
  exact_.run(args, longest, stream);
}

void KltMixer::attend_klt(const LayerPlan& layer, const DeviceRows& rows, int64_t row,
                          device::Stream& stream) {
  const Places at = places(layer.index);
  CudaKltLayer& own = layer_of_(row, layer.index);
  const KltStepView& v = own.view();
  narrows_cuda_klt_args args{};
  args.heads = heads_of(layer.mix.attention, plain_.data(), rows, row, 1);
  narrows_cuda_pages& pages = args.pages;
  pages.pool = v.pages;
  pages.table = v.page_table;
  pages.ld = static_cast<int32_t>(v.n_max / NARROWS_CUDA_PAGE);
  pages.n_max = static_cast<int32_t>(v.n_max);
  pages.page_bytes = v.page_bytes;
  pages.n_tokens = at.n_tokens + row;
  pages.budget = at.budget + row;
  pages.max_budget = static_cast<int32_t>(v.max_budget);
  pages.n_sink = static_cast<int32_t>(own.host().n_sink());
  pages.rope = v.tables->rope.data<const float>();
  pages.position = at.position + row;
  pages.exact = {own.on_device().card().exact()->layer(0), at.table + row * ld_, static_cast<int32_t>(ld_),
                 static_cast<int32_t>(kBlock)};
  pages.exact_count = at.count + row * ld_;
  pages.n_exact = at.n_exact + row;
  args.kept = v.kept;
  args.parts = v.codec->parts();
  args.host_parts = v.codec->host_parts().data();
  args.n_part = static_cast<int32_t>(v.codec->host_parts().size());
  args.mass = v.mass;
  args.turns = v.tables->turns.data<const float>();
  size_t bytes = 0;
  stream.ask([&](const Api& api, int d) { return api.klt_workspace(d, &args, &bytes); });
  if (!stream.ok()) return;
  Result<device::Buffer*> work = own.on_device().workspace(static_cast<int64_t>(bytes), stream);
  if (!work.ok()) return stream.fail(work.status());
  stream.decode(args, **work);
  if (seen_ && row == 0) note_selection(args, **work, own, stream);
}

void KltMixer::note_selection(const narrows_cuda_klt_args& args, const device::Buffer& work,
                              CudaKltLayer& layer, device::Stream& stream) const {
  narrows_cuda_selection at{};
  stream.ask([&](const Api& api, int d) { return api.klt_selection(d, &args, &at); });
  const auto n_kv = static_cast<size_t>(args.heads.n_head_kv);
  const auto most = static_cast<size_t>(args.pages.max_budget);
  std::vector<uint32_t> n(n_kv);
  std::vector<int32_t> selected(n_kv * most);
  const char* from = work.data<char>();
  stream.download(n.data(), from + at.n_selected, static_cast<int64_t>(n_kv) * kWord);
  stream.download(selected.data(), from + at.selected, std::ssize(selected) * kWord);
  if (!stream.ok()) return;
  std::vector<std::vector<int32_t>> tokens;
  for (size_t h = 0; h < n_kv; ++h) {
    const auto begin = selected.begin() + static_cast<int64_t>(h * most);
    tokens.emplace_back(begin, begin + n[h]);
  }
  layer.note_selection(std::move(tokens));
}

/// Copied aside: they are fetched when the step is over.
void KltMixer::keep_queries(const LayerPlan& layer, const DeviceRows& rows, device::Stream& stream) {
  const int64_t row = width_q_ * int64_t{sizeof(float)};
  for (int64_t r = 0; r < n_; ++r) {
    if (layer_of_(r, layer.index).wants_next_query())
      stream.copy(queries_.data<char>() + (layer.index * n_ + r) * row, rows.q + r * rows.ld, row);
  }
}

void KltMixer::finish(device::Stream& stream) {
  if (!stream.ok()) return;
  std::vector<int32_t> bad(static_cast<size_t>(n_));
  stream.download(bad.data(), numbers_.data<int32_t>() + n_layer_ * words_of_layer(n_, ld_), n_ * kWord);
  if (wants_queries_) {
    host_queries_.resize(static_cast<size_t>(n_layer_ * n_ * width_q_));
    stream.download(host_queries_.data(), queries_.data(),
                    std::ssize(host_queries_) * int64_t{sizeof(float)});
  }
  if (!stream.ok()) return;
  for (int64_t r = 0; r < n_; ++r) {
    CudaKltLayer& first = layer_of_(r, 0);
    if (bad[static_cast<size_t>(r)] != 0) first.on_device().note_bad(first.view().position);
    for (int64_t i = 0; wants_queries_ && i < n_layer_; ++i) {
      CudaKltLayer& own = layer_of_(r, i);
      if (own.wants_next_query()) own.give_query(host_queries_.data() + (i * n_ + r) * width_q_);
    }
  }
}

}  // namespace narrows
