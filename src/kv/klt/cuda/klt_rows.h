// A layer's rows of a prompt on the device, for its klt cache: they are put aside as they come, chunk by
// chunk, and then encoded there, while the prompt goes on with the next layer.
#pragma once

#include <memory>
#include <vector>

#include "kv/klt/cuda/klt_card.h"
#include "kv/klt/cuda/klt_codec.h"
#include "kv/klt/klt_layer.h"
#include "kv/klt/value_weights.h"

namespace narrows {

class CudaKltLayer;

/// Serves one layer after another. First whoever runs the prompt: begin(), then take() in the order of the
/// prompt's stream; when that work is done, in any one thread, CudaKltLayer::append_from().
class KltRows final : public KltRowSource {
 public:
  /// Both outlive it.
  KltRows(std::shared_ptr<KltCard> card, ValueWeights& weights) : card_(std::move(card)), weights_(weights) {}

  /// Device memory that n new tokens of this layer take, about.
  static int64_t bytes_for(const KltLayer& layer, int64_t n_new);

  /// Room for n_new tokens on top of those that the layer holds; the host has all of these.
  /// out_of_memory, internal: then nothing has begun.
  Status begin(int64_t index, const KltLayer& layer, int64_t n_new);
  /// Rows of the next tokens before RoPE, float32, ld apart.
  void take(const float* q, const float* k, const float* v, int64_t ld, int64_t n, device::Stream& stream);
  /// True if the output's matrix is to be seen: then take_output(), bf16 [n_out, width_q].
  bool wants_output() const { return wants_output_; }
  void take_output(const void* bf16, int64_t n_out, device::Stream& stream);

  int64_t n_new() const { return n_new_; }
  device::Stream& stream() { return *stream_; }
  /// Threads for what the host does of encode(); null: the caller's.
  void use_workers(Workers* workers) { workers_ = workers; }
  /// Where encode() finds its pages' transforms, if there are any, and leaves those that it made.
  std::shared_ptr<const KltCodec> codec;
  /// Pages that it has written, after those that the layer had.
  std::vector<BlockPool::Block> pages;
  /// Where they come from.
  std::shared_ptr<BlockPool> page_pool;

  // KltRowSource
  void read(int64_t first, int64_t n, float* k, float* v) override;
  Status status() const override { return status_; }
  Status add_queries(KltStatistics& to) override;
  Status set_rows(int64_t first, int64_t n, KltStatistics& to) override;
  Status value_weight(std::vector<double>& weight) override;
  Status find_shares(int64_t pos, int64_t n_page, int64_t n_after, const std::vector<float>& sinks,
                     std::vector<float>& share) override;
  Result<int64_t> encode(int64_t first, const std::vector<AnchorBits>& anchors,
                         const std::function<std::byte*(int64_t page)>& page) override;
  Status samples(int64_t pos, std::vector<kernels::f16_t>& rows) override;

 private:
  struct Sums {
    std::vector<double> sum, moments;
  };
  Status make_room();
  Status send_held();
  Status grow(device::Buffer& buffer, int64_t bytes) {
    return card_->device()->grow(buffer, bytes, "a prompt's keys and values");
  }
  void add_moments(device::MomentsArgs args, device::Buffer& sums, device::Buffer& work,
                   device::Stream& stream);
  Status fetch(const device::Buffer& sums, int64_t n_matrix, int64_t width, Sums& to);
  Status fetch_pages(size_t first, int64_t first_page, const std::function<std::byte*(int64_t page)>& page);
  const float* row(const device::Buffer& of, int64_t pos) const {
    return of.data<const float>() + (pos - origin_) * shape_.width();
  }
  /// Of a part.
  int64_t part_width() const { return heads_of_part(shape_.n_head_kv, shape_.head_dim) * shape_.head_dim; }

  std::shared_ptr<KltCard> card_;
  ValueWeights& weights_;
  std::unique_ptr<device::Stream> stream_;
  Workers* workers_ = nullptr;
  Status status_;  ///< of read()

  // Of the layer.
  int64_t index_ = 0;
  const KltLayer* layer_ = nullptr;
  AttentionShape shape_;
  int64_t n_held_ = 0, n_new_ = 0;
  int64_t origin_ = 0;   ///< position of the first row
  int64_t sampled_ = 0;  ///< of the first sampled query
  int64_t n_taken_ = 0;
  int64_t n_query_ = 0;  ///< tokens whose queries are in the sums
  bool wants_output_ = false;

  device::Buffer k_, v_;      ///< [rows, D]
  device::Buffer samples_;    ///< f16 [.., width_q]
  device::Buffer queries_;    ///< double: sums, moments
  device::Buffer output_;     ///< double: of the output's matrix
  device::Buffer work_;       ///< of sums in the prompt's stream
  device::Buffer own_work_;   ///< of those in stream_
  device::Buffer rows_sums_;  ///< double: of keys or values; then their centre
  device::Buffer sinks_, share_, lists_;
  KltForward forward_;
};

}  // namespace narrows
