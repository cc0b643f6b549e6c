// Rows of Wo come from the file a few at a time; a row holds a number for every channel of every query head.
#include "engine/value_weight.h"

#include <algorithm>

#include "cache/basis.h"

namespace narrows {

Status value_weight(const ModelWeights& weights, int64_t layer, std::vector<double>& weight,
                    Workers* workers) {
  constexpr int64_t kRows = 256;
  const Hparams& hp = weights.hparams();
  const int64_t d = hp.head_dim, n_in = hp.n_head * d, group = hp.n_head / hp.n_head_kv;
  std::vector<float> rows(static_cast<size_t>(kRows * n_in));
  std::vector<KeyMoments> gram(static_cast<size_t>(hp.n_head_kv), KeyMoments(d));
  for (int64_t first = 0; first < hp.n_embd; first += kRows) {
    const int64_t n = std::min(kRows, hp.n_embd - first);
    if (Status s = weights.read_rows(weights.layer(layer).wo, first, n, rows.data()); !s.ok()) return s;
    for_each(workers, hp.n_head_kv, [&](int64_t h_kv) {
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
