// What the machine can do at most, measured: how fast its threads read memory together and how fast they
// multiply. A decode step reads the weights once, a prompt multiplies by them; how near an engine comes is
// its share of these.
#pragma once

#include <cstdint>
#include <string>

#include "model/plan.h"
#include "narrows/status.h"

namespace narrows {

struct MachineLimits {
  int n_threads = 0;
  double read_bytes_s = 0;  ///< memory that no cache holds, all threads together
  double flops_s =
      0;  ///< of the faster of the two formats below, an addition and a multiplication count as two
  std::string flops_format;  ///< "bf16" or "f32"
};

/// Takes about half a second and 256 MB for that time. out_of_memory; internal if oneDNN does not start.
Result<MachineLimits> measure_machine(int n_threads);

/// What a model makes the machine do.
struct ModelWork {
  int64_t weight_bytes =
      0;  ///< of the matrices that a token goes through, as the file holds them: read once each
  /// Floating-point operations of a prompt of n tokens: products, causal attention, logits of one row.
  double prompt_flops(int64_t n) const;

  double flops_token = 0;  ///< products of a layer's matrices
  double flops_pair = 0;   ///< attention of one query to one key
  double flops_logits = 0;
};
ModelWork work_of(const Plan& plan);

}  // namespace narrows
