// What lies between products, a block a row: norms, activations, rounding to bytes or bf16, residuals; and
// keys and values on their way into a cache.
#include "exec/cuda/launch.h"
#include "exec/cuda/layer_ops.h"
#include "exec/cuda/mma.cuh"

namespace narrows::cuda {

namespace {

constexpr int kThreads = 256;
/// Threads of a block where rows are few and are normed.
constexpr int kWide = 512;
constexpr int64_t kFewRows = 64;

/// Sum over the block; `shared` [THREADS / 32].
template <int THREADS>
__device__ float block_sum(float x, float* shared) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0U, x, i);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < THREADS / 32; ++i) sum += shared[i];
  return sum;
}

__device__ float gated(int gate, float g, float up) {
  if (gate == device::kSilu) return g / (1 + __expf(-g)) * up;
  const float t = 1.5957691216057308F * (g + 0.044715F * g * g * g);
  return g / (1 + __expf(-t)) * up;
}

/// Blocks x are rows, blocks y share the columns of a row; each adds up all of a row that is normed, which is
/// quicker than waiting for each other.
template <int THREADS>
__global__ __launch_bounds__(THREADS) void prepare_rows(const __grid_constant__ device::PrepareArgs a) {
  __shared__ float shared[THREADS / 32];
  const int64_t r = blockIdx.x, first = blockIdx.y * int64_t{THREADS} + threadIdx.x;
  let_next_begin();
  const float first_norm = a.norm != nullptr && first < a.width ? a.norm[first] : 1.0F;
  after_previous();
  const auto at = [&](int64_t i) {
    if (a.x_is_f16 != 0) return __half2float(static_cast<const __half*>(a.x)[r * a.ldx + i]);
    const float x = static_cast<const float*>(a.x)[r * a.ldx + i];
    return a.gate == device::kNoGate ? x : gated(a.gate, x, a.up[r * a.ld_up + i]);
  };
  float norm = 1;
  if (a.norm != nullptr) {
    float square = 0;
    // Widths are multiples of 32.
    if (a.x_is_f16 == 0 && a.gate == device::kNoGate && a.ldx % 4 == 0) {
      const auto* row = reinterpret_cast<const float4*>(static_cast<const float*>(a.x) + r * a.ldx);
#pragma unroll 4
      for (int64_t i = threadIdx.x; i < a.width / 4; i += THREADS) {
        const float4 x = row[i];
        square += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
      }
    } else {
      for (int64_t i = threadIdx.x; i < a.width; i += THREADS) {
        const float x = at(i);
        square += x * x;
      }
    }
    norm = rsqrtf(block_sum<THREADS>(square, shared) / static_cast<float>(a.width) + a.eps);
  }
  // Groups of 32 are warps' turns.
  for (int64_t i = first; i < a.width; i += gridDim.y * int64_t{THREADS}) {
    float x = at(i);
    if (a.norm != nullptr) x = x * norm * (i == first ? first_norm : a.norm[i]);
    const int64_t to = r * a.width + i;
    if (a.f32 != nullptr) a.f32[to] = x;
    if (a.bf16 != nullptr) static_cast<__nv_bfloat16*>(a.bf16)[to] = __float2bfloat16_rn(x);
    if (a.code == nullptr) continue;
    float top = fabsf(x);
#pragma unroll
    for (int k = 16; k > 0; k /= 2) top = fmaxf(top, __shfl_xor_sync(~0U, top, k));
    const bool finite = __all_sync(~0U, isfinite(x)) != 0;
    const float scale = __fdiv_rn(top, 127.0F);
    const float inverse = scale >= 0x1p-126F ? __fdiv_rn(1.0F, scale) : 0.0F;
    a.code[r * a.width + device::code_at(i)] =
        finite ? static_cast<int8_t>(__float2int_rn(x * inverse)) : int8_t{0};
    if (threadIdx.x % 32 == 0) a.scale[to / 32] = finite ? scale : __int_as_float(0x7FC00000);
  }
}

__global__ __launch_bounds__(kThreads) void add_rows(const __grid_constant__ device::AddArgs a) {
  __shared__ float shared[kThreads / 32];
  let_next_begin();
  after_previous();
  const float* y = a.y + blockIdx.x * a.width;
  float* x = a.x + blockIdx.x * a.width;
  float factor = a.factor;
  if (a.norm != nullptr) {
    float square = 0;
    for (int64_t i = threadIdx.x; i < a.width; i += kThreads) square += y[i] * y[i];
    factor *= rsqrtf(block_sum<kThreads>(square, shared) / static_cast<float>(a.width) + a.eps);
  }
  for (int64_t i = threadIdx.x; i < a.width; i += kThreads)
    x[i] += factor * y[i] * (a.norm != nullptr ? a.norm[i] : 1.0F);
}

__global__ __launch_bounds__(kThreads) void norm_runs(const __grid_constant__ device::HeadNormArgs a) {
  __shared__ float shared[kThreads / 32];
  let_next_begin();
  after_previous();
  float* x = a.x + blockIdx.x * a.ld + blockIdx.y * a.width;
  float square = 0;
  for (int64_t i = threadIdx.x; i < a.width; i += kThreads) square += x[i] * x[i];
  const float norm = rsqrtf(block_sum<kThreads>(square, shared) / static_cast<float>(a.width) + a.eps);
  for (int64_t i = threadIdx.x; i < a.width; i += kThreads) x[i] *= norm * a.norm[i];
}

/// Coordinate i of a head x, rotated.
__device__ float rotated(const float* x, int i, int n_rot, const float* angles) {
  const int half = n_rot / 2;
  if (i >= n_rot) return x[i];
  const int pair = i < half ? i : i - half;
  const float cosine = angles[2 * pair], sine = angles[2 * pair + 1];
  return i < half ? x[i] * cosine - x[i + half] * sine : x[i] * cosine + x[i - half] * sine;
}

/// A thread a coordinate: of the query heads, then of the KV heads' keys and values.
__global__ __launch_bounds__(kThreads) void store_rows(const __grid_constant__ device::StoreArgs a) {
  const int64_t r = blockIdx.x;
  let_next_begin();
  after_previous();
  const int hd = a.head_dim, width_q = a.n_head * hd, width_kv = a.n_head_kv * hd;
  const float* angles = a.angles + r * a.n_rot;
  int i = static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x);
  if (i < width_q) {
    const float x = rotated(a.q + r * a.ld + i / hd * hd, i % hd, a.n_rot, angles);
    const float factor = a.factor != nullptr ? a.factor[r] : 1.0F;
    static_cast<__half*>(a.q_out)[r * width_q + i] = __float2half_rn(x * factor);
    if (a.q_plain != nullptr)
      static_cast<__half*>(a.q_plain)[r * width_q + i] = __float2half_rn(a.q[r * a.ld + i] * factor);
    return;
  }
  i -= width_q;
  if (i >= width_kv) return;
  const int position = a.position[r];
  const int64_t sequence = a.sequence != nullptr ? a.sequence[r] : 0;
  const int64_t block = a.table[sequence * a.ld_table + position / a.block];
  const int64_t half_block = static_cast<int64_t>(width_kv) * a.block;
  __half* keys = static_cast<__half*>(a.pool) + block * 2 * half_block;
  const __half k = __float2half_rn(rotated(a.k + r * a.ld + i / hd * hd, i % hd, a.n_rot, angles));
  const __half v = __float2half_rn(a.v[r * a.ld + i]);
  const int64_t to = (i / hd * a.block + position % a.block) * hd + i % hd;
  keys[to] = k;
  keys[half_block + to] = v;
  if (!isfinite(__half2float(k)) || !isfinite(__half2float(v))) a.bad[r] = 1;
}

}  // namespace

const void* probe_kernel() { return reinterpret_cast<const void*>(prepare_rows<kThreads>); }

void launch_prepare(const device::PrepareArgs& a, cudaStream_t stream) {
  const auto rows = static_cast<unsigned>(a.n);
  const auto across = [&](int threads) { return static_cast<unsigned>((a.width + threads - 1) / threads); };
  if (a.norm == nullptr) {
    launch_early(prepare_rows<kThreads>, dim3(rows, across(kThreads)), kThreads, 0, stream, a);
  } else if (a.n <= kFewRows) {
    launch_early(prepare_rows<kWide>, dim3(rows, across(kWide)), kWide, 0, stream, a);
  } else {
    launch_early(prepare_rows<kThreads>, dim3(rows), kThreads, 0, stream, a);
  }
}

void launch_add(const device::AddArgs& a, cudaStream_t stream) {
  launch_early(add_rows, dim3(static_cast<unsigned>(a.n)), kThreads, 0, stream, a);
}

void launch_head_norm(const device::HeadNormArgs& a, cudaStream_t stream) {
  launch_early(norm_runs, dim3(static_cast<unsigned>(a.n), static_cast<unsigned>(a.runs)), kThreads, 0,
               stream, a);
}

void launch_store(const device::StoreArgs& a, cudaStream_t stream) {
  const int64_t width = static_cast<int64_t>(a.n_head + a.n_head_kv) * a.head_dim;
  const dim3 grid(static_cast<unsigned>(a.n), static_cast<unsigned>((width + kThreads - 1) / kThreads));
  launch_early(store_rows, grid, kThreads, 0, stream, a);
}

}  // namespace narrows::cuda
