// Stage 4: exact softmax attention over tiles, one state a slice, merged over slices head by head.
// Also the sizes of the scratch.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/softmax_state.h"
#include "kv/step/stages.h"

namespace narrows {

StepScratch::Thread::Thread(const AttentionShape& shape)
    : q(shape.n_head * shape.head_dim),
      joint(shape.width()),
      latent_q(shape.width()),
      half(shape.width() * kernels::kTile),
      latent(shape.width() * kernels::kTile),
      key_t(shape.head_dim * kernels::kTile),
      value(shape.width() * kernels::kTile),
      cos(shape.head_dim / 2 * kernels::kTile),
      sin(shape.head_dim / 2 * kernels::kTile) {
  // A tile of fewer than kTile tokens is converted whole, columns that were never written included.
  for (int64_t i = 0; i < half.size(); ++i) half[i] = 0;
}

namespace {

AttentionShape most_of_each(std::span<const AttentionShape> layers) {
  AttentionShape shape;
  for (const AttentionShape& layer : layers) {
    shape.n_head = std::max(shape.n_head, layer.n_head);
    shape.n_head_kv = std::max(shape.n_head_kv, layer.n_head_kv);
    shape.head_dim = std::max(shape.head_dim, layer.head_dim);
  }
  return shape;
}

}  // namespace

int64_t StepScratch::bytes_needed(std::span<const AttentionShape> layers, int n_threads) {
  const AttentionShape s = most_of_each(layers);
  const int64_t q = s.n_head * s.head_dim, width = s.width(), tile = kernels::kTile;
  const int64_t thread_floats = q + 2 * width + tile * (width * 5 / 2 + 2 * s.head_dim);
  return (n_threads * thread_floats + 2 * kSlices * (q + 2 * s.n_head)) * int64_t{sizeof(float)};
}

StepScratch::StepScratch(std::span<const AttentionShape> layers, int n_threads) {
  const AttentionShape shape = most_of_each(layers);
  threads_.reserve(static_cast<size_t>(n_threads));
  for (int i = 0; i < n_threads; ++i) threads_.push_back(std::make_unique<Thread>(shape));
  for (int i = 0; i < 2 * kSlices; ++i) slices_.push_back(std::make_unique<Slice>(shape));
}

StepScratch::~StepScratch() = default;

bool StepScratch::ok() const {
  return std::all_of(threads_.begin(), threads_.end(), [](const auto& t) { return t->ok(); }) &&
         std::all_of(slices_.begin(), slices_.end(), [](const auto& s) { return s->ok(); });
}

void rotate_query(const AttentionShape& shape, const kernels::RopeTable& rope, const float* q, int64_t pos,
                  StepScratch::Thread& thread) {
  float cos[kMaxHeadDim / 2];
  float sin[kMaxHeadDim / 2];
  rope.at(pos, cos, sin);
  kernels::ops().rope_rows(q, shape.n_head, shape.head_dim, rope.n_rot(), cos, sin, 0, false,
                           thread.q.data());
  for (int64_t i = 0; i < shape.n_head * shape.head_dim; ++i) thread.q[i] *= shape.scale;
}

bool open_slice(const AttentionShape& shape, StepScratch& scratch, int i, bool has_tokens,
                StepScratch::Thread& thread) {
  StepScratch::Slice& slice = scratch.slice(i);
  thread.slice = &slice;
  if (has_tokens) {
    kernels::softmax_clear(slice.rows(0, shape.head_dim), shape.n_head, shape.head_dim);
  } else {
    std::fill_n(slice.sum.data(), shape.n_head, 0.0F);  // all that merging looks at
  }
  return has_tokens;
}

void attend_exact(const AttentionShape& shape, const ExactBlocks& exact, Part blocks,
                  StepScratch::Thread& thread) {
  const int64_t n_skipped = exact.n_skipped(), n_first = exact.first->n_block() - n_skipped;
  for (int64_t i = blocks.begin; i < blocks.end; ++i) {
    const ExactStore& store = i < n_first ? *exact.first : *exact.second;
    const int64_t b = i < n_first ? i + n_skipped : i - n_first;
    const int64_t from = i == 0 ? exact.unseen % exact.first->layout().block : 0;
    for (int64_t h = 0; h < shape.n_head_kv; ++h) {
      const int64_t head = h * shape.group();
      kernels::ops().attend_f16(thread.q.data() + head * shape.head_dim, shape.group(), shape.head_dim,
                                store.key_t(b, h) + from, store.layout().block,
                                store.value(b, h) + from * shape.head_dim, shape.head_dim,
                                store.block_tokens(b) - from, thread.slice->rows(head, shape.head_dim));
    }
  }
}

void attend_tile(const AttentionShape& shape, int64_t head_kv, const float* v, int64_t n,
                 StepScratch::Thread& thread) {
  const int64_t head = head_kv * shape.group();
  kernels::ops().attend_f32(thread.q.data() + head * shape.head_dim, shape.group(), shape.head_dim,
                            thread.key_t.data(), kernels::kTile, v + head_kv * shape.head_dim, shape.width(),
                            n, thread.slice->rows(head, shape.head_dim));
}

void attend_exact_slices(const AttentionShape& shape, const ExactBlocks& exact, StepScratch& scratch,
                         int first_slice, Part slices, StepScratch::Thread& thread) {
  for (int64_t i = slices.begin; i < slices.end; ++i) {
    const Part blocks = part_of(exact.n_block(), static_cast<int>(i), kSlices);
    if (open_slice(shape, scratch, first_slice + static_cast<int>(i), blocks.begin < blocks.end, thread)) {
      attend_exact(shape, exact, blocks, thread);
    }
  }
}

void begin_attention(KvLayer& layer, const ExactBlocks& exact, const DecodeStep& step, StepScratch& scratch,
                     int first_slice, int ith, int n_threads) {
  // The newest block always falls to the last slice (part_of rounds down), and that to the last thread:
  // nobody else reads where it writes.
  if (ith == n_threads - 1) layer.store_step(step.k, step.v);
  StepScratch::Thread& thread = scratch.thread(ith);
  rotate_query(layer.shape(), layer.rope(), step.q, layer.n_tokens(), thread);
  attend_exact_slices(layer.shape(), exact, scratch, first_slice, part_of(kSlices, ith, n_threads), thread);
}

void merge_heads(const AttentionShape& shape, StepScratch& scratch, int n_slices, Part heads,
                 const DecodeStep& step) {
  const int64_t head_dim = shape.head_dim;
  for (int64_t h = heads.begin; h < heads.end; ++h) {
    // softmax_merge() over all slices at once: the common maximum first, so that a state is scaled only once.
    float top = -std::numeric_limits<float>::infinity();
    for (int i = 0; i < n_slices; ++i) {
      StepScratch::Slice& slice = scratch.slice(i);
      if (slice.sum[h] != 0) top = std::fmax(top, slice.max[h]);  // an empty slice was not cleared
    }
    top = with_sink(step, h, top);
    float sum = sum_of_sink(step, h, top);
    float* y = step.out + h * head_dim;
    std::fill_n(y, head_dim, 0.0F);
    for (int i = 0; i < n_slices; ++i) {
      StepScratch::Slice& slice = scratch.slice(i);
      if (slice.sum[h] == 0) continue;
      const float weight = std::exp(slice.max[h] - top);
      const float* from = slice.out.data() + h * head_dim;
      sum += weight * slice.sum[h];
      for (int64_t d = 0; d < head_dim; ++d) y[d] += weight * from[d];
    }
    const float inv = sum > 0 ? 1.0F / sum : 0.0F;
    for (int64_t d = 0; d < head_dim; ++d) y[d] *= inv;
  }
}

}  // namespace narrows
