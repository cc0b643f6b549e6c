// `narrows eval --task precision`: its output; the flags live with `eval`.
#pragma once

#include <string>
#include <vector>

#include "eval/precision.h"

namespace narrows::cli {

/// A line a case, a column a kernel: relative RMSE, and the share of rows with NaN or infinity if there are
/// any. Of the model's heads only those with the largest scores.
std::string precision_table(const std::vector<PrecisionRow>& rows);

/// A list of {"case","kernel","rmse","nan_rows","rows","head_dim","length","layer","head","qk_max",
/// "qk_max_shifted","resonance"}; rmse is null if no row is finite, layer and head if the numbers are random.
std::string precision_json(const std::vector<PrecisionRow>& rows);

}  // namespace narrows::cli
