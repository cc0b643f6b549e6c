// What a device does of a prompt for klt caches, over the host's memory, for host_device.cpp: sums in double,
// codes by the scalar oracle of the CPU's kernels.
#pragma once

#include "device/device_api.h"

namespace narrows::testing {

/// All: 0, or -1 for what the header forbids.
int host_moments(const device::MomentsArgs& a);
int host_sample(const device::SampleArgs& a);
int host_klt_shares(const device::KltSharesArgs& a);
int host_klt_encode(const device::KltEncodeArgs& a);

}  // namespace narrows::testing
