// What an error of a value costs the residual stream: the Gram matrices of the output projection, head by
// head.
#pragma once

#include <cstdint>
#include <vector>

#include "base/workers.h"
#include "model/weights.h"
#include "narrows/status.h"

namespace narrows {

/// weight [n_head_kv, head_dim, head_dim]: for each KV head the sum of Wo_h^T Wo_h over its query heads h.
Status value_weight(const ModelWeights& weights, int64_t layer, std::vector<double>& weight,
                    Workers* workers = nullptr);

}  // namespace narrows
