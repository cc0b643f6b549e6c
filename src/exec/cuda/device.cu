// The table of device/device_api.h: memory, streams and the operators' launches.
#include <cstring>

#include "exec/cuda/launch.h"
#include "exec/cuda/layer_ops.h"

namespace narrows::cuda {

namespace {

using device::Info;

thread_local const char* sentence = "no error";

int failed(cudaError_t error) {
  if (error == cudaSuccess) return 0;
  static_cast<void>(cudaGetLastError());  // what can be forgotten is
  sentence = cudaGetErrorString(error);
  return static_cast<int>(error);
}

int unsupported(const char* what) {
  sentence = what;
  return -1;
}

const char* error() { return sentence; }

int count(int* n, int* driver, int* needed) {
  *n = 0;
  if (const int e = failed(cudaDriverGetVersion(driver)); e != 0) return e;
  if (const int e = failed(cudaRuntimeGetVersion(needed)); e != 0) return e;
  if (*driver < *needed / 1000 * 1000) return 0;
  const cudaError_t e = cudaGetDeviceCount(n);
  if (e == cudaErrorNoDevice) {
    static_cast<void>(cudaGetLastError());
    return 0;
  }
  return failed(e);
}

int info(int device, Info* to) {
  cudaDeviceProp p;
  if (const int e = failed(cudaGetDeviceProperties(&p, device)); e != 0) return e;
  *to = Info{};
  std::strncpy(to->name, p.name, sizeof(to->name) - 1);
  to->major = p.major;
  to->minor = p.minor;
  size_t free_bytes = 0, total = 0;
  if (const int e = failed(cudaSetDevice(device)); e != 0) return e;
  if (const int e = failed(cudaMemGetInfo(&free_bytes, &total)); e != 0) return e;
  to->total_bytes = static_cast<int64_t>(total);
  to->free_bytes = static_cast<int64_t>(free_bytes);
  // Without machine code for the card the first launch would fail.
  cudaFuncAttributes attributes;
  return failed(cudaFuncGetAttributes(&attributes, probe_kernel()));
}

int allocate(int device, int64_t bytes, void** p) {
  *p = nullptr;
  if (const int e = failed(cudaSetDevice(device)); e != 0) return e;
  const cudaError_t e = cudaMalloc(p, static_cast<size_t>(bytes));
  if (e != cudaErrorMemoryAllocation) return failed(e);
  static_cast<void>(cudaGetLastError());
  *p = nullptr;
  return 0;
}

void release(int device, void* p) {
  if (cudaSetDevice(device) == cudaSuccess) static_cast<void>(cudaFree(p));
}

int make_stream(int device, void** stream) {
  if (const int e = failed(cudaSetDevice(device)); e != 0) return e;
  cudaStream_t made = nullptr;
  const int e = failed(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking));
  *stream = made;
  return e;
}

void end_stream(int device, void* stream) {
  if (cudaSetDevice(device) == cudaSuccess)
    static_cast<void>(cudaStreamDestroy(static_cast<cudaStream_t>(stream)));
}

int transfer(int device, void* to, const void* from, int64_t bytes, cudaMemcpyKind kind, void* stream) {
  if (const int e = failed(cudaSetDevice(device)); e != 0) return e;
  return failed(
      cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), kind, static_cast<cudaStream_t>(stream)));
}

int wait(int device, void* stream) {
  if (const int e = failed(cudaSetDevice(device)); e != 0) return e;
  return failed(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)));
}

/// Pageable memory: the copy has been taken when the call returns.
int upload(int device, void* to, const void* from, int64_t bytes, void* stream) {
  return transfer(device, to, from, bytes, cudaMemcpyHostToDevice, stream);
}
int download(int device, void* to, const void* from, int64_t bytes, void* stream) {
  if (const int e = transfer(device, to, from, bytes, cudaMemcpyDeviceToHost, stream); e != 0) return e;
  return wait(device, stream);
}
int download_rows(int device, void* to, int64_t to_ld, const void* from, int64_t from_ld, int64_t bytes,
                  int64_t n, void* stream) {
  if (const int e = failed(cudaSetDevice(device)); e != 0) return e;
  const int e = failed(cudaMemcpy2DAsync(to, static_cast<size_t>(to_ld), from, static_cast<size_t>(from_ld),
                                         static_cast<size_t>(bytes), static_cast<size_t>(n),
                                         cudaMemcpyDeviceToHost, static_cast<cudaStream_t>(stream)));
  return e != 0 ? e : wait(device, stream);
}
int copy_rows(int device, void* to, int64_t to_ld, const void* from, int64_t from_ld, int64_t bytes,
              int64_t n, void* stream) {
  if (const int e = failed(cudaSetDevice(device)); e != 0) return e;
  return failed(cudaMemcpy2DAsync(to, static_cast<size_t>(to_ld), from, static_cast<size_t>(from_ld),
                                  static_cast<size_t>(bytes), static_cast<size_t>(n),
                                  cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream)));
}
int copy(int device, void* to, const void* from, int64_t bytes, void* stream) {
  return transfer(device, to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}
int fill(int device, void* to, int byte, int64_t bytes, void* stream) {
  if (const int e = failed(cudaSetDevice(device)); e != 0) return e;
  return failed(cudaMemsetAsync(to, byte, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)));
}

/// Launches on the device, and says how it went.
template <class Launch>
int launch_on(int device, void* stream, Launch&& launch) {
  if (const int e = failed(cudaSetDevice(device)); e != 0) return e;
  if (!launch(static_cast<cudaStream_t>(stream))) return unsupported("no kernel for such sizes");
  return failed(cudaGetLastError());
}

template <class Args, void launch(const Args&, cudaStream_t)>
int op(int device, const Args* a, void* stream) {
  return launch_on(device, stream, [&](cudaStream_t s) {
    launch(*a, s);
    return true;
  });
}
template <class Args, bool launch(const Args&, cudaStream_t)>
int may(int device, const Args* a, void* stream) {
  return launch_on(device, stream, [&](cudaStream_t s) { return launch(*a, s); });
}

int unpack(int device, const device::Weights* w, void* bf16, void* stream) {
  return launch_on(device, stream, [&](cudaStream_t s) { return launch_unpack(*w, bf16, s); });
}

int operator_status(int status) {
  if (status == NARROWS_CUDA_OK) return 0;
  return unsupported(status == NARROWS_CUDA_LAUNCH_FAILED ? narrows_cuda_last_error()
                                                          : "the attention does not take such sizes");
}

int f16_workspace(int device, const narrows_cuda_f16_args* a, size_t* bytes) {
  if (const int e = failed(cudaSetDevice(device)); e != 0) return e;
  return operator_status(narrows_cuda_f16_workspace(a, bytes));
}
int f16_decode(int device, const narrows_cuda_f16_args* a, void* workspace, size_t bytes, void* stream) {
  if (const int e = failed(cudaSetDevice(device)); e != 0) return e;
  return operator_status(narrows_cuda_f16_decode(a, workspace, bytes, stream));
}

int klt_workspace(int device, const narrows_cuda_klt_args* a, size_t* bytes) {
  if (const int e = failed(cudaSetDevice(device)); e != 0) return e;
  return operator_status(narrows_cuda_klt_workspace(a, bytes));
}
int klt_decode(int device, const narrows_cuda_klt_args* a, void* workspace, size_t bytes, void* stream) {
  if (const int e = failed(cudaSetDevice(device)); e != 0) return e;
  return operator_status(narrows_cuda_klt_decode(a, workspace, bytes, stream));
}
int klt_selection(int device, const narrows_cuda_klt_args* a, narrows_cuda_selection* at) {
  if (const int e = failed(cudaSetDevice(device)); e != 0) return e;
  return operator_status(narrows_cuda_klt_selection(a, at));
}

int do_call(int device, const device::Call& call, void* stream) {
  using namespace device;
  switch (call.kind) {
    case kPrepare:
      return op<PrepareArgs, launch_prepare>(device, static_cast<const PrepareArgs*>(call.args), stream);
    case kMultiply:
      return may<MultiplyArgs, launch_multiply>(device, static_cast<const MultiplyArgs*>(call.args), stream);
    case kAdd:
      return op<AddArgs, launch_add>(device, static_cast<const AddArgs*>(call.args), stream);
    case kHeadNorm:
      return op<HeadNormArgs, launch_head_norm>(device, static_cast<const HeadNormArgs*>(call.args), stream);
    case kStore:
      return op<StoreArgs, launch_store>(device, static_cast<const StoreArgs*>(call.args), stream);
    case kF16Decode:
      return f16_decode(device, static_cast<const narrows_cuda_f16_args*>(call.args), call.workspace,
                        call.bytes, stream);
    case kKltDecode:
      return klt_decode(device, static_cast<const narrows_cuda_klt_args*>(call.args), call.workspace,
                        call.bytes, stream);
    case kCopy: {
      const auto& a = *static_cast<const CopyArgs*>(call.args);
      return copy(device, a.to, a.from, a.bytes, stream);
    }
    default:
      return unsupported("a graph of an unknown operator");
  }
}

int make_graph(int device, const device::Call* calls, int64_t n, void** graph) {
  *graph = nullptr;
  if (const int e = failed(cudaSetDevice(device)); e != 0) return e;
  cudaStream_t stream = nullptr;
  if (const int e = failed(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)); e != 0) return e;
  int result = failed(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
  if (result == 0) {
    for (int64_t i = 0; i < n && result == 0; ++i) result = do_call(device, calls[i], stream);
    cudaGraph_t captured = nullptr;
    const int ended = failed(cudaStreamEndCapture(stream, &captured));
    if (result == 0) result = ended;
    cudaGraphExec_t made = nullptr;
    if (result == 0) result = failed(cudaGraphInstantiate(&made, captured, 0));
    if (captured != nullptr) static_cast<void>(cudaGraphDestroy(captured));
    *graph = made;
  }
  static_cast<void>(cudaStreamDestroy(stream));
  return result;
}
int launch_graph(int device, void* graph, void* stream) {
  if (const int e = failed(cudaSetDevice(device)); e != 0) return e;
  return failed(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), static_cast<cudaStream_t>(stream)));
}
void end_graph(int device, void* graph) {
  if (cudaSetDevice(device) == cudaSuccess)
    static_cast<void>(cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph)));
}

}  // namespace

}  // namespace narrows::cuda

extern "C" __attribute__((visibility("default"))) const narrows::device::Api* narrows_cuda_device_api() {
  using namespace narrows::cuda;
  using namespace narrows::device;
  static const Api api = {kApiVersion,
                          error,
                          count,
                          info,
                          allocate,
                          release,
                          make_stream,
                          end_stream,
                          upload,
                          download,
                          download_rows,
                          copy,
                          fill,
                          wait,
                          op<PrepareArgs, launch_prepare>,
                          may<MultiplyArgs, launch_multiply>,
                          unpack,
                          op<GemmArgs, launch_gemm>,
                          op<AddArgs, launch_add>,
                          op<HeadNormArgs, launch_head_norm>,
                          op<StoreArgs, launch_store>,
                          may<PromptArgs, launch_prompt>,
                          f16_workspace,
                          f16_decode,
                          klt_workspace,
                          klt_decode,
                          klt_selection,
                          make_graph,
                          launch_graph,
                          end_graph,
                          copy_rows,
                          may<MomentsArgs, launch_moments>,
                          op<SampleArgs, launch_sample>,
                          may<KltSharesArgs, launch_klt_shares>,
                          may<KltEncodeArgs, launch_klt_encode>};
  return &api;
}
