// SALS pages: keys [n, D] x U [D, rank] -> latents, values -> codes, and back. SALS section 3; rotation is
// applied only after rebuilding, at a token's true position.
#include "kv/sals/sals_layer.h"

#include <cmath>
#include <cstring>

#include "kv/transpose.h"

namespace narrows {

using kernels::f16_t;
using kernels::ops;

namespace {

/// The first of n rows [rank] with a number that f16 cannot hold; n if there is none.
int64_t first_beyond_f16(const float* z, int64_t n, int64_t rank) {
  for (int64_t t = 0; t < n; ++t) {
    int beyond = 0;
    for (int64_t c = 0; c < rank; ++c) beyond |= static_cast<int>(!(std::fabs(z[t * rank + c]) <= 65504.0F));
    if (beyond != 0) return t;
  }
  return n;
}

void prefetch_bytes(const void* from, int64_t bytes) {
  const char* first = static_cast<const char*>(from);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(first + i);
  __builtin_prefetch(first + bytes - 1);  // the line that an unaligned end reaches into
}

}  // namespace

Status SalsLayer::make_codec(const Incoming& incoming) {
  const int64_t width = layout_.width;
  const int64_t n_held = n_tokens();
  const int64_t n_all = n_held + incoming.n;
  if (has_codec() || n_all < tokens_for_basis(width)) return {};

  KeyMoments moments(width);
  const int64_t end = std::min(n_all, kBasisEnd);
  std::vector<float> k(static_cast<size_t>(kPageTokens * width));
  std::vector<float> v(k.size());
  for (int64_t pos = kBasisBegin; pos < std::min(end, n_held); pos += kPageTokens) {
    const int64_t n = std::min({kPageTokens, end - pos, n_held - pos});
    read(pos, n, k.data(), v.data());
    rotate_keys(shape(), rope(), pos, n, /*inverse=*/true, k.data(), k.data());
    moments.add(k.data(), n);
  }
  const int64_t skip = std::max<int64_t>(0, kBasisBegin - n_held);
  if (end > n_held + skip) moments.add(incoming.k + skip * width, end - n_held - skip);

  auto basis = moments.leading(layout_.rank);
  if (!basis.ok()) return basis.status();
  basis->energy.clear();  // a report's figure: the cache has no use for it and would have to count its bytes
  basis->energy.shrink_to_fit();
  basis->u.shrink_to_fit();
  own_ = std::make_shared<const LayerBasis>(std::move(*basis));
  return {};
}

void SalsLayer::save_codec(SnapshotWriter& out) const {
  out.number(int64_t{has_codec()});
  if (!has_codec()) return;
  std::vector<float> u;
  for (int64_t i = 0; i < layout_.width; ++i)
    u.insert(u.end(), basis() + i * ld_basis(), basis() + i * ld_basis() + layout_.rank);
  out.array(u);
}

void SalsLayer::load_codec(SnapshotReader& in) {
  if (in.count(0, 1) == 0) return;
  LayerBasis basis;
  basis.width = layout_.width;
  basis.rank = layout_.rank;
  basis.u = in.array<float>(static_cast<uint64_t>(layout_.width * layout_.rank));
  if (!std::all_of(basis.u.begin(), basis.u.end(), [](float x) { return std::fabs(x) <= 1.001F; })) in.fail();
  if (!in.ok()) return;
  own_ = std::make_shared<const LayerBasis>(std::move(basis));
  shared_.reset();  // what the pages were made with counts
}

int64_t SalsLayer::codec_bytes() const {
  return own_ ? static_cast<int64_t>(own_->u.capacity() * sizeof(float)) : 0;
}

Status SalsLayer::encode(int64_t first, int64_t last, const Incoming& incoming) {
  const int64_t width = layout_.width;
  const int64_t rank = layout_.rank;
  const int64_t n_held = n_tokens() - n_sink();  // as an index into the pages; may be negative
  std::vector<float> k(static_cast<size_t>(kPageTokens * width));
  std::vector<float> v(k.size());
  std::vector<float> z(static_cast<size_t>(kPageTokens * rank));
  std::vector<f16_t> half(z.size());

  for (int64_t token = first; token < last;) {
    const int64_t slot = token % kPageTokens;
    int64_t n = std::min(last - token, kPageTokens - slot);
    const float* keys = k.data();
    const float* values = v.data();
    if (token >= n_held) {  // all of it comes in: encode from float32 where it lies
      keys = incoming.k + (token - n_held) * width;
      values = incoming.v + (token - n_held) * width;
    } else {
      n = std::min(n, n_held - token);
      gather(token, n, incoming, KeyForm::plain, k.data(), v.data());
    }

    ops().gemm(n, rank, width, keys, width, basis(), ld_basis(), z.data(), rank, false);
    // A latent is as long as the whole key, so it may leave f16 where no coordinate of the key does.
    if (const int64_t t = first_beyond_f16(z.data(), n, rank); t < n)
      return non_finite_token(n_sink() + token + t);
    ops().f32_to_f16(z.data(), half.data(), n * rank);
    std::byte* page = mutable_page(token / kPageTokens);
    const f16_t* rows[kPageTokens];
    for (int64_t t = 0; t < n; ++t) {
      rows[t] = half.data() + t * rank;
      std::copy(rows[t] + layout_.rank_score, rows[t] + rank, layout_.rest(page, slot + t));
      if (!ops().quant_groups(values + t * width, width, layout_.values.bits,
                              layout_.values.codes(page, slot + t), layout_.values.params(page, slot + t))) {
        return non_finite_token(n_sink() + token + t);
      }
    }
    transpose_rows(rows, n, layout_.rank_score, layout_.index(page) + slot, kPageTokens);
    token += n;
  }
  return {};
}

void SalsLayer::gather_latents(const int32_t* tokens, int64_t n, f16_t* z, int64_t ld) const {
  const f16_t* index[kPageTokens];  // the tokens' columns of the index part
  const f16_t* rest[kPageTokens];
  for (int64_t t = 0; t < n; ++t) {
    const std::byte* p = page(tokens[t] / kPageTokens);
    const int64_t slot = tokens[t] % kPageTokens;
    index[t] = layout_.index(p) + slot;
    rest[t] = layout_.rest(p, slot);
  }
  int64_t t = 0;
  for (; t + 4 <= n; t += 4) {  // four at a time: a store moves four numbers
    for (int64_t c = 0; c < layout_.rank_score; ++c) {
      const int64_t at = c * kPageTokens;
      const f16_t four[4] = {index[t][at], index[t + 1][at], index[t + 2][at], index[t + 3][at]};
      std::memcpy(z + c * ld + t, four, sizeof(four));
    }
  }
  for (; t < n; ++t) {
    for (int64_t c = 0; c < layout_.rank_score; ++c) z[c * ld + t] = index[t][c * kPageTokens];
  }
  transpose_rows(rest, n, layout_.n_rest(), z + layout_.rank_score * ld, ld);
}

void SalsLayer::prefetch_index(int64_t p) const {
  prefetch_bytes(layout_.index(page(p)), layout_.rank_score * kPageTokens * int64_t{sizeof(f16_t)});
}

void SalsLayer::prefetch(const int32_t* tokens, int64_t n) const {
  for (int64_t t = 0; t < n; ++t) {
    const std::byte* p = page(tokens[t] / kPageTokens);
    const int64_t slot = tokens[t] % kPageTokens;
    prefetch_bytes(layout_.rest(p, slot), layout_.n_rest() * int64_t{sizeof(f16_t)});
    prefetch_bytes(layout_.values.codes(p, slot), layout_.values.code_bytes());
    prefetch_bytes(layout_.values.params(p, slot), layout_.values.n_group() * 2 * int64_t{sizeof(f16_t)});
  }
}

void SalsLayer::read_value(int64_t token, float* v) const {
  const std::byte* p = page(token / kPageTokens);
  const int64_t slot = token % kPageTokens;
  ops().dequant_groups(layout_.values.codes(p, slot), layout_.values.params(p, slot), layout_.width,
                       layout_.values.bits, v);
}

void SalsLayer::rebuild_keys(const float* z, int64_t ld, int64_t n, int64_t head, float* k_t) const {
  const int64_t head_dim = shape().head_dim;
  ops().gemm(head_dim, n, layout_.rank, basis() + head * head_dim * ld_basis(), ld_basis(), z, ld, k_t, ld,
             false);
}

void SalsLayer::decode(int64_t first, int64_t n, float* k, float* v) const {
  const int64_t width = layout_.width;
  const int64_t head_dim = shape().head_dim;
  const int64_t rank = layout_.rank;
  std::vector<f16_t> half(static_cast<size_t>(rank * kPageTokens), f16_t{0});
  std::vector<float> z(half.size());
  std::vector<float> k_t(static_cast<size_t>(head_dim * kPageTokens));
  int32_t tokens[kPageTokens];
  for (int64_t done = 0; done < n; done += kPageTokens) {
    const int64_t m = std::min(kPageTokens, n - done);
    for (int64_t t = 0; t < m; ++t) {
      tokens[t] = static_cast<int32_t>(first + done + t);
      read_value(tokens[t], v + (done + t) * width);
    }
    gather_latents(tokens, m, half.data(), kPageTokens);
    ops().f16_to_f32(half.data(), z.data(), rank * kPageTokens);
    for (int64_t h = 0; h < shape().n_head_kv; ++h) {
      rebuild_keys(z.data(), kPageTokens, m, h, k_t.data());
      for (int64_t t = 0; t < m; ++t) {
        float* row = k + (done + t) * width + h * head_dim;
        for (int64_t d = 0; d < head_dim; ++d) row[d] = k_t[static_cast<size_t>(d * kPageTokens + t)];
      }
    }
  }
  rotate_keys(shape(), rope(), n_sink() + first, n, /*inverse=*/false, k, k);
}

}  // namespace narrows
