#include "kv/klt/cuda/klt_prompt.h"

#include <algorithm>
#include <new>
#include <string>

namespace narrows {

namespace {

/// Device memory that layers may take at a time: as many as there are threads if they are small, at least
/// two, so that one is encoded while the next comes.
constexpr int64_t kWaitingBytes = int64_t{2} << 30;

}  // namespace

Result<std::shared_ptr<KltPrompt>> KltPrompt::create(std::shared_ptr<KltCard> card, int n_threads,
                                                     LayerOf layer_of, ValueWeights& weights, Weigh weigh) {
  std::shared_ptr<KltPrompt> made(
      new KltPrompt(std::move(card), std::move(layer_of), weights, std::move(weigh)));
  Result<std::unique_ptr<Background>> threads = Background::create(n_threads);
  if (!threads.ok()) return threads.status();
  made->threads_ = std::move(*threads);
  return made;
}

KltPrompt::~KltPrompt() {
  // Before anything goes: jobs that wait use all of it, the threads too.
  if (threads_ != nullptr) threads_->wait();
}

std::unique_ptr<KltRows> KltPrompt::take_idle(int64_t bytes) {
  std::unique_lock<std::mutex> lock(mutex_);
  const int64_t most =
      std::min<int64_t>(threads_->n_threads() + 1, kWaitingBytes / std::max<int64_t>(1, bytes));
  given_back_.wait(lock, [&] { return n_busy_ < std::max<int64_t>(most, 2); });
  if (idle_.empty()) return std::make_unique<KltRows>(card_, weights_);
  std::unique_ptr<KltRows> rows = std::move(idle_.back());
  idle_.pop_back();
  return rows;
}

Status KltPrompt::begin_layer(int64_t layer, int64_t n_new, const void* output, int64_t n_out,
                              device::Stream& stream) {
  CudaKltLayer& to = layer_of_(layer);
  layer_ = layer;
  if (Status s = to.fetch(); !s.ok()) return s;
  rows_ = take_idle(KltRows::bytes_for(to.host(), n_new));
  Status status = rows_->begin(layer, to.host(), n_new);
  if (status.code() == StatusCode::out_of_memory) {
    // What others have may be enough.
    threads_->wait();
    idle_.clear();
    rows_ = std::make_unique<KltRows>(card_, weights_);
    status = rows_->begin(layer, to.host(), n_new);
  }
  if (status.ok() && rows_->wants_output() && output == nullptr) {
    status = weigh_(layer);
  } else if (status.ok() && rows_->wants_output()) {
    rows_->take_output(output, n_out, stream);
  }
  return status;
}

Status KltPrompt::end_layer() {
  auto rows = std::make_shared<std::unique_ptr<KltRows>>(std::move(rows_));
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++n_busy_;
  }
  const auto job = [this, rows, layer = layer_] {
    encode(layer, **rows);
    give_back(std::move(*rows));
  };
  try {
    threads_->give(job);
  } catch (const std::bad_alloc&) {
    job();
  }
  return error();
}

void KltPrompt::encode(int64_t layer, KltRows& rows) {
  Status status;
  try {
    status = layer_of_(layer).append_from(rows, *threads_);
  } catch (const std::bad_alloc&) {
    status = {StatusCode::out_of_memory, "no memory for the key/value cache of a prompt"};
  }
  if (status.ok()) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (bad_layer_ >= 0 && bad_layer_ < layer) return;
  bad_layer_ = layer;
  error_ = {status.code(), "layer " + std::to_string(layer) + ": " + std::string(status.message())};
}

void KltPrompt::give_back(std::unique_ptr<KltRows> rows) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(rows));
    --n_busy_;
  }
  given_back_.notify_all();
}

Status KltPrompt::error() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return error_;
}

Status KltPrompt::finish() {
  threads_->wait();
  return error();
}

}  // namespace narrows
