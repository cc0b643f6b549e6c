#include "device/host_klt.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/bf16.h"
#include "kernels/half.h"

namespace narrows::testing {

namespace {

constexpr int64_t kPage = NARROWS_CUDA_PAGE, kBlock = NARROWS_CUDA_BLOCK;
constexpr int kScoreBits = 6;

using Doubles = std::vector<double>;

double half(const void* p, int64_t i) {
  return static_cast<double>(kernels::half_to_float(static_cast<const uint16_t*>(p)[i]));
}
double rounded_half(double x) {
  return static_cast<double>(kernels::half_to_float(kernels::float_to_half(static_cast<float>(x))));
}
double rounded_bf16(double x) {
  return static_cast<double>(kernels::bf16_to_float(kernels::float_to_bf16(static_cast<float>(x))));
}

/// One head of one sequence: what it reads, and its softmax.
class Lists {
 public:
  Lists(const narrows_cuda_klt_args& a, int64_t seq, int64_t head_kv)
      : a_(a),
        seq_(seq),
        kv_(head_kv),
        hd_(a.heads.head_dim),
        hop_(a.heads.n_head_kv / a.n_part),
        group_(a.heads.n_head / a.heads.n_head_kv),
        part_(a.parts[kv_ / hop_]),
        channel_(kv_ % hop_ * hd_),
        n_(a.pages.n_tokens[seq]) {}

  const uint8_t* page(int64_t p) const {
    return static_cast<const uint8_t*>(a_.pages.pool) +
           a_.pages.table[seq_ * a_.pages.ld + p] * a_.pages.page_bytes;
  }
  bool is_anchor(int64_t token) const {
    uint64_t bits = 0;
    std::copy_n(page(token / kPage), 8, reinterpret_cast<uint8_t*>(&bits));
    return (bits >> token % kPage & 1) != 0;
  }
  static double amplitude(uint8_t scale) { return std::exp2((scale - 128) / 8.0); }

  /// Sums of +-2^-j of coordinate c of a row, of its first `most` planes.
  double code(const narrows_cuda_planes& planes, int64_t token, int64_t c, int most) const {
    const uint8_t* row = page(token / kPage) + planes.at + token % kPage * planes.stride;
    double x = 0;
    for (int j = 0; j < std::min(most, planes.n_plane); ++j) {
      if (planes.octets[j] <= c / 8) break;
      x += ((row[planes.offset[j] + c / 8] >> c % 8 & 1) != 0 ? 1.0 : -1.0) * std::exp2(-j);
    }
    return x;
  }
  double key_latent(int64_t token, int64_t c, int most) const {
    const double scale = amplitude(page(token / kPage)[part_.key_scale_at + c]);
    return scale * (c < part_.n_index ? code(part_.index, token, c, most)
                                      : code(part_.rest, token, c - part_.n_index, 8));
  }
  double key_row(int64_t c, int64_t i) const {
    const uint32_t word = part_.key_decode[c / 2 * hop_ * hd_ + channel_ + i];
    return static_cast<double>(kernels::bf16_to_float(static_cast<uint16_t>(c % 2 == 0 ? word : word >> 16)));
  }
  int64_t n_coordinate() const { return part_.n_index + part_.rest.n_octet * 8; }

  Doubles query(int64_t r) const {
    Doubles q(static_cast<size_t>(hd_));
    const int64_t at = seq_ * a_.heads.q_stride + (kv_ * group_ + r) * hd_;
    for (int64_t i = 0; i < hd_; ++i) q[static_cast<size_t>(i)] = half(a_.heads.q, at + i);
    return turned(q, a_.pages.rope + a_.pages.position[seq_] * hd_, false);
  }
  Doubles turned(const Doubles& x, const float* turn, bool back) const {
    Doubles y(x.size());
    const size_t middle = x.size() / 2;
    for (size_t i = 0; i < middle; ++i) {
      const double c = turn[2 * i], s = back ? -double{turn[2 * i + 1]} : double{turn[2 * i + 1]};
      y[i] = x[i] * c - x[i + middle] * s;
      y[i + middle] = x[i] * s + x[i + middle] * c;
    }
    return y;
  }

  /// Scores of tokens in pages through the index, -infinity for anchors.
  Doubles scores(const Doubles& q) const {
    Doubles all;
    for (int64_t p = 0; p < n_ / kPage; ++p) {
      const Doubles at = turned(q, a_.turns + p * hd_, true);
      double mean = 0;
      Doubles u(static_cast<size_t>(part_.n_index));
      for (int64_t i = 0; i < hd_; ++i) {
        mean += at[static_cast<size_t>(i)] * part_.key_mean[channel_ + i];
        for (int64_t c = 0; c < part_.n_index; ++c)
          u[static_cast<size_t>(c)] += at[static_cast<size_t>(i)] * key_row(c, i);
      }
      for (int64_t t = p * kPage; t < (p + 1) * kPage; ++t) {
        double s = mean;
        for (int64_t c = 0; c < part_.n_index; ++c)
          s += u[static_cast<size_t>(c)] * key_latent(t, c, kScoreBits);
        all.push_back(is_anchor(t) ? -std::numeric_limits<double>::infinity() : s * a_.heads.scale);
      }
    }
    return all;
  }

  struct Exact {
    Doubles score;
    std::vector<const uint16_t*> value;
  };
  Exact exact(const Doubles& q) const {
    Exact e;
    const narrows_cuda_blocks& blocks = a_.pages.exact;
    for (int64_t b = 0; b < a_.pages.n_exact[seq_]; ++b) {
      const auto* k =
          static_cast<const uint16_t*>(blocks.pool) +
          (2 * int64_t{blocks.table[seq_ * blocks.ld + b]} * a_.heads.n_head_kv + kv_) * kBlock * hd_;
      for (int64_t t = 0; t < a_.pages.exact_count[seq_ * blocks.ld + b]; ++t) {
        double dot = 0;
        for (int64_t i = 0; i < hd_; ++i)
          dot += rounded_half(q[static_cast<size_t>(i)]) * half(k, t * hd_ + i);
        e.score.push_back(dot * a_.heads.scale);
        e.value.push_back(k + (a_.heads.n_head_kv * kBlock + t) * hd_);
      }
    }
    return e;
  }

  /// Tokens that budget and mass ask for, ascending.
  std::vector<int32_t> select() const {
    Doubles pooled(static_cast<size_t>(n_));
    double in_pages = 0;
    for (int64_t r = 0; r < group_; ++r) {
      const Doubles q = query(r), s = scores(q);
      const Exact e = exact(q);
      double top = -1e300, total = 0;
      for (const Doubles* x : {static_cast<const Doubles*>(&s), &e.score}) {
        for (const double y : *x) top = std::max(top, y);
      }
      for (const Doubles* x : {static_cast<const Doubles*>(&s), &e.score}) {
        for (const double y : *x) total += std::exp(y - top);
      }
      for (size_t t = 0; t < s.size(); ++t) {
        pooled[t] += std::exp(s[t] - top) / total;
        in_pages += std::exp(s[t] - top) / total;
      }
    }
    const double may_lose = (1 - double{a_.mass}) * static_cast<double>(group_);
    const auto floor = static_cast<float>(may_lose / static_cast<double>(std::max<int64_t>(1, n_)));
    std::vector<float> held;
    for (int64_t t = 0; t < n_; ++t) {
      const auto x = static_cast<float>(pooled[static_cast<size_t>(t)]);
      if (!is_anchor(t) && x >= floor) held.push_back(x);
    }
    std::sort(held.begin(), held.end(), std::greater<>());
    const double wanted = a_.mass < 1 ? in_pages - may_lose : std::numeric_limits<double>::infinity();
    float threshold = 0;
    if (a_.mass < 1) {
      if (!(wanted > 0)) return {};
      // The highest threshold of an eighth of an octave that holds what is wanted.
      double sum = 0;
      for (const float x : held) {
        sum += double{x};
        if (sum < wanted) continue;
        threshold = std::bit_cast<float>(std::bit_cast<uint32_t>(x) >> 20 << 20);
        break;
      }
    }
    auto count = static_cast<int64_t>(
        std::count_if(held.begin(), held.end(), [&](float x) { return x >= threshold; }));
    const int64_t budget = std::clamp<int64_t>(a_.pages.budget[seq_], 0, a_.pages.max_budget);
    if (count > budget) {
      count = budget;
      if (count > 0) threshold = held[static_cast<size_t>(count - 1)];
    }
    int64_t n_equal = count;
    for (const float x : held) n_equal -= x > threshold ? 1 : 0;
    std::vector<int32_t> selected;
    for (int64_t t = 0; t < n_ && count > 0; ++t) {
      const auto x = static_cast<float>(pooled[static_cast<size_t>(t)]);
      if (is_anchor(t) || !(x >= threshold) || x < floor) continue;
      if (x == threshold && n_equal-- <= 0) continue;
      selected.push_back(static_cast<int32_t>(t));
    }
    return selected;
  }

  /// The kept keys' rows of the selected tokens; what is not held is rebuilt.
  std::vector<const uint16_t*> keys(const std::vector<int32_t>& selected, int64_t list) const {
    const narrows_cuda_kept& k = a_.kept;
    int32_t* token_of = k.token_of + list * k.capacity;
    uint16_t* slot_of = k.slot_of + list * k.ld;
    std::vector<bool> used(static_cast<size_t>(k.capacity));
    for (const int32_t t : selected) {
      if (slot_of[t] != 0xFFFF) used[slot_of[t]] = true;
    }
    std::vector<const uint16_t*> rows;
    for (const int32_t t : selected) {
      auto* all = static_cast<uint16_t*>(k.keys) + list * k.capacity * hd_;
      if (slot_of[t] == 0xFFFF) {
        uint32_t& hand = k.hand[list];
        while (used[hand]) hand = (hand + 1) % static_cast<uint32_t>(k.capacity);
        used[hand] = true;
        if (token_of[hand] >= 0) slot_of[token_of[hand]] = 0xFFFF;
        token_of[hand] = t;
        slot_of[t] = static_cast<uint16_t>(hand);
        rebuild(t, all + int64_t{slot_of[t]} * hd_);
      }
      rows.push_back(all + int64_t{slot_of[t]} * hd_);
    }
    return rows;
  }

  void rebuild(int64_t token, uint16_t* row) const {
    Doubles x(static_cast<size_t>(hd_));
    Doubles z;
    for (int64_t c = 0; c < n_coordinate(); ++c) z.push_back(rounded_bf16(key_latent(token, c, 8)));
    for (int64_t i = 0; i < hd_; ++i) {
      double sum = part_.key_mean[channel_ + i];
      for (int64_t c = 0; c < n_coordinate(); ++c) sum += z[static_cast<size_t>(c)] * key_row(c, i);
      x[static_cast<size_t>(i)] = sum;
    }
    const Doubles y = turned(x, a_.pages.rope + (a_.pages.n_sink + token) * hd_, false);
    for (int64_t i = 0; i < hd_; ++i)
      row[i] = kernels::float_to_half(static_cast<float>(y[static_cast<size_t>(i)]));
  }

  void attend(const std::vector<int32_t>& selected, int64_t list) const {
    const std::vector<const uint16_t*> rows = keys(selected, list);
    for (int64_t r = 0; r < group_; ++r) {
      const Doubles q = query(r);
      const Exact e = exact(q);
      Doubles s;
      for (const uint16_t* row : rows) {
        double dot = 0;
        for (int64_t i = 0; i < hd_; ++i) dot += rounded_half(q[static_cast<size_t>(i)]) * half(row, i);
        s.push_back(dot * a_.heads.scale);
      }
      double top = -1e300, total = 0, in_pages = 0;
      for (const Doubles* x : {static_cast<const Doubles*>(&s), &e.score}) {
        for (const double y : *x) top = std::max(top, y);
      }
      Doubles out(static_cast<size_t>(hd_)), latent(static_cast<size_t>(part_.n_value));
      for (size_t t = 0; t < e.score.size(); ++t) {
        const double w = std::exp(e.score[t] - top);
        total += w;
        for (int64_t i = 0; i < hd_; ++i) out[static_cast<size_t>(i)] += w * half(e.value[t], i);
      }
      for (size_t t = 0; t < s.size(); ++t) {
        const double w = std::exp(s[t] - top);
        in_pages += w;
        const int64_t token = selected[t];
        for (int64_t c = 0; c < part_.n_value; ++c)
          latent[static_cast<size_t>(c)] +=
              w * code(part_.value, token, c, 8) * amplitude(page(token / kPage)[part_.value_scale_at + c]);
      }
      total += in_pages;
      const int64_t to = seq_ * a_.heads.out_stride + (kv_ * group_ + r) * hd_;
      for (int64_t i = 0; i < hd_; ++i) {
        double y = out[static_cast<size_t>(i)] + in_pages * part_.value_mean[channel_ + i];
        for (int64_t c = 0; c < part_.n_value; ++c)
          y += latent[static_cast<size_t>(c)] * half(part_.value_decode, c * hop_ * hd_ + channel_ + i);
        static_cast<uint16_t*>(a_.heads.out)[to + i] =
            kernels::float_to_half(total > 0 ? static_cast<float>(y / total) : 0.0F);
      }
    }
  }

 private:
  const narrows_cuda_klt_args& a_;
  int64_t seq_, kv_, hd_, hop_, group_;
  const narrows_cuda_klt_part& part_;
  int64_t channel_, n_;
};

bool is_aligned(const void* p) { return p != nullptr && reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace

size_t host_klt_workspace(const narrows_cuda_klt_args& a) {
  const auto n_list = static_cast<size_t>(a.heads.n_seq) * static_cast<size_t>(a.heads.n_head_kv);
  return (n_list + n_list * static_cast<size_t>(a.pages.max_budget)) * 4 + 256;
}

narrows_cuda_selection host_klt_selection(const narrows_cuda_klt_args& a) {
  const auto n_list = static_cast<size_t>(a.heads.n_seq) * static_cast<size_t>(a.heads.n_head_kv);
  return {256 + n_list * 4, 256, 256};
}

int host_klt_decode(const narrows_cuda_klt_args& a, void* workspace) {
  const narrows_cuda_pages& p = a.pages;
  const bool good = is_aligned(a.heads.q) && is_aligned(a.heads.out) && is_aligned(p.pool) &&
                    is_aligned(p.rope) && is_aligned(a.turns) && is_aligned(a.kept.keys) &&
                    p.page_bytes % 16 == 0 && p.max_budget <= p.n_max && a.kept.capacity >= p.max_budget &&
                    a.kept.capacity % 16 == 0 && a.kept.ld >= p.n_max && p.ld >= p.n_max / kPage &&
                    a.mass > 0 && a.mass <= 1 && p.exact.block == kBlock;
  if (!good || *static_cast<uint32_t*>(workspace) != 0) return -1;
  const narrows_cuda_selection at = host_klt_selection(a);
  for (int64_t s = 0; s < a.heads.n_seq; ++s) {
    if (p.n_tokens[s] > p.n_max || p.n_tokens[s] % kPage != 0) return -1;
    for (int64_t h = 0; h < a.heads.n_head_kv; ++h) {
      const int64_t list = s * a.heads.n_head_kv + h;
      const Lists of(a, s, h);
      const std::vector<int32_t> selected = of.select();
      reinterpret_cast<uint32_t*>(static_cast<char*>(workspace) + at.n_selected)[list] =
          static_cast<uint32_t>(selected.size());
      std::copy(
          selected.begin(), selected.end(),
          reinterpret_cast<int32_t*>(static_cast<char*>(workspace) + at.selected) + list * p.max_budget);
      of.attend(selected, list);
    }
  }
  return 0;
}

}  // namespace narrows::testing
