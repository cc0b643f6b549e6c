// The C API: a plan for the device at hand, then the launches.
#include "exec/cuda/launch.h"

namespace narrows::cuda {

namespace {

thread_local cudaError_t last_error = cudaSuccess;

int multiprocessors() {
  int device = 0, n = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return kSmOfH100;
  return n;
}

template <class Plan, class Args>
int workspace_of(const Args* args, size_t* bytes, int (*plan_of)(const Args&, int, Plan&)) {
  if (args == nullptr || bytes == nullptr) return NARROWS_CUDA_BAD_ARGUMENT;
  Plan plan;
  const int status = plan_of(*args, multiprocessors(), plan);
  *bytes = status == NARROWS_CUDA_OK ? plan.bytes : 0;
  return status;
}

template <class Plan, class Args>
int run(const Args* args, void* workspace, size_t bytes, void* stream,
        int (*plan_of)(const Args&, int, Plan&),
        int (*launch)(const Args&, const Plan&, void*, cudaStream_t)) {
  if (args == nullptr) return NARROWS_CUDA_BAD_ARGUMENT;
  Plan plan;
  if (const int status = plan_of(*args, multiprocessors(), plan); status != NARROWS_CUDA_OK) return status;
  if (workspace == nullptr || reinterpret_cast<uintptr_t>(workspace) % 256 != 0)
    return NARROWS_CUDA_BAD_ARGUMENT;
  if (bytes < plan.bytes) return NARROWS_CUDA_SMALL_WORKSPACE;
  return launch(*args, plan, workspace, static_cast<cudaStream_t>(stream));
}

template <class Plan, class Args>
int selection_of(const Args* args, narrows_cuda_selection* at, int (*plan_of)(const Args&, int, Plan&)) {
  if (args == nullptr || at == nullptr) return NARROWS_CUDA_BAD_ARGUMENT;
  Plan plan;
  const int status = plan_of(*args, multiprocessors(), plan);
  *at = {plan.at.selected, plan.at.n_selected, plan.at.n_missing};
  return status;
}

}  // namespace

int launched() {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return NARROWS_CUDA_OK;
  last_error = error;
  return NARROWS_CUDA_LAUNCH_FAILED;
}

bool begins_early() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major >= 9;
}

}  // namespace narrows::cuda

using namespace narrows::cuda;

extern "C" {

const char* narrows_cuda_last_error(void) { return cudaGetErrorName(last_error); }

int narrows_cuda_f16_workspace(const narrows_cuda_f16_args* args, size_t* bytes) {
  return workspace_of<F16Plan>(args, bytes, plan_f16);
}
int narrows_cuda_f16_decode(const narrows_cuda_f16_args* args, void* workspace, size_t bytes, void* stream) {
  return run<F16Plan>(args, workspace, bytes, stream, plan_f16, launch_f16);
}
int narrows_cuda_sals_workspace(const narrows_cuda_sals_args* args, size_t* bytes) {
  return workspace_of<SalsPlan>(args, bytes, plan_sals);
}
int narrows_cuda_sals_decode(const narrows_cuda_sals_args* args, void* workspace, size_t bytes,
                             void* stream) {
  return run<SalsPlan>(args, workspace, bytes, stream, plan_sals, launch_sals);
}
int narrows_cuda_sals_selection(const narrows_cuda_sals_args* args, narrows_cuda_selection* at) {
  return selection_of<SalsPlan>(args, at, plan_sals);
}
int narrows_cuda_klt_workspace(const narrows_cuda_klt_args* args, size_t* bytes) {
  return workspace_of<KltPlan>(args, bytes, plan_klt);
}
int narrows_cuda_klt_decode(const narrows_cuda_klt_args* args, void* workspace, size_t bytes, void* stream) {
  return run<KltPlan>(args, workspace, bytes, stream, plan_klt, launch_klt);
}
int narrows_cuda_klt_selection(const narrows_cuda_klt_args* args, narrows_cuda_selection* at) {
  return selection_of<KltPlan>(args, at, plan_klt);
}

}  // extern "C"
