// KIVI pages: groups of 32 tokens a channel for keys, of 32 channels a token for values, and back.
#include "kv/kivi/kivi_layer.h"

namespace narrows {

using kernels::ops;

Status KiviLayer::encode(int64_t first, int64_t last, const Incoming& incoming) {
  const int64_t width = layout_.width;
  std::vector<float> k(static_cast<size_t>(kKiviUnit * width));
  std::vector<float> v(k.size());
  float channel[kKiviUnit];
  for (int64_t token = first; token < last; token += kKiviUnit) {  // both are whole units
    gather(token, kKiviUnit, incoming, KeyForm::rotated, k.data(), v.data());
    std::byte* page = mutable_page(token / kPageTokens);
    const int64_t slot = token % kPageTokens;
    const int64_t unit = slot / kKiviUnit;
    bool finite = true;
    for (int64_t d = 0; d < width; ++d) {
      for (int64_t t = 0; t < kKiviUnit; ++t) channel[t] = k[static_cast<size_t>(t * width + d)];
      finite =
          finite && ops().quant_groups(channel, kKiviUnit, layout_.key_bits, layout_.key_codes(page, d, unit),
                                       layout_.key_params(page, d, unit));
    }
    for (int64_t t = 0; t < kKiviUnit; ++t) {
      finite = finite && ops().quant_groups(v.data() + t * width, width, layout_.values.bits,
                                            layout_.values.codes(page, slot + t),
                                            layout_.values.params(page, slot + t));
    }
    if (!finite) return non_finite_token(n_sink() + token);
  }
  return {};
}

void KiviLayer::read_keys(int64_t p, int64_t head, float* k_t) const {
  const int64_t channel = head * shape().head_dim;
  ops().dequant_groups(layout_.key_codes(page(p), channel, 0), layout_.key_params(page(p), channel, 0),
                       shape().head_dim * kPageTokens, layout_.key_bits, k_t);
}

void KiviLayer::read_values(int64_t p, int64_t slot, int64_t n, float* v) const {
  const ValueLayout& values = layout_.values;
  const int64_t width = layout_.width;
  if (width % kernels::kGroup == 0) {  // no short groups: all rows are one run of groups
    ops().dequant_groups(values.codes(page(p), slot), values.params(page(p), slot), n * width, values.bits,
                         v);
    return;
  }
  for (int64_t t = 0; t < n; ++t) {
    ops().dequant_groups(values.codes(page(p), slot + t), values.params(page(p), slot + t), width,
                         values.bits, v + t * width);
  }
}

void KiviLayer::decode(int64_t first, int64_t n, float* k, float* v) const {
  const int64_t width = layout_.width;
  const int64_t head_dim = shape().head_dim;
  std::vector<float> k_t(static_cast<size_t>(head_dim * kPageTokens));
  for (int64_t done = 0; done < n;) {
    const int64_t p = (first + done) / kPageTokens;
    const int64_t slot = (first + done) % kPageTokens;
    const int64_t m = std::min(n - done, kPageTokens - slot);
    for (int64_t h = 0; h < shape().n_head_kv; ++h) {
      read_keys(p, h, k_t.data());
      for (int64_t t = 0; t < m; ++t) {
        float* row = k + (done + t) * width + h * head_dim;
        for (int64_t d = 0; d < head_dim; ++d) row[d] = k_t[static_cast<size_t>(d * kPageTokens + slot + t)];
      }
    }
    read_values(p, slot, m, v + done * width);
    done += m;
  }
}

}  // namespace narrows
