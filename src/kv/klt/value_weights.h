// What an error of a value costs, by layer of a model: it is of the weights alone, so it is found once.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

namespace narrows {

/// Thread-safe. Kept in float32.
class ValueWeights {
 public:
  /// False if it is not known yet.
  bool get(int64_t layer, std::vector<double>& weight) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!is_known(layer)) return false;
    const std::vector<float>& known = of_layer_[static_cast<size_t>(layer)];
    weight.assign(known.begin(), known.end());
    return true;
  }
  bool knows(int64_t layer) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return is_known(layer);
  }
  /// weight becomes what get() gives from then on. May throw std::bad_alloc.
  void put(int64_t layer, std::vector<double>& weight) {
    std::vector<float> known(weight.begin(), weight.end());
    weight.assign(known.begin(), known.end());
    const std::lock_guard<std::mutex> lock(mutex_);
    if (static_cast<size_t>(layer) >= of_layer_.size()) of_layer_.resize(static_cast<size_t>(layer) + 1);
    of_layer_[static_cast<size_t>(layer)] = std::move(known);
  }

 private:
  bool is_known(int64_t layer) const {
    return static_cast<size_t>(layer) < of_layer_.size() && !of_layer_[static_cast<size_t>(layer)].empty();
  }
  mutable std::mutex mutex_;
  std::vector<std::vector<float>> of_layer_;
};

}  // namespace narrows
