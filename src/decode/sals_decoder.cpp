// A sparse step in the stages' order, and the choice of decoder for a layer.
#include <new>

#include "decode/decoders.h"

namespace narrows {

namespace {

/// Selected tokens are shared out in runs of this many: finer than a tile, so that threads end together.
constexpr int64_t kRun = 16;

}  // namespace

Status SalsDecoder::prepare(StepScratch& scratch) {
  if (!scratch.ok()) return no_memory_for_tokens(layer_.n_tokens() + 1);
  if (Status s = layer_.prepare_step(); !s.ok()) return s;
  const int64_t n = layer_.n_in_pages();
  n_selected_ = count_selected(profile_, n, layer_.n_tokens() + 1);
  sparse_ = !reads_all();
  try {
    const auto grow = [](auto& buffer, int64_t size) {
      if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(static_cast<size_t>(size));
    };
    const int64_t room = layer_.n_page() * kPageTokens;  // whole pages: not every step grows them
    grow(scratch.selected, room);
    if (sparse_) {
      grow(scratch.scores, room);
      grow(scratch.select_work, ceil_div(kernels::select_scratch_bytes(room), int64_t{sizeof(uint64_t)}));
      positions_.resize(static_cast<size_t>(n_selected_));
    }
  } catch (const std::bad_alloc&) {
    return no_memory_for_tokens(layer_.n_tokens() + 1);
  }
  return {};
}

void SalsDecoder::run_phase(int phase, const DecodeStep& step, StepScratch& scratch, int ith, int n_threads) {
  const AttentionShape& shape = layer_.shape();
  switch (phase) {
    case 0:
      if (ith == 0) layer_.store_step(step.k, step.v);
      if (!reads_all()) {
        score_pages(layer_, step.q, part_of(layer_.n_page(), ith, n_threads), scratch.thread(ith),
                    scratch.scores.data());
      }
      break;
    case 1:
      begin_attention(shape, layer_.rope(), step.q, layer_.n_tokens(), scratch.thread(ith));
      if (ith == 0) {
        select_tokens(scratch.scores.data(), layer_.n_in_pages(), n_selected_, scratch.selected.data(),
                      scratch.select_work.data());
      }
      // Selection runs on one thread; the others see to the exact tokens meanwhile.
      if (n_threads == 1 || ith > 0) {
        const Part blocks =
            n_threads == 1 ? Part{0, exact_.n_block()} : part_of(exact_.n_block(), ith - 1, n_threads - 1);
        attend_exact(shape, exact_, blocks, scratch.thread(ith));
      }
      break;
    case 2:
      attend_share(scratch, ith, n_threads);
      break;
    default:
      merge_heads(shape, scratch, part_of(shape.n_head, ith, n_threads), n_threads, step.out);
      break;
  }
}

void SalsDecoder::attend_share(StepScratch& scratch, int ith, int n_threads) {
  const Part runs = part_of(ceil_div(n_selected_, kRun), ith, n_threads);
  const int64_t begin = runs.begin * kRun;
  const int64_t end = std::min(runs.end * kRun, n_selected_);
  attend_selected(layer_, {scratch.selected.data() + begin, static_cast<size_t>(end - begin)},
                  scratch.thread(ith));
  if (sparse_) {  // for last_selection(): positions, which outlive this layer's turn with the scratch
    for (int64_t i = begin; i < end; ++i) {
      positions_[static_cast<size_t>(i)] =
          static_cast<int32_t>(layer_.n_sink()) + scratch.selected[static_cast<size_t>(i)];
    }
  }
}

std::optional<std::span<const int32_t>> SalsDecoder::last_selection() const {
  if (!sparse_) return std::nullopt;
  return std::span<const int32_t>(positions_);
}

std::unique_ptr<LayerDecoder> make_layer_decoder(LayerCache& cache, const KvProfile& profile) {
  if (auto* sals = dynamic_cast<SalsLayer*>(&cache)) return std::make_unique<SalsDecoder>(*sals, profile);
  if (auto* kivi = dynamic_cast<KiviLayer*>(&cache)) return std::make_unique<DenseDecoder>(*kivi);
  return std::make_unique<DenseDecoder>(static_cast<F16Layer&>(cache));
}

}  // namespace narrows
