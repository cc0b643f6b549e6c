// What klt caches have on a GPU beside what is one layer's: pools of pages and of exact blocks and tables of
// rotations, which all caches of a model share; and of one cache its work space and what has gone wrong.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "kv/f16/cuda/block_pool.h"
#include "kv/kv_layer.h"

namespace narrows {

class KltLayer;

/// Rotations on the device; never changed once made.
struct KltTables {
  int64_t n_position = 0, n_page = 0;
  device::Buffer rope;   ///< f32 [n_position, head_dim / 2, 2]: cosine, sine
  device::Buffer turns;  ///< f32 [n_page, head_dim / 2, 2]: of a page's centre, see KltTurns
};

class KltCard {
 public:
  KltCard(std::shared_ptr<device::Device> device, int64_t n_head_kv, int64_t head_dim);

  const std::shared_ptr<device::Device>& device() const { return device_; }
  /// Of NARROWS_CUDA_BLOCK exact tokens of a layer, f16 [2][n_head_kv, tokens, head_dim].
  const std::shared_ptr<BlockPool>& exact() const { return exact_; }
  /// Of pages of so many bytes. Thread-safe.
  std::shared_ptr<BlockPool> pages(int64_t bytes);
  /// For positions and pages below these; out_of_memory, internal. Thread-safe.
  Result<std::shared_ptr<const KltTables>> tables(const KltLayer& layer, int64_t n_position, int64_t n_page);

 private:
  struct OfRope {
    std::vector<double> frequency;
    float magnitude;
    int64_t n_sink;
    std::shared_ptr<const KltTables> tables;
  };

  std::shared_ptr<device::Device> device_;
  std::shared_ptr<BlockPool> exact_;
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<BlockPool>> pages_;
  std::vector<OfRope> ropes_;
};

/// Of one cache. Not thread-safe.
class KltOnDevice {
 public:
  explicit KltOnDevice(std::shared_ptr<KltCard> card) : card_(std::move(card)) {}

  KltCard& card() const { return *card_; }
  /// For work that is waited for, between runs.
  Result<device::Stream*> stream();
  /// What steps of one sequence work in, of this many bytes; it was zeros when it was made, by work of the
  /// stream.
  Result<device::Buffer*> workspace(int64_t bytes, device::Stream& stream);

  /// The first token with a key or value that half precision cannot hold; -1: none is known.
  int64_t bad_token() const { return bad_; }
  void note_bad(int64_t token) { bad_ = bad_ < 0 ? token : std::min(bad_, token); }
  /// Tokens from n on are no more.
  void forget_from(int64_t n) {
    if (n <= bad_) bad_ = -1;
  }
  /// True once the device has not given what was read from it.
  bool lost() const { return lost_; }
  void note_lost() { lost_ = true; }

 private:
  std::shared_ptr<KltCard> card_;
  std::unique_ptr<device::Stream> stream_;
  device::Buffer workspace_;
  int64_t bad_ = -1;
  bool lost_ = false;
};

}  // namespace narrows
