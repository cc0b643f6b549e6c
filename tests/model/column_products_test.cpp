// Products of several columns have, column by column, the bits of one: every weight type that a model may
// have, plain and repacked, at every number of columns around ggml's changes of kernel.
#include "model/column_products.h"

#include <ggml-backend.h>
#include <gtest/gtest.h>

#include <cstring>
#include <random>

namespace narrows {
namespace {

std::vector<float> random_floats(int64_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = normal(random);
  return x;
}

std::vector<ggml_backend_buffer_type_t> buffer_types() {
  std::vector<ggml_backend_buffer_type_t> types = {ggml_backend_cpu_buffer_type()};
  ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  const auto extra = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(ggml_backend_reg_get_proc_address(
      ggml_backend_dev_backend_reg(cpu), "ggml_backend_dev_get_extra_bufts"));
  for (auto* type = extra != nullptr ? extra(cpu) : nullptr; type != nullptr && *type != nullptr; ++type)
    types.push_back(*type);
  return types;
}

/// A weight [n_in, n_out] in a buffer of its own; null where this type of buffer cannot hold it.
struct Weight {
  ggml_context* ctx = nullptr;
  ggml_tensor* tensor = nullptr;
  ggml_backend_buffer_t buffer = nullptr;

  Weight(ggml_type type, int64_t n_in, int64_t n_out, ggml_backend_buffer_type_t where) {
    ctx = ggml_init({ggml_tensor_overhead() * 2, nullptr, true});
    tensor = ggml_new_tensor_2d(ctx, type, n_in, n_out);
    buffer = ggml_backend_alloc_ctx_tensors_from_buft(ctx, where);
    const bool plain = where == ggml_backend_cpu_buffer_type();
    if (buffer == nullptr || (!plain && tensor->extra == nullptr)) {
      tensor = nullptr;
      return;
    }
    const std::vector<float> numbers = random_floats(n_in * n_out, 1);
    std::vector<char> bytes(ggml_nbytes(tensor));
    if (type == GGML_TYPE_F32) {
      std::memcpy(bytes.data(), numbers.data(), bytes.size());
    } else {
      const std::vector<float> importance(static_cast<size_t>(n_in), 1.0F);
      ggml_quantize_chunk(type, numbers.data(), bytes.data(), 0, n_out, n_in, importance.data());
    }
    ggml_backend_tensor_set(tensor, bytes.data(), 0, bytes.size());
  }
  ~Weight() {
    if (buffer != nullptr) ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
  }
  Weight(const Weight&) = delete;
  Weight& operator=(const Weight&) = delete;
};

std::vector<float> product(const Weight& w, std::span<const float> x, int64_t n) {
  ggml_context* ctx = ggml_init({ggml_tensor_overhead() * 128 + ggml_graph_overhead(), nullptr, true});
  ggml_tensor* in = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, w.tensor->ne[0], n);
  ColumnProducts products;
  ggml_tensor* out = products.multiply(ctx, w.tensor, in);
  ggml_cgraph* graph = ggml_new_graph(ctx);
  ggml_build_forward_expand(graph, out);
  ggml_backend_buffer_t buffer =
      ggml_backend_alloc_ctx_tensors_from_buft(ctx, ggml_backend_cpu_buffer_type());
  std::memcpy(in->data, x.data(), x.size_bytes());
  GraphRunner runner(2);
  const Status s = runner.run(graph);
  EXPECT_TRUE(s.ok()) << s.message();
  const auto* y = static_cast<const float*>(out->data);
  std::vector<float> result(y, y + w.tensor->ne[1] * n);
  ggml_backend_buffer_free(buffer);
  ggml_free(ctx);
  return result;
}

class ColumnProductsOf : public ::testing::TestWithParam<ggml_type> {};

TEST_P(ColumnProductsOf, EachColumnHasTheBitsOfItsOwn) {
  constexpr int64_t kIn = 768, kOut = 96, kMost = 19;
  const std::vector<float> x = random_floats(kIn * kMost, 2);
  int n_kind = 0;
  for (ggml_backend_buffer_type_t where : buffer_types()) {
    const Weight w(GetParam(), kIn, kOut, where);
    if (w.tensor == nullptr) continue;
    ++n_kind;
    std::vector<float> want;
    for (int64_t c = 0; c < kMost; ++c) {
      const auto column = product(w, std::span(x).subspan(static_cast<size_t>(c * kIn), kIn), 1);
      want.insert(want.end(), column.begin(), column.end());
    }
    for (int64_t n = 1; n <= kMost; ++n) {
      const auto got = product(w, std::span(x).first(static_cast<size_t>(n * kIn)), n);
      EXPECT_EQ(std::memcmp(got.data(), want.data(), got.size() * sizeof(float)), 0)
          << n << " columns in " << ggml_backend_buft_name(where);
    }
  }
  EXPECT_GE(n_kind, 1);
}

std::string type_name(const ::testing::TestParamInfo<ggml_type>& info) { return ggml_type_name(info.param); }

INSTANTIATE_TEST_SUITE_P(Types, ColumnProductsOf,
                         ::testing::Values(GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q4_0,
                                           GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q8_0,
                                           GGML_TYPE_Q2_K, GGML_TYPE_Q3_K, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K,
                                           GGML_TYPE_Q6_K, GGML_TYPE_IQ4_NL, GGML_TYPE_IQ4_XS),
                         type_name);

}  // namespace
}  // namespace narrows
