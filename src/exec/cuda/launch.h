// What the C API and the kernels' files say to each other.
#pragma once

#include <cuda_runtime.h>

#include "exec/cuda/arguments.h"

namespace narrows::cuda {

/// The status of the launches just made by this thread; keeps the error's name.
int launched();

int launch_f16(const narrows_cuda_f16_args& args, const F16Plan& plan, void* workspace, cudaStream_t stream);
int launch_sals(const narrows_cuda_sals_args& args, const SalsPlan& plan, void* workspace,
                cudaStream_t stream);
int launch_klt(const narrows_cuda_klt_args& args, const KltPlan& plan, void* workspace, cudaStream_t stream);

}  // namespace narrows::cuda
