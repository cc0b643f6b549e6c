#include "kv/klt/cuda/cuda_klt_layer.h"

#include <algorithm>

#include "kv/klt/cuda/klt_rows.h"
#include "kv/step/stages.h"

namespace narrows {

using kernels::f16_t;

namespace {

constexpr int64_t kBlock = NARROWS_CUDA_BLOCK;
static_assert(kBlock == kWindowBlock && NARROWS_CUDA_PAGE == kPageTokens);

/// Room for tokens in pages grows by a quarter, in these units: the work of a step is cut for it.
constexpr int64_t kTokenUnit = 1024;
constexpr int64_t kMostTokens = int64_t{1} << 20;  // as the kernels have it
/// Rebuilt keys that a list can hold.
constexpr int64_t kMostKept = 65520;
/// Pages that are sent at once.
constexpr int64_t kSendPages = 64;

Status cannot_grow() {
  return {StatusCode::unsupported,
          "this klt cache is longer than what a GPU's kernels take; choose a smaller budget or --device cpu"};
}

}  // namespace

CudaKltLayer::CudaKltLayer(std::unique_ptr<KltLayer> host, std::shared_ptr<KltOnDevice> on)
    : KvLayer(host->shape(), &host->rope()),
      host_(std::move(host)),
      on_(std::move(on)),
      window_first_(host_->n_sink()),
      page_bytes_(klt_device_page_bytes(host_->profile(), shape())),
      page_pool_(on_->card().pages(page_bytes_)) {}

bool CudaKltLayer::can_be_on_device(const KvProfile& profile, const AttentionShape& s, int64_t n_rot) {
  const int64_t heads = heads_of_part(s.n_head_kv, s.head_dim), n_part = s.n_head_kv / heads;
  return profile.kind == KvKind::klt && (s.head_dim == 64 || s.head_dim == 128) && n_rot == s.head_dim &&
         s.group() <= 8 && s.group() * heads <= 32 && heads * s.head_dim <= kMaxTransform &&
         ceil_div(klt_n_index(profile, s.width()), n_part) <= 64 && profile.n_sink % kBlock == 0 &&
         profile.block == kPageTokens && profile.budget != KvProfile::kBudgetAll;
}

// --- what the host is asked for

Status CudaKltLayer::after(Status status) {
  host_has_all();
  trim();
  if (status.ok()) static_cast<void>(send());
  return status;
}

Status CudaKltLayer::append(const float* k, const float* v, int64_t n) {
  if (Status s = fetch(); !s.ok()) return s;
  if (on_->bad_token() >= 0) return non_finite_token(on_->bad_token());
  host_->use_workers(workers());
  return after(host_->append(k, v, n));
}

Status CudaKltLayer::append_from(KltRows& rows, Workers& lent) {
  rows.codec = codec_;
  rows.page_pool = page_pool_;
  rows.use_workers(&lent);
  // Those of the session may be at work for another layer.
  Workers* const own = workers();
  use_workers(&lent);
  host_->use_workers(&lent);
  const Status status = host_->append_from(rows, rows.n_new());
  host_has_all();
  trim();
  if (status.ok()) {
    codec_ = rows.codec;
    // Pages of before that the device has not been sent: send() sees to all of them.
    if (std::ssize(pages_) + std::ssize(rows.pages) == host_->n_page())
      pages_.insert(pages_.end(), rows.pages.begin(), rows.pages.end());
    static_cast<void>(send(rows.stream()));  // begin_step() tries again
  }
  use_workers(own);
  host_->use_workers(own);
  return status;
}

Status CudaKltLayer::seal(int64_t* changed_from) {
  if (Status s = fetch(); !s.ok()) return s;
  host_->use_workers(workers());
  return after(host_->seal(changed_from));
}

Status CudaKltLayer::make_room(bool may_convert) {
  if (on_->bad_token() >= 0) return non_finite_token(on_->bad_token());
  const bool encodes = host_->encodes_next(may_convert);
  if (encodes) {
    if (Status s = fetch(); !s.ok()) return s;
  }
  host_->use_workers(workers());
  Status status = host_->make_room(may_convert);
  if (encodes) host_has_all();
  trim();
  return status;
}

void CudaKltLayer::host_has_all() {
  sinks_.here = host_->sinks().size();
  window_.here = host_->window().size();
}

void CudaKltLayer::encode_alone() {
  host_->use_workers(nullptr);
  static_cast<void>(host_->make_room(false));
  host_has_all();
}

void CudaKltLayer::read(int64_t first, int64_t n, float* k, float* v) const {
  static_cast<void>(fetch());  // a device that is gone: on_ knows
  host_->read(first, n, k, v);
}

void CudaKltLayer::keep(int64_t n) {
  static_cast<void>(fetch());
  host_->keep(n);
  on_->forget_from(n);
  kept_is_stale_ = true;  // its tokens may come anew as others
  trim();
}

Status CudaKltLayer::share(const KvLayer& from, int64_t n) {
  const auto& other = static_cast<const CudaKltLayer&>(from);
  if (Status s = other.fetch(); !s.ok()) return s;
  forget();
  if (Status s = host_->share(*other.host_, n); !s.ok()) return s;
  host_has_all();
  codec_ = other.codec_;
  const auto n_page = std::min(host_->n_page(), static_cast<int64_t>(other.pages_.size()));
  pages_.assign(other.pages_.begin(), other.pages_.begin() + n_page);
  window_first_ = host_->n_sink() + host_->n_in_pages();
  return {};
}

void CudaKltLayer::save(SnapshotWriter& out) const {
  static_cast<void>(fetch());
  host_->save(out);
}

Status CudaKltLayer::load(SnapshotReader& in) {
  forget();
  return after(host_->load(in));
}

void CudaKltLayer::clear() {
  host_->clear();
  forget();
  on_->forget_from(0);
}

// --- what lies on the device

void CudaKltLayer::forget() {
  sinks_ = Blocks();
  window_ = Blocks();
  window_first_ = host_->n_sink();
  pages_.clear();
  n_in_table_ = 0;
  codec_.reset();
  kept_is_stale_ = true;
  is_sparse_ = false;
}

/// What the host no longer has goes: its window gives away blocks in front, all else from behind.
void CudaKltLayer::trim() {
  const int64_t first = host_->n_sink() + host_->n_in_pages();
  if (first != window_first_) {
    const int64_t gone = first - window_first_;
    const int64_t n =
        gone > 0 ? std::min<int64_t>(gone / kBlock, std::ssize(window_.blocks)) : std::ssize(window_.blocks);
    window_.blocks.erase(window_.blocks.begin(), window_.blocks.begin() + n);
    window_.there = gone > 0 ? std::max<int64_t>(0, window_.there - gone) : 0;
    window_first_ = first;
  }
  const auto cut = [](Blocks& b, const ExactStore& store) {
    b.there = std::min(b.there, store.size());
    b.here = std::min(b.here, store.size());
    if (ceil_div(store.size() + 1, kBlock) < std::ssize(b.blocks))
      b.blocks.resize(static_cast<size_t>(ceil_div(store.size() + 1, kBlock)));
  };
  cut(sinks_, host_->sinks());
  cut(window_, host_->window());
  if (codec_ != nullptr && codec_->of() != host_->shared_parts()) {
    codec_.reset();
    pages_.clear();
    n_in_table_ = 0;
    kept_is_stale_ = true;
  }
  if (host_->n_page() < std::ssize(pages_)) {
    pages_.resize(static_cast<size_t>(host_->n_page()));
    kept_is_stale_ = true;
  }
  n_in_table_ = std::min<int64_t>(n_in_table_, std::ssize(pages_));
}

Status CudaKltLayer::send() {
  trim();
  Result<device::Stream*> stream = on_->stream();
  return stream.ok() ? send(**stream) : stream.status();
}

Status CudaKltLayer::send(device::Stream& stream) {
  if (!host_->parts().empty() && codec_ == nullptr) {
    Result<std::shared_ptr<const KltCodec>> made =
        KltCodec::make(host_->shared_parts(), page_bytes_, on_->card().device(), stream);
    if (!made.ok()) return made.status();
    codec_ = std::move(*made);
  }
  if (Status s = send_pages(stream); !s.ok()) return s;
  if (Status s = send_exact(host_->sinks(), sinks_, stream); !s.ok()) return s;
  return send_exact(host_->window(), window_, stream);
}

Status CudaKltLayer::send_pages(device::Stream& stream) {
  const int64_t n_page = host_->n_page();
  std::vector<std::byte> turned(
      static_cast<size_t>(std::min(kSendPages, n_page - std::ssize(pages_)) * page_bytes_));
  while (std::ssize(pages_) < n_page) {
    const int64_t first = std::ssize(pages_), n = std::min(kSendPages, n_page - first);
    std::vector<BlockPool::Block> taken;
    for (int64_t i = 0; i < n; ++i) {
      Result<BlockPool::Block> block = page_pool_->take();
      if (!block.ok()) return block.status();
      taken.push_back(std::move(*block));
    }
    for_each(workers(), n,
             [&](int64_t i) { codec_->convert(host_->page(first + i), turned.data() + i * page_bytes_); });
    for (int64_t i = 0; i < n;) {
      // A run of neighbours.
      int64_t m = 1;
      while (i + m < n && *taken[static_cast<size_t>(i + m)] == *taken[static_cast<size_t>(i)] + m) ++m;
      stream.upload(page_pool_->layer(0) + *taken[static_cast<size_t>(i)] * page_bytes_,
                    turned.data() + i * page_bytes_, m * page_bytes_);
      i += m;
    }
    stream.wait();
    if (Status s = stream.take_error(); !s.ok()) return s;
    pages_.insert(pages_.end(), taken.begin(), taken.end());
  }
  return {};
}

Status CudaKltLayer::send_exact(const ExactStore& store, Blocks& to, device::Stream& stream) {
  const int64_t n = store.size(), bytes = on_->card().exact()->block_bytes();
  while (std::ssize(to.blocks) < ceil_div(n, kBlock)) {
    Result<BlockPool::Block> block = on_->card().exact()->take();
    if (!block.ok()) return block.status();
    to.blocks.push_back(std::move(*block));
  }
  if (to.there >= n) return {};
  const int64_t first = to.there / kBlock, n_block = ceil_div(n, kBlock) - first;
  std::vector<f16_t> rows(static_cast<size_t>(n_block * bytes) / sizeof(f16_t));
  for_each(n_block > 4 ? workers() : nullptr, n_block, [&](int64_t b) {
    store.get_rows(first + b, rows.data() + b * bytes / static_cast<int64_t>(sizeof(f16_t)));
  });
  for (int64_t b = 0; b < n_block; ++b)
    stream.upload(on_->card().exact()->layer(0) + *to.blocks[static_cast<size_t>(first + b)] * bytes,
                  rows.data() + b * bytes / static_cast<int64_t>(sizeof(f16_t)), bytes);
  stream.wait();
  if (Status s = stream.take_error(); !s.ok()) return s;
  to.there = n;
  return {};
}

Status CudaKltLayer::fetch() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (sinks_.here >= host_->sinks().size() && window_.here >= host_->window().size()) return {};
  Result<device::Stream*> stream = on_->stream();
  Status status = stream.status();
  if (status.ok()) status = fetch_exact(false, **stream);
  if (status.ok()) status = fetch_exact(true, **stream);
  if (!status.ok()) on_->note_lost();
  return status;
}

Status CudaKltLayer::fetch_exact(bool of_window, device::Stream& stream) const {
  Blocks& from = of_window ? window_ : sinks_;
  const int64_t n = (of_window ? host_->window() : host_->sinks()).size();
  const int64_t bytes = on_->card().exact()->block_bytes();
  if (from.here >= n) return {};
  const int64_t first = from.here / kBlock, n_block = ceil_div(n, kBlock) - first;
  std::vector<f16_t> rows(static_cast<size_t>(bytes) / sizeof(f16_t));
  for (int64_t b = first; b < first + n_block; ++b) {
    stream.download(rows.data(), on_->card().exact()->layer(0) + *from.blocks[static_cast<size_t>(b)] * bytes,
                    bytes);
    if (Status s = stream.take_error(); !s.ok()) return s;
    host_->put_rows(of_window, b, rows.data());
  }
  from.here = n;
  return {};
}

// --- a step

Status CudaKltLayer::begin_step(StepScratch& scratch) {
  const bool had_codec = !host_->parts().empty();
  Status status = make_room(scratch.may_convert);
  if (!had_codec && !host_->parts().empty()) scratch.may_convert = false;
  try {
    if (status.ok()) status = send();
    if (status.ok()) status = make_step_room();
    if (status.ok()) status = make_view();
  } catch (const std::bad_alloc&) {
    return no_memory_for_tokens(n_tokens() + 1);
  }
  return status;
}

/// Room on the device for the step's token and for what is read.
Status CudaKltLayer::make_step_room() {
  const bool to_sinks = host_->sinks().size() < host_->n_sink();
  Blocks& to = to_sinks ? sinks_ : window_;
  while (std::ssize(to.blocks) * kBlock <= (to_sinks ? host_->sinks() : host_->window()).size()) {
    Result<BlockPool::Block> block = on_->card().exact()->take();
    if (!block.ok()) return block.status();
    to.blocks.push_back(std::move(*block));
  }
  const int64_t n = host_->n_in_pages();
  if (n == 0) return {};
  Result<device::Stream*> stream = on_->stream();
  if (!stream.ok()) return stream.status();
  if (n > n_max_ || kept_.bytes() == 0) {
    if (Status s = make_kept(n, **stream); !s.ok()) return s;
  }
  const bool sends = kept_is_stale_ || n_in_table_ < std::ssize(pages_);
  if (kept_is_stale_) {
    const int64_t n_kv = shape().n_head_kv, keys = n_kv * capacity_ * shape().head_dim * 2;
    const int64_t maps = n_kv * (capacity_ * 4 + n_max_ * 2);
    (*stream)->fill(kept_.data<char>() + keys, 0xFF, maps);
    (*stream)->fill(kept_.data<char>() + keys + maps, 0, n_kv * 4);
    kept_is_stale_ = false;
  }
  if (n_in_table_ < std::ssize(pages_)) {
    std::vector<int32_t> numbers;
    for (auto p = pages_.begin() + n_in_table_; p != pages_.end(); ++p) numbers.push_back(**p);
    (*stream)->upload(table_.data<int32_t>() + n_in_table_, numbers.data(),
                      std::ssize(numbers) * int64_t{sizeof(int32_t)});
  }
  if (!sends) return {};
  (*stream)->wait();
  Status status = (*stream)->take_error();
  if (status.ok()) {
    n_in_table_ = std::ssize(pages_);
  } else {
    kept_is_stale_ = true;
  }
  return status;
}

/// For n tokens in pages, and some more.
Status CudaKltLayer::make_kept(int64_t n, device::Stream& stream) {
  const int64_t n_kv = shape().n_head_kv;
  const int64_t n_max = std::min(round_up(n + n / 4, kTokenUnit), kMostTokens);
  // The context is longer than its pages: by the sinks, and by less than a page and the recent tokens.
  const int64_t n_context = n_max + host_->n_sink() + host_->profile().n_recent + 2 * kPageTokens;
  const int64_t budget = std::min(n_max, round_up(host_->profile().budget_at(n_context), kPageTokens));
  if (n > n_max || budget > kMostKept) return cannot_grow();
  stream.wait();
  n_max_ = 0;
  n_in_table_ = 0;
  kept_is_stale_ = true;
  kept_ = device::Buffer();
  device::Device& device = *on_->card().device();
  const int64_t bytes = n_kv * (budget * (shape().head_dim * 2 + 4) + n_max * 2 + 4);
  if (Status s = device.grow(kept_, bytes, "rebuilt keys of the cache"); !s.ok()) return s;
  if (Status s = device.grow(table_, n_max / kPageTokens * 4, "the cache's tables"); !s.ok()) {
    kept_ = device::Buffer();
    return s;
  }
  n_max_ = n_max;
  max_budget_ = capacity_ = budget;
  return stream.take_error();
}

Status CudaKltLayer::make_view() {
  const int64_t n_sink_blocks = ceil_div(host_->sinks().n_visible(), kBlock);
  const bool to_sinks = host_->sinks().size() < host_->n_sink();
  view_ = KltStepView();
  view_.position = n_tokens();
  view_.index = to_sinks ? host_->sinks().size() : n_sink_blocks * kBlock + host_->window().size();
  const auto add = [this](const Blocks& from, const ExactStore& store) {
    for (int64_t b = 0; b < store.n_block(); ++b) {
      view_.exact.push_back(*from.blocks[static_cast<size_t>(b)]);
      view_.exact_count.push_back(static_cast<uint8_t>(store.block_tokens(b)));
    }
  };
  add(sinks_, host_->sinks());
  add(window_, host_->window());
  const int64_t n = host_->n_in_pages(), n_free = n - host_->n_kept();
  view_.n_in_pages = n;
  is_sparse_ = false;
  if (n == 0) return {};
  view_.budget = std::min({n_free, count_selected(host_->profile(), n, n_tokens() + 1), max_budget_});
  is_sparse_ = view_.budget < n_free;
  view_.mass =
      is_sparse_ ? static_cast<float>(host_->profile().mass) : 1.0F;  // as the CPU: all, if they may be
  view_.n_max = n_max_;
  view_.max_budget = max_budget_;
  view_.pages = page_pool_->layer(0);
  view_.page_bytes = page_bytes_;
  view_.page_table = table_.data<int32_t>();
  view_.codec = codec_;
  const int64_t n_kv = shape().n_head_kv;
  char* at = kept_.data<char>();
  view_.kept.keys = at;
  at += n_kv * capacity_ * shape().head_dim * 2;
  view_.kept.token_of = reinterpret_cast<int32_t*>(at);
  at += n_kv * capacity_ * 4;
  view_.kept.slot_of = reinterpret_cast<uint16_t*>(at);
  at += n_kv * n_max_ * 2;
  view_.kept.hand = reinterpret_cast<uint32_t*>(at);
  view_.kept.capacity = static_cast<int32_t>(capacity_);
  view_.kept.ld = static_cast<int32_t>(n_max_);
  Result<std::shared_ptr<const KltTables>> tables =
      on_->card().tables(*host_, view_.position + 1, n_max_ / kPageTokens);
  if (!tables.ok()) return tables.status();
  view_.tables = std::move(*tables);
  return {};
}

void CudaKltLayer::count_step() {
  host_->count_step();
  // The device has it, the host has not: fetch().
  sinks_.there = host_->sinks().size();
  window_.there = host_->window().size();
}

void CudaKltLayer::end_step() {
  const bool wanted = wants_next_query();
  count_step();
  const float* q = std::exchange(query_, nullptr);
  if (!host_->wants_queries() || (wanted && q == nullptr)) return;
  try {
    host_->observe_queries(q, 1);  // of those that it does not want it reads nothing
  } catch (const std::bad_alloc&) {
    // The statistics go without this query.
  }
}

void CudaKltLayer::note_selection(std::vector<std::vector<int32_t>> tokens) {
  for (auto& of_head : tokens) {
    for (int32_t& t : of_head) t += static_cast<int32_t>(host_->n_sink());
  }
  selection_ = std::move(tokens);
}

std::optional<std::span<const int32_t>> CudaKltLayer::last_selection(int64_t head_kv) const {
  if (!is_sparse_ || head_kv >= std::ssize(selection_)) return std::nullopt;
  return std::span<const int32_t>(selection_[static_cast<size_t>(head_kv)]);
}

LayerBytes CudaKltLayer::bytes() const {
  const int64_t block = on_->card().exact()->block_bytes();
  const int64_t kept =
      host_->n_kept() > 0
          ? std::max<int64_t>(0, std::ssize(sinks_.blocks) - ceil_div(host_->n_sink(), kBlock)) * block
          : 0;
  return {.pages = std::ssize(pages_) * page_bytes_ + kept,
          .exact = (std::ssize(sinks_.blocks) + std::ssize(window_.blocks)) * block - kept,
          .basis = codec_ != nullptr ? codec_->bytes() : host_->bytes().basis,
          .hot = kept_.bytes() + table_.bytes(),
          .n_tokens_in_pages = host_->n_in_pages()};
}

}  // namespace narrows
