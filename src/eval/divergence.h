// Next-token distributions and how far they are from each other, in double.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "narrows/status.h"

namespace narrows {

/// log softmax; false if a logit is not finite.
bool log_softmax(std::span<const float> logits, std::vector<double>& out);

/// KL divergence of log probabilities to those of a reference, nats.
double divergence(const std::vector<double>& reference, const std::vector<double>& lp);

bool same_top(const std::vector<double>& a, const std::vector<double>& b);

/// non_finite, of "--kv NAME" or another engine.
Status logits_not_finite(const std::string& who);

}  // namespace narrows
