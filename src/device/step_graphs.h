// The operators of a step as graphs: what a step asks for is written down, and where a step before has asked
// for the same, to the last argument, its graph is launched in place of some hundred kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "device/device_api.h"

namespace narrows::device {

class StepGraphs {
 public:
  StepGraphs() = default;
  StepGraphs(const StepGraphs&) = delete;
  StepGraphs& operator=(const StepGraphs&) = delete;

  template <class Args>
  static constexpr bool can_hold() {
    return std::is_same_v<Args, PrepareArgs> || std::is_same_v<Args, MultiplyArgs> ||
           std::is_same_v<Args, AddArgs> || std::is_same_v<Args, HeadNormArgs> ||
           std::is_same_v<Args, StoreArgs>;
  }

  bool records() const { return records_; }
  void begin();
  /// Forgets what was written down.
  void drop();
  void add(const PrepareArgs& a);
  void add(const MultiplyArgs& a);
  void add(const AddArgs& a);
  void add(const HeadNormArgs& a);
  void add(const StoreArgs& a);
  void add(const CopyArgs& a);
  void add(const narrows_cuda_f16_args& a, void* workspace, int64_t bytes);
  void add(const narrows_cuda_klt_args& a, void* workspace, int64_t bytes);

  /// Launches it all as a graph, and ends writing down. The table's code.
  int launch(const Api& api, int device, void* stream);
  /// The same one after the other, without a graph.
  int launch_each(const Api& api, int device, void* stream);
  /// All graphs, before this goes.
  void release(const Api& api, int device);

 private:
  struct Made {
    std::vector<char> key;
    void* graph = nullptr;
    int64_t used = 0;
  };
  /// Keeps args; their fields, which tell one call from another, are put by the caller.
  template <class Args>
  void keep(Kind kind, const Args& args, void* workspace = nullptr, int64_t bytes = 0);
  template <class... Fields>
  void put(const Fields&... fields);
  void put_heads(const narrows_cuda_heads& h);
  void put_blocks(const narrows_cuda_blocks& b);
  std::vector<Call> calls() const;

  bool records_ = false;
  std::vector<Call> calls_;  ///< args: offsets into args_
  std::vector<char> args_, key_;
  std::vector<Made> made_;
  int64_t n_launch_ = 0;
};

}  // namespace narrows::device
