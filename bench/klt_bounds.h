// The least time that a step over klt caches can take, stage by stage: what must come from memory and what
// must be computed, for the tokens that the step has read.
#pragma once

#include "bench/machine.h"
#include "engine/session_impl.h"

namespace narrows {

/// Work of one stage over all layers.
struct StageWork {
  double bytes = 0;     ///< from memory that no cache holds
  double flops_16 = 0;  ///< products of bfloat16 pairs; products of bytes count half
  double flops_32 = 0;  ///< in float32, an addition and a multiplication count as two
  /// At least, in seconds, if reading and computing overlap perfectly.
  double seconds(const MachineLimits& machine) const;
};

struct KltStepWork {
  StageWork score, select, rebuild, attend;
};

/// Adds what the session's last step had to do. Tokens that the step before had selected need no rebuilding;
/// `selected` [n_layer * n_head_kv] holds them, and then those of this step.
void add_klt_work(Session::Impl& session, std::vector<std::vector<int32_t>>& selected, KltStepWork& work);

}  // namespace narrows
