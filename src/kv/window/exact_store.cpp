// Writing and reading exact f16 blocks; keys are rotated 16 tokens at a time and transposed on their way in.
// k, v [n, D] float32 in; blocks as kv/layout.h says.
#include "kv/window/exact_store.h"

#include <cmath>

#include "kv/transpose.h"

namespace narrows {

using kernels::f16_t;
using kernels::ops;

namespace {

constexpr float kMaxF16 = 65504.0F;

/// Tokens rotated and transposed together: bounds the stack, divides every block size.
constexpr int64_t kChunk = 16;

/// cos and sin of a run of positions, a row a token.
struct Angles {
  alignas(64) float cos[kChunk * kMaxHeadDim / 2];
  alignas(64) float sin[kChunk * kMaxHeadDim / 2];

  Angles(const kernels::RopeTable& rope, int64_t pos, int64_t n) {
    const int64_t half = rope.n_rot() / 2;
    for (int64_t t = 0; t < n; ++t) rope.at(pos + t, cos + t * half, sin + t * half);
  }
};

bool within(const float* x, int64_t n, float limit) {
  int outside = 0;
  for (int64_t i = 0; i < n; ++i) outside |= static_cast<int>(!(std::fabs(x[i]) <= limit));  // NaN fails too
  return outside == 0;
}

bool all_finite(const f16_t* x, int64_t n) {
  int bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= static_cast<int>((x[i] & 0x7C00) == 0x7C00);
  return bad == 0;
}

}  // namespace

Status non_finite_token(int64_t pos) {
  return {StatusCode::non_finite,
          "token " + std::to_string(pos) +
              " has a key or value that is NaN, infinite or beyond half precision (65504)"};
}

Status not_a_layer(const SnapshotReader& in) {
  if (in.ok()) return {StatusCode::out_of_memory, "no memory for the saved key/value cache"};
  return {StatusCode::invalid_file, "the saved key/value cache is cut off or holds impossible numbers"};
}

Status no_memory_for_tokens(int64_t n) {
  return {StatusCode::out_of_memory, "no memory for the key/value cache of " + std::to_string(n) +
                                         " tokens; use a smaller --ctx or another --kv"};
}

void rotate_keys(const AttentionShape& shape, const kernels::RopeTable& rope, int64_t pos, int64_t n,
                 bool inverse, const float* x, float* y) {
  float cos[kMaxHeadDim / 2];
  float sin[kMaxHeadDim / 2];
  const int64_t width = shape.width();
  for (int64_t t = 0; t < n; ++t) {
    rope.at(pos + t, cos, sin);
    ops().rope_rows(x + t * width, shape.n_head_kv, shape.head_dim, rope.n_rot(), cos, sin, 0, inverse,
                    y + t * width);
  }
}

Status check_tokens(const AttentionShape& shape, const kernels::RopeTable& rope, int64_t pos, const float* k,
                    const float* v, int64_t n) {
  const int64_t width = shape.width();
  // A pair's length grows by the magnitude only, its larger coordinate by up to sqrt(2) of that: below `safe`
  // no rotation can leave f16, so almost every token is settled by one comparison a number.
  const float safe = kMaxF16 / (1.4143F * std::max(1.0F, rope.magnitude()));
  float rotated[kMaxHeadDim];
  float cos[kMaxHeadDim / 2];
  float sin[kMaxHeadDim / 2];
  for (int64_t t = 0; t < n; ++t) {
    const float* key = k + t * width;
    bool good = within(v + t * width, width, kMaxF16);
    if (good && !within(key, width, safe)) {
      good = within(key, width, kMaxF16);
      rope.at(pos + t, cos, sin);
      for (int64_t h = 0; good && h < shape.n_head_kv; ++h) {
        ops().rope_rows(key + h * shape.head_dim, 1, shape.head_dim, rope.n_rot(), cos, sin, 0, false,
                        rotated);
        good = within(rotated, shape.head_dim, kMaxF16);
      }
    }
    if (!good) return non_finite_token(pos + t);
  }
  return {};
}

bool ExactStore::expect_step() {
  if (!reserve(1)) return false;
  expected_ = 1;
  return true;
}

void ExactStore::pop_blocks(int64_t n) {
  blocks_.pop_front(n);
  size_ = std::max<int64_t>(0, size_ - n * layout_.block);
}

void ExactStore::clear() {
  blocks_.clear();
  size_ = 0;
  expected_ = 0;
}

bool ExactStore::write(int64_t index, int64_t pos, const float* k, const float* v, int64_t n) {
  const int64_t head_dim = layout_.head_dim;
  const int64_t width = layout_.n_head_kv * head_dim;
  const int64_t n_rot = rope_->n_rot();
  float rotated[kMaxHeadDim];
  f16_t half[kChunk * kMaxHeadDim];  // [chunk, head_dim]
  const f16_t* rows[kChunk];
  for (int64_t t = 0; t < kChunk; ++t) rows[t] = half + t * head_dim;
  bool finite = true;
  for (int64_t done = 0; done < n;) {
    const int64_t slot = (index + done) % layout_.block;
    std::byte* block = blocks_.page((index + done) / layout_.block);
    const int64_t m = std::min(n - done, kChunk - slot % kChunk);  // ends with the block at the latest
    const Angles angles(*rope_, pos + done, m);
    for (int64_t h = 0; h < layout_.n_head_kv; ++h) {
      f16_t* value = layout_.value(block, h) + slot * head_dim;
      for (int64_t t = 0; t < m; ++t) {
        const int64_t from = (done + t) * width + h * head_dim;
        ops().rope_rows(k + from, 1, head_dim, n_rot, angles.cos + t * n_rot / 2, angles.sin + t * n_rot / 2,
                        0, false, rotated);
        ops().f32_to_f16(rotated, half + t * head_dim, head_dim);
        ops().f32_to_f16(v + from, value + t * head_dim, head_dim);
      }
      transpose_rows(rows, m, head_dim, layout_.key_t(block, h) + slot, layout_.block);
      finite = finite && all_finite(half, m * head_dim) && all_finite(value, m * head_dim);
    }
    done += m;
  }
  return finite;
}

void ExactStore::get_rows(int64_t b, f16_t* rows) const {
  const std::byte* block = blocks_.page(b);
  const int64_t d = layout_.head_dim, tokens = layout_.block;
  for (int64_t h = 0; h < layout_.n_head_kv; ++h) {
    const f16_t* key = layout_.key_t(block, h);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t c = 0; c < d; ++c) *rows++ = key[c * tokens + t];
    }
  }
  std::copy_n(layout_.value(block, 0), layout_.n_head_kv * tokens * d, rows);
}

void ExactStore::put_rows(int64_t b, const f16_t* rows) {
  std::byte* block = blocks_.page(b);
  const int64_t d = layout_.head_dim, tokens = layout_.block;
  for (int64_t h = 0; h < layout_.n_head_kv; ++h) {
    f16_t* key = layout_.key_t(block, h);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t c = 0; c < d; ++c) key[c * tokens + t] = *rows++;
    }
  }
  std::copy_n(rows, layout_.n_head_kv * tokens * d, layout_.value(block, 0));
}

void ExactStore::read(int64_t first, int64_t n, float* k, float* v) const {
  const int64_t head_dim = layout_.head_dim;
  const int64_t width = layout_.n_head_kv * head_dim;
  f16_t half[kChunk * kMaxHeadDim];  // [chunk, head_dim]
  const f16_t* channels[kMaxHeadDim];
  for (int64_t done = 0; done < n;) {
    const int64_t slot = (first + done) % layout_.block;
    const std::byte* block = blocks_.page((first + done) / layout_.block);
    const int64_t m = std::min(n - done, kChunk - slot % kChunk);
    for (int64_t h = 0; h < layout_.n_head_kv; ++h) {
      for (int64_t d = 0; d < head_dim; ++d) channels[d] = layout_.key_t(block, h) + d * layout_.block + slot;
      transpose_rows(channels, head_dim, m, half, head_dim);
      const f16_t* value = layout_.value(block, h) + slot * head_dim;
      for (int64_t t = 0; t < m; ++t) {
        const int64_t to = (done + t) * width + h * head_dim;
        ops().f16_to_f32(half + t * head_dim, k + to, head_dim);
        ops().f16_to_f32(value + t * head_dim, v + to, head_dim);
      }
    }
    done += m;
  }
}

}  // namespace narrows
