// The klt operators of narrows/cuda_ops.h over the host's memory, for host_device.cpp.
#pragma once

#include <cstddef>

#include "narrows/cuda_ops.h"

namespace narrows::testing {

size_t host_klt_workspace(const narrows_cuda_klt_args& a);
/// 0, or -1 for what the header forbids.
int host_klt_decode(const narrows_cuda_klt_args& a, void* workspace);
narrows_cuda_selection host_klt_selection(const narrows_cuda_klt_args& a);

}  // namespace narrows::testing
