// The operators of device/device_api.h between attentions: launches, on the current device.
#pragma once

#include <cuda_runtime.h>

#include "device/device_api.h"

namespace narrows::cuda {

/// A kernel: to ask whether the library has machine code for the card.
const void* probe_kernel();

void launch_prepare(const device::PrepareArgs& a, cudaStream_t stream);
/// False: a form that has no kernel.
bool launch_multiply(const device::MultiplyArgs& a, cudaStream_t stream);
bool launch_unpack(const device::Weights& w, void* bf16, cudaStream_t stream);
void launch_gemm(const device::GemmArgs& a, cudaStream_t stream);
void launch_add(const device::AddArgs& a, cudaStream_t stream);
void launch_head_norm(const device::HeadNormArgs& a, cudaStream_t stream);
void launch_store(const device::StoreArgs& a, cudaStream_t stream);
/// False: a head_dim that has no kernel.
bool launch_prompt(const device::PromptArgs& a, cudaStream_t stream);

// Of caches that encode on the device; false: sizes that have no kernel.
bool launch_moments(const device::MomentsArgs& a, cudaStream_t stream);
void launch_sample(const device::SampleArgs& a, cudaStream_t stream);
bool launch_klt_shares(const device::KltSharesArgs& a, cudaStream_t stream);
bool launch_klt_encode(const device::KltEncodeArgs& a, cudaStream_t stream);

}  // namespace narrows::cuda
