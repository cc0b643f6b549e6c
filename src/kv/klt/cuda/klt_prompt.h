// A prompt that fills klt caches on a GPU: each layer's rows are put aside there (KltRows) and encoded by
// threads of their own, while the prompt goes on with the next layers.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "base/background.h"
#include "kv/klt/cuda/cuda_klt_layer.h"
#include "kv/klt/cuda/klt_rows.h"

namespace narrows {

class KltPrompt {
 public:
  /// The cache's layers; they, and weights, outlive it.
  using LayerOf = std::function<CudaKltLayer&(int64_t layer)>;
  /// What ValueWeights holds of a layer, if nothing on the device has it; called on the prompt's thread.
  using Weigh = std::function<Status(int64_t layer)>;

  /// out_of_memory: the system gives no more threads.
  static Result<std::shared_ptr<KltPrompt>> create(std::shared_ptr<KltCard> card, int n_threads,
                                                   LayerOf layer_of, ValueWeights& weights, Weigh weigh);
  /// Waits for all that has begun.
  ~KltPrompt();

  /// The next n_new tokens of a layer are to come. output: bf16 [n_out, width_q] of the layer on the device,
  /// null if it is not there.
  Status begin_layer(int64_t layer, int64_t n_new, const void* output, int64_t n_out, device::Stream& stream);
  /// Of the layer that has begun.
  KltRows& rows() { return *rows_; }
  /// All of its rows have been taken, and the device has done so. The first error of layers before it, if one
  /// is known.
  Status end_layer();
  /// When all layers have what came, or the first of their errors.
  Status finish();
  /// When nobody touches the layers any more, but for the one that has begun.
  void wait() { threads_->wait(); }

 private:
  KltPrompt(std::shared_ptr<KltCard> card, LayerOf layer_of, ValueWeights& weights, Weigh weigh)
      : card_(std::move(card)), layer_of_(std::move(layer_of)), weights_(weights), weigh_(std::move(weigh)) {}
  std::unique_ptr<KltRows> take_idle(int64_t bytes);
  void encode(int64_t layer, KltRows& rows);
  void give_back(std::unique_ptr<KltRows> rows);
  Status error();

  std::shared_ptr<KltCard> card_;
  LayerOf layer_of_;
  ValueWeights& weights_;
  Weigh weigh_;
  int64_t layer_ = -1;
  std::unique_ptr<KltRows> rows_;

  std::mutex mutex_;
  std::condition_variable given_back_;
  std::vector<std::unique_ptr<KltRows>> idle_;
  int64_t n_busy_ = 0;
  int64_t bad_layer_ = -1;
  Status error_;  ///< of the first layer that has one

  std::unique_ptr<Background> threads_;  ///< the last: they use all of the others
};

}  // namespace narrows
