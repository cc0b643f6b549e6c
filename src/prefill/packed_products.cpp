#include "prefill/packed_products.h"

#include <algorithm>

#include "kernels/ops.h"

namespace narrows {

using kernels::kPackGroup;

namespace {

/// Rows of x that one pass over a thread's weights takes: their bytes stay in the L2 cache.
constexpr int64_t kRowsAtOnce = 64;

}  // namespace

/// x rounded to bytes, shared by the products that take it.
struct PackedProducts::Rounded {
  ggml_tensor* x = nullptr;
  ggml_tensor* op = nullptr;  ///< the node behind which it is there
  AlignedArray<int8_t> code;
  AlignedArray<float> scale, total;
  AlignedArray<int32_t> minus, minus_half;

  bool reserve(int64_t n) {
    if (code.size() < n) {
      code = AlignedArray<int8_t>(n);
      scale = AlignedArray<float>(n / kPackGroup);
      total = AlignedArray<float>(n / kPackGroup);
      minus = AlignedArray<int32_t>(n / kPackGroup);
      minus_half = AlignedArray<int32_t>(n / kPackGroup * 2);
    }
    return code.ok() && scale.ok() && total.ok() && minus.ok() && minus_half.ok();
  }
  /// From row r on.
  kernels::ByteRows rows(int64_t r) {
    const int64_t n_in = x->ne[0], g = r * n_in / kPackGroup;
    return {code.data() + r * n_in, scale.data() + g, total.data() + g, minus.data() + g,
            minus_half.data() + 2 * g};
  }

  static void compute(ggml_tensor* /*dst*/, int ith, int nth, void* userdata) {
    Rounded& r = *static_cast<Rounded*>(userdata);
    const int64_t n_in = r.x->ne[0], n = r.x->ne[1], first = n * ith / nth, end = n * (ith + 1) / nth;
    kernels::ops().round_rows(static_cast<const float*>(r.x->data) + first * n_in, n_in, end - first, n_in,
                              r.rows(first));
  }
};

struct PackedProducts::Product {
  const kernels::PackedMatrix* w;
  Rounded* x;

  static void compute(ggml_tensor* dst, int ith, int nth, void* userdata) {
    const Product& p = *static_cast<const Product*>(userdata);
    const int64_t n = dst->ne[1], ld = p.w->n_out, tiles = kernels::pack_tiles(ld);
    const int64_t first = tiles * ith / nth, end = tiles * (ith + 1) / nth;
    auto* y = static_cast<float*>(dst->data);
    for (int64_t r = 0; r < n; r += kRowsAtOnce) {
      kernels::ops().packed_product(*p.w, first, end - first, p.x->rows(r), std::min(kRowsAtOnce, n - r),
                                    y + r * ld, ld, false);
    }
  }
};

PackedProducts::PackedProducts(const ModelWeights& weights) : weights_(weights) {}
PackedProducts::~PackedProducts() = default;

void PackedProducts::begin() {
  for (auto& r : rounded_) r->x = nullptr;
  n_rounded_ = 0;
  products_.clear();
  ok_ = true;
}

int64_t PackedProducts::bytes_needed(const ModelWeights& weights, int64_t n) {
  const Hparams& hp = weights.hparams();
  // A layer's four inputs: twice the residual stream, attention, activation; a code and 20 bytes a group
  // each.
  return n * (2 * hp.n_embd + hp.n_head * hp.head_dim + hp.n_ff) * (kPackGroup + 20) / kPackGroup;
}

PackedProducts::Rounded* PackedProducts::rounded(ggml_context* ctx, ggml_tensor* x) {
  for (size_t i = 0; i < n_rounded_; ++i) {
    if (rounded_[i]->x == x) return rounded_[i].get();
  }
  if (n_rounded_ == rounded_.size()) rounded_.push_back(std::make_unique<Rounded>());
  Rounded* r = rounded_[n_rounded_++].get();
  ok_ = r->reserve(ggml_nelements(x)) && ok_;
  r->x = x;
  r->op = ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, &x, 1, &Rounded::compute, GGML_N_TASKS_MAX, r);
  return r;
}

ggml_tensor* PackedProducts::multiply(ggml_context* ctx, ggml_tensor* weight, ggml_tensor* x) {
  const kernels::PackedMatrix* packed = weights_.packed(weight);
  if (packed == nullptr) return ggml_mul_mat(ctx, weight, x);
  Rounded* r = rounded(ctx, x);
  products_.push_back(std::make_unique<Product>(Product{packed, r}));
  return ggml_custom_4d(ctx, GGML_TYPE_F32, packed->n_out, x->ne[1], 1, 1, &r->op, 1, &Product::compute,
                        GGML_N_TASKS_MAX, products_.back().get());
}

}  // namespace narrows
