// What the C API and the kernels' files say to each other.
#pragma once

#include <cuda_runtime.h>

#include "exec/cuda/arguments.h"

namespace narrows::cuda {

/// The status of the launches just made by this thread; keeps the error's name.
int launched();

/// Can a kernel of the device at hand begin before the one launched before it has ended (compute
/// capability 9.0)?
bool begins_early();

#ifdef __CUDACC__
/// Launches a kernel that begins while the one launched before it still runs, where a device can: it must
/// call after_previous() before it reads what that one (or any before it since an ordinary launch) writes, or
/// writes what that one reads.
template <class Kernel, class... Args>
int launch_early(Kernel kernel, dim3 grid, int threads, int bytes, cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = begins_early() ? 1 : 0;
  static_cast<void>(cudaLaunchKernelEx(&config, kernel, args...));
  return launched();
}

/// Waits until the kernel before has ended and what it wrote is seen.
__device__ inline void after_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Lets the next kernel's blocks begin, as room allows. Where kernels do so before they have waited, a whole
/// chain of them may have begun: before it waits, a kernel then reads nothing that any of the chain writes
/// (weights, transforms). One that waits first makes what was before it safe to read for those that follow.
__device__ inline void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif

int launch_f16(const narrows_cuda_f16_args& args, const F16Plan& plan, void* workspace, cudaStream_t stream);
int launch_sals(const narrows_cuda_sals_args& args, const SalsPlan& plan, void* workspace,
                cudaStream_t stream);
int launch_klt(const narrows_cuda_klt_args& args, const KltPlan& plan, void* workspace, cudaStream_t stream);

}  // namespace narrows::cuda
