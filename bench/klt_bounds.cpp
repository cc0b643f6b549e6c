#include "klt_bounds.h"

#include <algorithm>
#include <iterator>

namespace narrows {

namespace {

/// Vector instructions of a softmax a number (largest, difference, scale, a power of two of degree 3, sum),
/// of which two can start with every product.
constexpr double kSoftmaxFlops = 12;
/// Of bits to a number, however they are turned: to an integer, to a float, times the amplitude.
constexpr double kExpandFlops = 3;

int64_t n_common(std::span<const int32_t> a, const std::vector<int32_t>& b) {
  std::vector<int32_t> both;
  std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(both));
  return static_cast<int64_t>(both.size());
}

void add_scoring(const KltLayer& layer, const KvProfile& profile, KltStepWork& work) {
  const AttentionShape& shape = layer.shape();
  const auto n = static_cast<double>(layer.n_in_pages()), n_page = static_cast<double>(layer.n_page());
  const auto n_head = static_cast<double>(shape.n_head);
  const double blocks = static_cast<double>(kPageTokens) / static_cast<double>(profile.block);
  for (const KltPart& part : layer.parts()) {
    const KltLayout& layout = part.layout();
    const double heads = n_head / static_cast<double>(layer.parts().size());
    work.score.bytes += n_page * static_cast<double>(layout.index_bytes + layout.n_index);
    work.score.flops_16 +=
        2 * n_page * blocks * heads * static_cast<double>(part.ld_score() * layer.rope().n_rot());
    work.score.flops_16 += n * heads * static_cast<double>(layout.n_index);  // of bytes
  }
  work.score.flops_32 += kSoftmaxFlops * n * n_head;
  work.select.flops_32 += 2 * n * n_head;
}

}  // namespace

double StageWork::seconds(const MachineLimits& machine) const {
  const bool has_16 = machine.flops_format == "bf16";
  const double computing = (flops_16 + (has_16 ? 2 : 1) * flops_32) / machine.flops_s;
  return std::max(bytes / machine.read_bytes_s, computing);
}

void add_klt_work(Session::Impl& session, std::vector<std::vector<int32_t>>& selected, KltStepWork& work) {
  const int64_t n_layer = session.cache->n_layer();
  for (int64_t l = 0; l < n_layer; ++l) {
    const auto* layer = dynamic_cast<const KltLayer*>(&session.cache->layer(l));
    if (layer == nullptr || !layer->last_selection(0)) continue;
    const AttentionShape& shape = layer->shape();
    selected.resize(static_cast<size_t>(n_layer * shape.n_head_kv));
    add_scoring(*layer, session.options.kv, work);
    const auto d = static_cast<double>(shape.head_dim), group = static_cast<double>(shape.group());
    for (int64_t h = 0; h < shape.n_head_kv; ++h) {
      const std::span<const int32_t> now = *layer->last_selection(h);
      std::vector<int32_t>& before = selected[static_cast<size_t>(l * shape.n_head_kv + h)];
      const KltLayout& layout = layer->part_of_head(h).layout();
      const auto read = static_cast<double>(now.size());
      const auto fresh = static_cast<double>(static_cast<int64_t>(now.size()) - n_common(now, before));
      before.assign(now.begin(), now.end());
      const auto n_key = static_cast<double>(layout.n_key), n_value = static_cast<double>(layout.n_value);
      work.rebuild.bytes += fresh * layout.rest.bytes;
      work.rebuild.flops_16 += 2 * fresh * n_key * d;
      work.rebuild.flops_32 += kExpandFlops * fresh * n_key;
      work.attend.bytes += read * (2 * d + layout.value.bytes);
      work.attend.flops_32 += read * (2 * group * (d + n_value) + kExpandFlops * n_value);
    }
    const auto n_exact = static_cast<double>(layer->n_tokens() - layer->n_in_pages());
    work.attend.bytes += n_exact * 4 * static_cast<double>(shape.n_head_kv) * d;
    work.attend.flops_32 += n_exact * 4 * static_cast<double>(shape.n_head) * d;
  }
}

}  // namespace narrows
