#include "kv/klt/cuda/klt_card.h"

#include <algorithm>

#include "kv/klt/klt_work.h"

namespace narrows {

namespace {

/// Of a slab: some MB of an 8B model.
constexpr int64_t kSlabPages = 64;

int64_t roomy(int64_t n, int64_t unit) { return (n + n / 4 + unit - 1) / unit * unit; }

Status send(device::Device& device, const std::vector<float>& rows, device::Buffer& to,
            device::Stream& stream) {
  const auto bytes = static_cast<int64_t>(rows.size() * sizeof(float));
  if (Status s = device.grow(to, bytes, "the rotations of a context"); !s.ok()) return s;
  stream.upload(to.data(), rows.data(), bytes);
  stream.wait();
  return stream.take_error();
}

}  // namespace

KltCard::KltCard(std::shared_ptr<device::Device> device, int64_t n_head_kv, int64_t head_dim)
    : device_(std::move(device)),
      exact_(std::make_shared<BlockPool>(device_, 1, 4 * n_head_kv * head_dim * NARROWS_CUDA_BLOCK,
                                         kSlabPages, "more exact tokens of the key/value cache")) {}

std::shared_ptr<BlockPool> KltCard::pages(int64_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::shared_ptr<BlockPool>& pool = pages_[bytes];
  if (pool == nullptr)
    pool = std::make_shared<BlockPool>(device_, 1, bytes, kSlabPages, "more pages of the key/value cache");
  return pool;
}

Result<std::shared_ptr<const KltTables>> KltCard::tables(const KltLayer& layer, int64_t n_position,
                                                         int64_t n_page) {
  const kernels::RopeTable& rope = layer.rope();
  const std::lock_guard<std::mutex> lock(mutex_);
  auto of = std::find_if(ropes_.begin(), ropes_.end(), [&](const OfRope& r) {
    return r.frequency == rope.frequency() && r.magnitude == rope.magnitude() && r.n_sink == layer.n_sink();
  });
  if (of == ropes_.end())
    of = ropes_.insert(of, {rope.frequency(), rope.magnitude(), layer.n_sink(), nullptr});
  if (of->tables != nullptr && of->tables->n_position >= n_position && of->tables->n_page >= n_page)
    return of->tables;

  auto made = std::make_shared<KltTables>();
  made->n_position = std::min(rope.n_ctx(), roomy(n_position, 1024));
  made->n_page = roomy(n_page, 16);
  const int64_t width = layer.shape().head_dim;
  std::vector<float> rows(static_cast<size_t>(made->n_position * width));
  for (int64_t i = 0; i < made->n_position; ++i)
    rope.at(i, rows.data() + i * width, rows.data() + i * width + 1, 2);
  Result<std::unique_ptr<device::Stream>> stream = device::Stream::create(device_);
  if (!stream.ok()) return stream.status();
  if (Status s = send(*device_, rows, made->rope, **stream); !s.ok()) return s;
  KltTurns turns(layer, kPageTokens);
  turns.grow(made->n_page);
  if (Status s = send(*device_, turns.rows, made->turns, **stream); !s.ok()) return s;
  of->tables = std::move(made);
  return of->tables;
}

Result<device::Stream*> KltOnDevice::stream() {
  if (stream_ == nullptr) {
    Result<std::unique_ptr<device::Stream>> made = device::Stream::create(card_->device());
    if (!made.ok()) return made.status();
    stream_ = std::move(*made);
  }
  return stream_.get();
}

Result<device::Buffer*> KltOnDevice::workspace(int64_t bytes, device::Stream& stream) {
  if (workspace_.bytes() >= bytes) return &workspace_;
  stream.wait();
  if (Status s = card_->device()->grow(workspace_, bytes + bytes / 4, "what attention works in"); !s.ok())
    return s;
  stream.fill(workspace_.data(), 0, workspace_.bytes());
  return &workspace_;
}

}  // namespace narrows
