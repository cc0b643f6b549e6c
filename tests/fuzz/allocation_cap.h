// Counts what malloc and new hand out, so that a file which claims huge counts is seen before the machine
// feels it.
#pragma once

#include <cstdint>

namespace narrows::fuzz {

/// From now on, live memory may grow by so many bytes; more is a finding. Resets the peak.
void set_allocation_cap(int64_t bytes);
void lift_allocation_cap();
/// Most bytes that were alive at once since set_allocation_cap(), beside those alive then.
int64_t allocation_peak();

}  // namespace narrows::fuzz
