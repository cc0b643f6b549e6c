// Shared by the tests of kv/: shapes, keys and values with a known spectrum, and
// double-precision references that share no code with the library (half rounding, rotation, Jacobi
// eigenvectors, attention).
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/rope_table.h"
#include "kv/klt/klt_layer.h"
#include "kv/kv_cache.h"
#include "kv/kv_layer.h"
#include "kv/reference.h"
#include "narrows/config.h"

namespace narrows::test {

inline constexpr int64_t kContext = 20000;

struct Heads {
  AttentionShape shape;
  kernels::RopeTable rope;
  double freq_base = 10000;

  Heads(int64_t n_head, int64_t n_head_kv, int64_t head_dim, int64_t n_rot = 0)
      : shape{n_head, n_head_kv, head_dim, 1.0F / std::sqrt(static_cast<float>(head_dim))} {
    kernels::RopeParams params;
    params.n_rot = n_rot > 0 ? n_rot : head_dim;
    params.freq_base = freq_base;
    rope = kernels::RopeTable(params, kContext);
  }
  int64_t width() const { return shape.width(); }

  /// One head vector turned to pos, in double; inverse turns back.
  void rotate(double* x, int64_t pos) const {
    const int64_t half = rope.n_rot() / 2;
    for (int64_t i = 0; i < half; ++i) {
      const double angle =
          static_cast<double>(pos) *
          std::pow(freq_base, -2.0 * static_cast<double>(i) / static_cast<double>(rope.n_rot()));
      const double a = x[i];
      const double b = x[i + half];
      x[i] = a * std::cos(angle) - b * std::sin(angle);
      x[i + half] = a * std::sin(angle) + b * std::cos(angle);
    }
  }
  /// A row of head vectors.
  void rotate_row(std::vector<double>& row, int64_t pos) const {
    for (size_t h = 0; h < row.size(); h += static_cast<size_t>(shape.head_dim)) rotate(row.data() + h, pos);
  }
};

/// Keys and values [n, D] of n tokens. Keys have a mean and a spectrum that halves every D/16 coordinates,
/// turned by random reflections, so that a rank has a meaning; the same seed gives the same prefix for every
/// n.
struct Tokens {
  int64_t width = 0;
  std::vector<float> k;
  std::vector<float> v;

  Tokens(const Heads& s, int64_t n, uint32_t seed = 1) : width(s.width()) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    const auto d = static_cast<size_t>(width);
    std::vector<std::vector<double>> mirrors(4, std::vector<double>(d));
    for (auto& m : mirrors) {
      double square = 0;
      for (double& x : m) {
        x = normal(random);
        square += x * x;
      }
      for (double& x : m) x /= std::sqrt(square);
    }
    std::vector<double> row(d);
    for (int64_t t = 0; t < n; ++t) {
      for (size_t c = 0; c < d; ++c) {
        row[c] = (normal(random) + (c < 2 ? 1.5 : 0.0)) *
                 std::exp2(-16.0 * static_cast<double>(c) / static_cast<double>(width)) * 4;
      }
      for (const auto& m : mirrors) {
        double dot = 0;
        for (size_t c = 0; c < d; ++c) dot += m[c] * row[c];
        for (size_t c = 0; c < d; ++c) row[c] -= 2 * dot * m[c];
      }
      for (const double x : row) k.push_back(static_cast<float>(x));
      for (size_t c = 0; c < d; ++c) v.push_back(static_cast<float>(normal(random)));
    }
  }
  int64_t n() const { return static_cast<int64_t>(k.size()) / width; }
  const float* key(int64_t t) const { return k.data() + t * width; }
  const float* value(int64_t t) const { return v.data() + t * width; }

  /// The exact key of a token, rotated, in double.
  std::vector<double> rotated_key(const Heads& s, int64_t t) const {
    std::vector<double> row(key(t), key(t) + width);
    s.rotate_row(row, t);
    return row;
  }
};

/// Query [n_head, head_dim] of a step.
inline std::vector<float> random_query(const Heads& s, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> q(static_cast<size_t>(s.shape.n_head * s.shape.head_dim));
  for (float& x : q) x = normal(random);
  return q;
}

inline std::vector<KvLayerSpec> layers_of(const Heads& s, int64_t n_layer) {
  return {static_cast<size_t>(n_layer), KvLayerSpec{s.shape, &s.rope}};
}

inline ModelInfo model_info(const Heads& s, int64_t n_layer) {
  ModelInfo m;
  m.fingerprint = "0123456789abcdef";
  m.n_layer = n_layer;
  m.n_head = s.shape.n_head;
  m.n_head_kv = s.shape.n_head_kv;
  m.head_dim = s.shape.head_dim;
  return m;
}

inline KvProfile profile_of(const std::string& text) {
  auto p = KvProfile::parse(text);
  EXPECT_TRUE(p.ok()) << p.status().message();
  return p.ok() ? *p : KvProfile();
}

/// What an error of a value costs, for klt layers: a random Gram matrix for each KV head, as an output
/// projection of a few rows more than head_dim has it.
inline ValueWeightFn value_weights(const Heads& s) {
  return [n_head = s.shape.n_head_kv, d = s.shape.head_dim](int64_t layer, std::vector<double>& weight) {
    std::mt19937 random(static_cast<uint32_t>(layer + 17));
    std::normal_distribution<double> normal;
    weight.assign(static_cast<size_t>(n_head * d * d), 0);
    std::vector<double> row(static_cast<size_t>(d));
    for (int64_t h = 0; h < n_head; ++h) {
      for (int64_t i = 0; i < d + 8; ++i) {
        for (double& x : row) x = normal(random);
        for (int64_t a = 0; a < d; ++a) {
          for (int64_t b = 0; b < d; ++b)
            weight[static_cast<size_t>((h * d + a) * d + b)] +=
                row[static_cast<size_t>(a)] * row[static_cast<size_t>(b)];
        }
      }
    }
    return Status();
  };
}

/// A cache of five layers, of which layer 2 is compressed whatever the profile.
inline constexpr int64_t kLayers = 5;
inline constexpr int64_t kCompressed = 2;
inline std::unique_ptr<KvCache> make_cache(const Heads& s, const std::string& profile,
                                           std::shared_ptr<const BasisFile> basis = nullptr) {
  auto cache =
      KvCache::create(layers_of(s, kLayers), profile_of(profile), std::move(basis), value_weights(s));
  EXPECT_TRUE(cache.ok()) << cache.status().message();
  return cache.ok() ? std::move(*cache) : nullptr;
}

/// Transforms of a klt layer out of tokens and random queries, as a file could hold them.
inline KltLayerBasis klt_basis_of(const Heads& s, const float* k, const float* v, int64_t n) {
  KltStatistics statistics(s.shape);
  statistics.add(k, v, n);
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<float> q(static_cast<size_t>(64 * s.shape.n_head * s.shape.head_dim));
  for (float& x : q) x = normal(random);
  statistics.add_queries(q.data(), 64);
  std::vector<double> weight;
  EXPECT_TRUE(value_weights(s)(kCompressed, weight).ok());
  auto basis = statistics.basis(DistanceAverage(s.rope, s.shape.head_dim), weight);
  EXPECT_TRUE(basis.ok()) << basis.status().message();
  return basis.ok() ? *basis : KltLayerBasis();
}

/// Everything a reader sees.
struct Decoded {
  std::vector<float> k, v;
  explicit Decoded(const KvLayer& layer) : Decoded(layer, 0, layer.n_tokens()) {}
  Decoded(const KvLayer& layer, int64_t first, int64_t n)
      : k(static_cast<size_t>(n * layer.shape().width())), v(k.size()) {
    layer.read(first, n, k.data(), v.data());
  }
};

/// Adds tokens [from, to) by decode steps, without attention.
inline void step_tokens(KvLayer& layer, const Tokens& tokens, int64_t from, int64_t to) {
  for (int64_t t = from; t < to; ++t) {
    const Status s = layer.make_room(true);
    ASSERT_TRUE(s.ok()) << s.message();
    layer.store_step(tokens.key(t), tokens.value(t));
    layer.count_step();
  }
}

/// Second moments [D, D] of keys [first, last), pre-RoPE.
inline std::vector<double> second_moments(const Tokens& tokens, int64_t first, int64_t last) {
  const int64_t d = tokens.width;
  std::vector<double> c(static_cast<size_t>(d * d));
  for (int64_t t = first; t < last; ++t) {
    const float* x = tokens.key(t);
    for (int64_t i = 0; i < d; ++i) {
      for (int64_t j = 0; j < d; ++j)
        c[static_cast<size_t>(i * d + j)] += static_cast<double>(x[i]) * static_cast<double>(x[j]);
    }
  }
  return c;
}

/// Softmax attention of a query at position pos over decoded tokens at `positions`, in double: [n_head,
/// head_dim]. Of one KV head only, if it is named; the others' rows are then 0. sinks: [n_head] or empty.
inline std::vector<double> attention(const Heads& s, const std::vector<float>& q, int64_t pos,
                                     const Decoded& cache, const std::vector<int64_t>& positions,
                                     int64_t head_kv = -1, const std::vector<float>& sinks = {}) {
  const int64_t d = s.shape.head_dim;
  const int64_t width = s.width();
  std::vector<double> out(q.size());
  for (int64_t h = 0; h < s.shape.n_head; ++h) {
    const int64_t g = h / s.shape.group();
    if (head_kv >= 0 && g != head_kv) continue;
    std::vector<double> query(q.begin() + h * d, q.begin() + (h + 1) * d);
    s.rotate(query.data(), pos);
    std::vector<double> logit;
    for (const int64_t t : positions) {
      double dot = 0;
      for (int64_t i = 0; i < d; ++i) {
        dot += query[static_cast<size_t>(i)] *
               static_cast<double>(cache.k[static_cast<size_t>(t * width + g * d + i)]);
      }
      logit.push_back(dot / std::sqrt(static_cast<double>(d)));
    }
    const double top = *std::max_element(logit.begin(), logit.end());
    double sum = sinks.empty() ? 0 : std::exp(static_cast<double>(sinks[static_cast<size_t>(h)]) - top);
    for (double& x : logit) {
      x = std::exp(x - top);
      sum += x;
    }
    for (size_t j = 0; j < positions.size(); ++j) {
      for (int64_t i = 0; i < d; ++i) {
        out[static_cast<size_t>(h * d + i)] +=
            logit[j] / sum *
            static_cast<double>(cache.v[static_cast<size_t>(positions[j] * width + g * d + i)]);
      }
    }
  }
  return out;
}

}  // namespace narrows::test
