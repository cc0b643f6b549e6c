// Rows of Wo are unpacked a few at a time; a row holds a number for every channel of every query head.
#include "engine/value_weight.h"

#include <algorithm>

#include "kv/basis.h"

namespace narrows {

Status value_weight(const ModelWeights& weights, int64_t layer, std::vector<double>& weight,
                    Workers* workers) {
  constexpr int64_t kRows = 256;
  const AttentionSpec& a = weights.spec().layer(layer).attention;
  const int64_t d = a.head_dim, n_in = a.width_q(), group = a.n_head / a.n_head_kv,
                n_out = weights.spec().n_embd;
  std::vector<float> rows(static_cast<size_t>(kRows * n_in));
  std::vector<KeyMoments> gram(static_cast<size_t>(a.n_head_kv), KeyMoments(d));
  for (int64_t first = 0; first < n_out; first += kRows) {
    const int64_t n = std::min(kRows, n_out - first);
    weights.layer(layer).wo.unpack(first, n, rows.data());
    for_each(workers, a.n_head_kv, [&](int64_t h_kv) {
      std::vector<float> columns(static_cast<size_t>(n * d));
      for (int64_t h = h_kv * group; h < (h_kv + 1) * group; ++h) {
        for (int64_t r = 0; r < n; ++r)
          std::copy_n(rows.data() + r * n_in + h * d, d, columns.data() + r * d);
        gram[static_cast<size_t>(h_kv)].add(columns.data(), n);
      }
    });
  }
  weight.clear();
  for (const KeyMoments& g : gram) weight.insert(weight.end(), g.moments().begin(), g.moments().end());
  return {};
}

}  // namespace narrows
