#include "device/host_device.h"

#include <malloc.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "device/host_encode.h"
#include "device/host_klt.h"
#include "device/library.h"
#include "kernels/bf16.h"
#include "kernels/half.h"
#include "kernels/pack_weights.h"

namespace narrows::testing {

using namespace device;
using kernels::f16_t;

namespace {

float half(const void* p, int64_t i) { return kernels::half_to_float(static_cast<const f16_t*>(p)[i]); }
void put_half(void* p, int64_t i, float x) { static_cast<f16_t*>(p)[i] = kernels::float_to_half(x); }
float bf16(const void* p, int64_t i) { return kernels::bf16_to_float(static_cast<const uint16_t*>(p)[i]); }

/// Several threads may use the device at once. The number before.
int64_t tally(int64_t& number, int64_t n) { return std::atomic_ref<int64_t>(number).fetch_add(n); }

/// Counts a call; the code of a card that does not answer.
int called() {
  HostDevice& d = host_device();
  const int64_t n = tally(d.n_call, 1);
  return d.breaking_call >= 0 && n >= d.breaking_call ? 719 : 0;
}

/// Row o of a matrix as numbers.
std::vector<float> row_of(const Weights& w, int64_t o) {
  std::vector<float> row(static_cast<size_t>(w.n_in));
  if (w.form < kRowsF32) {
    const kernels::PackedMatrix m = {static_cast<kernels::Packing>(w.form), w.n_in, w.n_out,
                                     static_cast<const uint8_t*>(w.data)};
    kernels::unpack_row(m, o, row.data());
    return row;
  }
  for (int64_t i = 0; i < w.n_in; ++i) {
    const int64_t at = o * w.n_in + i;
    row[static_cast<size_t>(i)] = w.form == kRowsF32   ? static_cast<const float*>(w.data)[at]
                                  : w.form == kRowsF16 ? half(w.data, at)
                                                       : bf16(w.data, at);
  }
  return row;
}

double rms_factor(const float* x, int64_t n, float eps) {
  double square = 0;
  for (int64_t i = 0; i < n; ++i) square += double{x[i]} * x[i];
  return 1 / std::sqrt(square / static_cast<double>(n) + double{eps});
}

const char* error() { return "the card does not answer"; }

int count(int* n, int* driver, int* needed) {
  *n = host_device().n_card;
  *driver = host_device().driver;
  *needed = host_device().needed;
  return 0;
}

int info(int /*device*/, Info* to) {
  const HostDevice& d = host_device();
  *to = Info{};
  std::strcpy(to->name, "no card");
  to->major = d.major;
  to->total_bytes = d.total_bytes;
  to->free_bytes = d.total_bytes - tally(host_device().allocated, 0);
  return d.major < 8 ? 209 : 0;
}

/// In front of a block its size; behind it NaN, so that whoever reads on sees it.
int allocate(int /*device*/, int64_t bytes, void** p) {
  HostDevice& d = host_device();
  *p = nullptr;
  if (tally(d.n_allocation, 1) == d.failing || bytes > d.total_bytes - tally(d.allocated, 0)) return 0;
  const int64_t room = (bytes + 512 + 255) / 256 * 256;
  auto* block = static_cast<char*>(std::aligned_alloc(256, static_cast<size_t>(room)));
  std::memset(block, 0xFF, static_cast<size_t>(room));
  std::memcpy(block, &bytes, sizeof(bytes));
  tally(d.allocated, bytes);
  *p = block + 256;
  return 0;
}
void release(int /*device*/, void* p) {
  char* block = static_cast<char*>(p) - 256;
  int64_t bytes = 0;
  std::memcpy(&bytes, block, sizeof(bytes));
  tally(host_device().allocated, -bytes);
  std::free(block);
}

int make_stream(int /*device*/, void** stream) {
  *stream = &host_device();
  return 0;
}
void end_stream(int /*device*/, void* /*stream*/) {}
int move(int /*device*/, void* to, const void* from, int64_t bytes, void* /*stream*/) {
  if (const int code = called(); code != 0) return code;
  if (bytes > 0) std::memmove(to, from, static_cast<size_t>(bytes));
  return 0;
}
int download_rows(int /*device*/, void* to, int64_t to_ld, const void* from, int64_t from_ld, int64_t bytes,
                  int64_t n, void* /*stream*/) {
  if (const int code = called(); code != 0) return code;
  for (int64_t r = 0; r < n; ++r)
    std::memcpy(static_cast<char*>(to) + r * to_ld, static_cast<const char*>(from) + r * from_ld,
                static_cast<size_t>(bytes));
  return 0;
}
int fill(int /*device*/, void* to, int byte, int64_t bytes, void* /*stream*/) {
  if (const int code = called(); code != 0) return code;
  std::memset(to, byte, static_cast<size_t>(bytes));
  return 0;
}
int wait(int /*device*/, void* /*stream*/) { return called(); }

int prepare(int /*device*/, const PrepareArgs* a, void* /*stream*/) {
  if (const int code = called(); code != 0) return code;
  std::vector<float> row(static_cast<size_t>(a->width));
  for (int64_t r = 0; r < a->n; ++r) {
    for (int64_t i = 0; i < a->width; ++i) {
      const int64_t at = r * a->ldx + i;
      float x = a->x_is_f16 != 0 ? half(a->x, at) : static_cast<const float*>(a->x)[at];
      if (a->gate != kNoGate) {
        const double t = a->gate == kSilu ? double{x} : 1.5957691216057308 * (x + 0.044715 * x * x * x);
        x = static_cast<float>(x / (1 + std::exp(-t)) * a->up[r * a->ld_up + i]);
      }
      row[static_cast<size_t>(i)] = x;
    }
    if (a->norm != nullptr) {
      const double factor = rms_factor(row.data(), a->width, a->eps);
      for (int64_t i = 0; i < a->width; ++i)
        row[static_cast<size_t>(i)] = static_cast<float>(row[static_cast<size_t>(i)] * factor * a->norm[i]);
    }
    for (int64_t i = 0; i < a->width; ++i) {
      const float x = row[static_cast<size_t>(i)];
      if (a->f32 != nullptr) a->f32[r * a->width + i] = x;
      if (a->bf16 != nullptr) static_cast<uint16_t*>(a->bf16)[r * a->width + i] = kernels::float_to_bf16(x);
    }
    for (int64_t g = 0; a->code != nullptr && g < a->width / 32; ++g) {
      const float* x = row.data() + 32 * g;
      float top = 0;
      bool finite = true;
      for (int64_t i = 0; i < 32; ++i) {
        top = std::max(top, std::fabs(x[i]));
        finite = finite && std::isfinite(x[i]);
      }
      const float scale = top / 127, inverse = scale >= 0x1p-126F ? 1 / scale : 0.0F;
      for (int64_t i = 0; i < 32; ++i)
        a->code[r * a->width + code_at(32 * g + i)] =
            finite ? static_cast<int8_t>(std::nearbyint(x[i] * inverse)) : int8_t{0};
      a->scale[(r * a->width) / 32 + g] = finite ? scale : std::numeric_limits<float>::quiet_NaN();
    }
  }
  return 0;
}

void put_product(double sum, const float* bias, int64_t o, int accumulate, float& y) {
  const double x = sum + (bias != nullptr ? double{bias[o]} : 0.0);
  y = static_cast<float>(accumulate != 0 ? y + x : x);
}

int multiply(int /*device*/, const MultiplyArgs* a, void* /*stream*/) {
  if (const int code = called(); code != 0) return code;
  float* y = a->y;
  for (int64_t k = 0; k < a->n_matrix; y += a->w[k++].n_out) {
    const Weights& m = a->w[k];
    for (int64_t o = 0; o < m.n_out; ++o) {
      const std::vector<float> w = row_of(m, o);
      for (int64_t r = 0; r < a->n; ++r) {
        double sum = 0;
        for (int64_t i = 0; i < m.n_in; ++i) {
          const int64_t at = r * m.n_in + i;
          const double x = m.form < kRowsF32 ? double{a->scale[at / 32]} * a->code[r * m.n_in + code_at(i)]
                                             : double{a->f32[at]};
          sum += x * w[static_cast<size_t>(i)];
        }
        put_product(sum, a->bias[k], o, a->accumulate, y[r * a->ldy + o]);
      }
    }
  }
  return 0;
}

int unpack(int /*device*/, const Weights* w, void* to, void* /*stream*/) {
  if (const int code = called(); code != 0) return code;
  for (int64_t o = 0; o < w->n_out; ++o) {
    const std::vector<float> row = row_of(*w, o);
    for (int64_t i = 0; i < w->n_in; ++i)
      static_cast<uint16_t*>(to)[o * w->n_in + i] = kernels::float_to_bf16(row[static_cast<size_t>(i)]);
  }
  return 0;
}

int gemm(int /*device*/, const GemmArgs* a, void* /*stream*/) {
  if (const int code = called(); code != 0) return code;
  for (int64_t r = 0; r < a->n; ++r) {
    for (int64_t o = 0; o < a->n_out; ++o) {
      double sum = 0;
      for (int64_t i = 0; i < a->n_in; ++i)
        sum += double{bf16(a->x, r * a->n_in + i)} * bf16(a->w, o * a->n_in + i);
      put_product(sum, a->bias, o, a->accumulate, a->y[r * a->ldy + o]);
    }
  }
  return 0;
}

int add(int /*device*/, const AddArgs* a, void* /*stream*/) {
  if (const int code = called(); code != 0) return code;
  for (int64_t r = 0; r < a->n; ++r) {
    const float* y = a->y + r * a->width;
    const double factor = a->factor * (a->norm != nullptr ? rms_factor(y, a->width, a->eps) : 1.0);
    for (int64_t i = 0; i < a->width; ++i)
      a->x[r * a->width + i] += static_cast<float>(factor * y[i] * (a->norm != nullptr ? a->norm[i] : 1.0F));
  }
  return 0;
}

int head_norm(int /*device*/, const HeadNormArgs* a, void* /*stream*/) {
  if (const int code = called(); code != 0) return code;
  for (int64_t r = 0; r < a->n * a->runs; ++r) {
    float* x = a->x + r / a->runs * a->ld + r % a->runs * a->width;
    const double factor = rms_factor(x, a->width, a->eps);
    for (int64_t i = 0; i < a->width; ++i) x[i] = static_cast<float>(x[i] * factor * a->norm[i]);
  }
  return 0;
}

float rotated(const float* x, int64_t i, int64_t n_rot, const float* angles) {
  if (i >= n_rot) return x[i];
  const int64_t middle = n_rot / 2, pair = i % middle;
  const float cosine = angles[2 * pair], sine = angles[2 * pair + 1];
  return i < middle ? x[i] * cosine - x[i + middle] * sine : x[i] * cosine + x[i - middle] * sine;
}

/// Where a token's key of a KV head is; its value is half a block further.
int64_t place(int64_t block, int64_t n_head_kv, int64_t head, int64_t hd, int64_t position,
              int64_t tokens = kBlockTokens) {
  return ((2 * block * n_head_kv + head) * tokens + position % tokens) * hd;
}

int store(int /*device*/, const StoreArgs* a, void* /*stream*/) {
  if (const int code = called(); code != 0) return code;
  const int64_t hd = a->head_dim, half_block = a->n_head_kv * int64_t{a->block} * hd;
  for (int64_t r = 0; r < a->n; ++r) {
    const float* angles = a->angles + r * a->n_rot;
    for (int64_t i = 0; i < a->n_head * hd; ++i) {
      const float x = rotated(a->q + r * a->ld + i / hd * hd, i % hd, a->n_rot, angles);
      const float factor = a->factor != nullptr ? a->factor[r] : 1.0F;
      put_half(a->q_out, r * a->n_head * hd + i, x * factor);
      if (a->q_plain != nullptr) put_half(a->q_plain, r * a->n_head * hd + i, a->q[r * a->ld + i] * factor);
    }
    const int64_t sequence = a->sequence != nullptr ? a->sequence[r] : 0, position = a->position[r];
    const int64_t block = a->table[sequence * a->ld_table + position / a->block];
    for (int64_t i = 0; i < a->n_head_kv * hd; ++i) {
      const int64_t to = place(block, a->n_head_kv, i / hd, hd, position, a->block) + i % hd;
      put_half(a->pool, to, rotated(a->k + r * a->ld + i / hd * hd, i % hd, a->n_rot, angles));
      put_half(a->pool, to + half_block, a->v[r * a->ld + i]);
      if (!std::isfinite(half(a->pool, to)) || !std::isfinite(half(a->pool, to + half_block))) a->bad[r] = 1;
    }
  }
  return 0;
}

/// One query of one head over tokens [first, end).
void attend(const void* q, int64_t q_at, const void* pool, const int32_t* table, int64_t n_head_kv,
            int64_t head_kv, int64_t hd, int64_t first, int64_t end, float scale, void* out,
            int64_t tokens = kBlockTokens) {
  std::vector<double> sum(static_cast<size_t>(hd));
  double total = 0, top = -1e300;
  std::vector<double> score;
  for (int64_t t = first; t < end; ++t) {
    const int64_t at = place(table[t / tokens], n_head_kv, head_kv, hd, t, tokens);
    double dot = 0;
    for (int64_t i = 0; i < hd; ++i) dot += double{half(q, q_at + i)} * half(pool, at + i);
    top = std::max(top, score.emplace_back(dot * double{scale}));
  }
  for (int64_t t = first; t < end; ++t) {
    const int64_t at = place(table[t / tokens], n_head_kv, head_kv, hd, t, tokens) + n_head_kv * tokens * hd;
    const double p = std::exp(score[static_cast<size_t>(t - first)] - top);
    total += p;
    for (int64_t i = 0; i < hd; ++i) sum[static_cast<size_t>(i)] += p * half(pool, at + i);
  }
  for (int64_t i = 0; i < hd; ++i)
    put_half(out, q_at + i, total > 0 ? static_cast<float>(sum[static_cast<size_t>(i)] / total) : 0.0F);
}

int prompt(int /*device*/, const PromptArgs* a, void* /*stream*/) {
  if (const int code = called(); code != 0) return code;
  if (a->head_dim != 64 && a->head_dim != 128) return -1;
  for (int64_t r = 0; r < a->n; ++r) {
    for (int64_t h = 0; h < a->n_head; ++h) {
      const int64_t end = a->first + r + 1;
      attend(a->q, (r * a->n_head + h) * a->head_dim, a->pool, a->table, a->n_head_kv,
             h / (a->n_head / a->n_head_kv), a->head_dim,
             a->window > 0 ? std::max<int64_t>(0, end - a->window) : 0, end, a->scale, a->out);
    }
  }
  return 0;
}

int f16_workspace(int /*device*/, const narrows_cuda_f16_args* a, size_t* bytes) {
  *bytes = 256 * static_cast<size_t>(a->heads.n_seq);
  return 0;
}

int f16_decode(int /*device*/, const narrows_cuda_f16_args* a, void* /*workspace*/, size_t /*bytes*/,
               void* /*stream*/) {
  if (const int code = called(); code != 0) return code;
  const narrows_cuda_heads& heads = a->heads;
  for (int64_t s = 0; s < heads.n_seq; ++s) {
    for (int64_t h = 0; h < heads.n_head; ++h) {
      const int64_t end = a->n_tokens[s];
      attend(heads.q, s * heads.q_stride + h * heads.head_dim, a->blocks.pool,
             a->blocks.table + s * a->blocks.ld, heads.n_head_kv, h / (heads.n_head / heads.n_head_kv),
             heads.head_dim, a->window > 0 ? std::max<int64_t>(0, end - a->window) : 0, end, heads.scale,
             heads.out, a->blocks.block);
    }
  }
  return 0;
}

int klt_workspace(int /*device*/, const narrows_cuda_klt_args* a, size_t* bytes) {
  *bytes = host_klt_workspace(*a);
  return 0;
}
int klt_decode(int /*device*/, const narrows_cuda_klt_args* a, void* workspace, size_t bytes,
               void* /*stream*/) {
  if (const int code = called(); code != 0) return code;
  return bytes >= host_klt_workspace(*a) ? host_klt_decode(*a, workspace) : -1;
}
int copy(int device, void* to, const void* from, int64_t bytes, void* stream) {
  return move(device, to, from, bytes, stream);
}
int copy_rows(int device, void* to, int64_t to_ld, const void* from, int64_t from_ld, int64_t bytes,
              int64_t n, void* stream) {
  return download_rows(device, to, to_ld, from, from_ld, bytes, n, stream);
}

template <class Args, auto function>
int op(int /*device*/, const Args* a, void* /*stream*/) {
  const int code = called();
  return code != 0 ? code : function(*a);
}

/// Calls with their arguments.
struct Graph {
  struct Kept {
    Kind kind;
    std::vector<char> args;
    std::vector<narrows_cuda_klt_part> parts;
    void* workspace;
    size_t bytes;
  };
  std::vector<Kept> calls;
};

int64_t size_of(int32_t kind) {
  static const int64_t sizes[] = {
      sizeof(PrepareArgs),           sizeof(MultiplyArgs), sizeof(AddArgs),
      sizeof(HeadNormArgs),          sizeof(StoreArgs),    sizeof(narrows_cuda_f16_args),
      sizeof(narrows_cuda_klt_args), sizeof(CopyArgs)};
  return sizes[kind];
}

int make_graph(int /*device*/, const Call* calls, int64_t n, void** graph) {
  *graph = nullptr;
  if (const int code = called(); code != 0) return code;
  auto made = std::make_unique<Graph>();
  for (const Call* c = calls; c != calls + n; ++c) {
    const auto* args = static_cast<const char*>(c->args);
    Graph::Kept kept = {
        static_cast<Kind>(c->kind), {args, args + size_of(c->kind)}, {}, c->workspace, c->bytes};
    if (c->kind == kKltDecode) {
      auto& a = *reinterpret_cast<narrows_cuda_klt_args*>(kept.args.data());
      kept.parts.assign(a.host_parts, a.host_parts + a.n_part);
    }
    made->calls.push_back(std::move(kept));
  }
  *graph = made.release();
  tally(host_device().n_graph, 1);
  return 0;
}

int launch_graph(int device, void* graph, void* stream) {
  for (Graph::Kept& c : static_cast<Graph*>(graph)->calls) {
    const auto of = [&]<class Args>(const Args*) { return reinterpret_cast<const Args*>(c.args.data()); };
    int code = 0;
    switch (c.kind) {
      case kPrepare:
        code = prepare(device, of(static_cast<PrepareArgs*>(nullptr)), stream);
        break;
      case kMultiply:
        code = multiply(device, of(static_cast<MultiplyArgs*>(nullptr)), stream);
        break;
      case kAdd:
        code = add(device, of(static_cast<AddArgs*>(nullptr)), stream);
        break;
      case kHeadNorm:
        code = head_norm(device, of(static_cast<HeadNormArgs*>(nullptr)), stream);
        break;
      case kStore:
        code = store(device, of(static_cast<StoreArgs*>(nullptr)), stream);
        break;
      case kF16Decode:
        code = f16_decode(device, of(static_cast<narrows_cuda_f16_args*>(nullptr)), c.workspace, c.bytes,
                          stream);
        break;
      case kKltDecode: {
        narrows_cuda_klt_args a = *of(static_cast<narrows_cuda_klt_args*>(nullptr));
        a.host_parts = c.parts.data();
        code = klt_decode(device, &a, c.workspace, c.bytes, stream);
        break;
      }
      case kCopy: {
        const auto* a = of(static_cast<CopyArgs*>(nullptr));
        code = copy(device, a->to, a->from, a->bytes, stream);
        break;
      }
    }
    if (code != 0) return code;
  }
  return 0;
}

void end_graph(int /*device*/, void* graph) { delete static_cast<Graph*>(graph); }

int klt_selection(int /*device*/, const narrows_cuda_klt_args* a, narrows_cuda_selection* at) {
  *at = host_klt_selection(*a);
  return 0;
}

}  // namespace

HostDevice& host_device() {
  static HostDevice device;
  return device;
}

const Api& host_api() {
  static const Api api = {kApiVersion,
                          error,
                          count,
                          info,
                          allocate,
                          release,
                          make_stream,
                          end_stream,
                          move,
                          move,
                          download_rows,
                          move,
                          fill,
                          wait,
                          prepare,
                          multiply,
                          unpack,
                          gemm,
                          add,
                          head_norm,
                          store,
                          prompt,
                          f16_workspace,
                          f16_decode,
                          klt_workspace,
                          klt_decode,
                          klt_selection,
                          make_graph,
                          launch_graph,
                          end_graph,
                          copy_rows,
                          op<MomentsArgs, host_moments>,
                          op<SampleArgs, host_sample>,
                          op<KltSharesArgs, host_klt_shares>,
                          op<KltEncodeArgs, host_klt_encode>};
  return api;
}

WithHostDevice::WithHostDevice() {
  host_device() = HostDevice{};
  mallopt(M_ARENA_MAX, 1);  // as on a card, all memory is near: pools of blocks number it from one place
  use_library(&host_api());
}

WithHostDevice::~WithHostDevice() { use_library(nullptr); }

}  // namespace narrows::testing
