// Exact scores are one small product a KV head (query group times transposed keys); the softmax is in double.
#include "eval/mass_kept.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/ops.h"

namespace narrows {

namespace {

/// Of the layers that attend; recurrent ones have no keys.
const AttentionShape& shape_of(const KvCache& cache) {
  int64_t l = 0;
  while (l + 1 < cache.n_layer() && cache.layer(l).shape().width() == 0) ++l;
  return cache.layer(l).shape();
}

}  // namespace

ExactKeys::ExactKeys(const Session::Impl& reference) {
  const KvCache& cache = *reference.cache;
  shape_ = shape_of(cache);
  n_ = cache.n_tokens();
  const int64_t width = shape_.width();
  std::vector<float> k(static_cast<size_t>(n_ * width)), v(k.size());
  for (int64_t l = 0; l < cache.n_layer(); ++l) {
    const bool attends = cache.layer(l).shape().width() > 0;
    layers_.emplace_back(attends ? n_ * width : 0);
    if (!attends) continue;
    cache.layer(l).read(0, n_, k.data(), v.data());
    for (int64_t i = 0; i < n_; ++i) {
      for (int64_t c = 0; c < width; ++c) layers_.back()[c * n_ + i] = k[static_cast<size_t>(i * width + c)];
    }
  }
}

const float* ExactKeys::head(int64_t layer, int64_t h) const {
  return layers_[static_cast<size_t>(layer)].data() + h * shape_.head_dim * n_;
}

MassKept::MassKept(const ExactKeys& prompt, Session::Impl& session)
    : prompt_(prompt), session_(session), shape_(shape_of(*session.cache)) {
  decoded_keys_.resize(static_cast<size_t>(session.cache->n_layer()));
  step_q_.resize(decoded_keys_.size());
  step_k_.resize(decoded_keys_.size());
  session.mixer.observe([this](int64_t layer, const DecodeStep& step) {
    const auto l = static_cast<size_t>(layer);
    step_q_[l].assign(step.q, step.q + shape_.n_head * shape_.head_dim);
    step_k_[l].assign(step.k, step.k + shape_.width());
  });
}

MassKept::~MassKept() { session_.mixer.observe({}); }

void MassKept::observe() {
  const int64_t width = shape_.width(), pos = session_.cache->n_tokens() - 1;
  ++n_decoded_;
  for (size_t l = 0; l < decoded_keys_.size(); ++l) {
    if (step_k_[l].empty()) continue;
    const kernels::RopeTable& rope = session_.cache->layer(static_cast<int64_t>(l)).rope();
    const int64_t half = rope.n_rot() / 2;
    std::vector<float> angle(static_cast<size_t>(2 * half));
    rope.at(pos, angle.data(), angle.data() + half);
    std::vector<float>& keys = decoded_keys_[l];
    keys.resize(static_cast<size_t>(n_decoded_ * width));
    kernels::ops().rope_rows(step_k_[l].data(), shape_.n_head_kv, shape_.head_dim, 2 * half, angle.data(),
                             angle.data() + half, 0, false, keys.data() + (n_decoded_ - 1) * width);
    if (session_.cache->layer(static_cast<int64_t>(l)).last_selection(0))
      observe_layer(static_cast<int64_t>(l));
  }
}

void MassKept::observe_layer(int64_t layer) {
  const int64_t d = shape_.head_dim, group = shape_.group(), n_context = prompt_.n_context();
  const kernels::RopeTable& rope = session_.cache->layer(layer).rope();
  const int64_t n = n_context + n_decoded_, half = rope.n_rot() / 2, pos = n - 1;
  std::vector<float> angle(static_cast<size_t>(2 * half)), q(static_cast<size_t>(shape_.n_head * d));
  rope.at(pos, angle.data(), angle.data() + half);
  kernels::ops().rope_rows(step_q_[static_cast<size_t>(layer)].data(), shape_.n_head, d, 2 * half,
                           angle.data(), angle.data() + half, 0, false, q.data());

  const KvProfile& profile = session_.options.kv;
  const KvLayer& cache = session_.cache->layer(layer);
  const int64_t in_pages = cache.bytes().n_tokens_in_pages;
  std::vector<char> exact(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) exact[static_cast<size_t>(i)] = cache.always_reads(i);

  std::vector<float> score(static_cast<size_t>(group * n));
  const std::vector<float>& own = decoded_keys_[static_cast<size_t>(layer)];
  for (int64_t h = 0; h < shape_.n_head_kv; ++h) {
    kernels::ops().gemm(group, n_context, d, q.data() + h * group * d, d, prompt_.head(layer, h), n_context,
                        score.data(), n, false);
    for (int64_t g = 0; g < group; ++g) {
      float* s = score.data() + g * n;
      const float* row = q.data() + (h * group + g) * d;
      for (int64_t i = 0; i < n_decoded_; ++i) {
        const float* key = own.data() + i * shape_.width() + h * d;
        float dot = 0;
        for (int64_t c = 0; c < d; ++c) dot += row[c] * key[c];
        s[n_context + i] = dot;
      }
      const float top = *std::max_element(s, s + n);
      double all = 0;
      for (int64_t i = 0; i < n; ++i) {
        s[i] = std::exp((s[i] - top) * shape_.scale);
        all += static_cast<double>(s[i]);
      }
      for (int64_t i = 0; i < n; ++i) s[i] = static_cast<float>(static_cast<double>(s[i]) / all);
    }
    // Probabilities of the group's heads, and what the best choice of as many tokens would keep.
    const auto selected = *cache.last_selection(h);
    std::vector<float> pooled(static_cast<size_t>(in_pages), 0.0F);
    double kept = 0;
    for (int64_t g = 0; g < group; ++g) {
      const float* p = score.data() + g * n;
      for (int64_t i = 0; i < n; ++i) {
        if (exact[static_cast<size_t>(i)]) {
          kept += static_cast<double>(p[i]);
        } else {
          pooled[static_cast<size_t>(i - profile.n_sink)] += p[i];
        }
      }
    }
    double best = kept;
    for (const int32_t i : selected)
      kept += static_cast<double>(pooled[static_cast<size_t>(i - profile.n_sink)]);
    std::nth_element(pooled.begin(), pooled.begin() + static_cast<int64_t>(selected.size()), pooled.end(),
                     std::greater<>());
    for (size_t i = 0; i < selected.size(); ++i) best += static_cast<double>(pooled[i]);
    sum_ += kept;
    best_ += best;
    count_ += group;
  }
}

}  // namespace narrows
