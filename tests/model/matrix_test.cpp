// What a packed weight is: the very number that ggml unpacks from the file's block, for every type, whatever
// the bits.
#include <gtest/gtest.h>

#include "ggml.h"
#include "kernels/packed_data.h"

namespace narrows::kernels {
namespace {

ggml_type type_of(Packing p) {
  static constexpr ggml_type kTypes[] = {GGML_TYPE_Q4_0,   GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1,
                                         GGML_TYPE_Q8_0,   GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K,
                                         GGML_TYPE_IQ4_NL, GGML_TYPE_MXFP4};
  return kTypes[static_cast<int>(p)];
}

TEST(Packing, IsWhatGgmlUnpacks) {
  Random random(1);
  std::vector<float> halves = {0, 1, -1, 65504, 6e-8F, -3e-6F, 0.3333F};
  std::normal_distribution<float> normal(0, 0.05F);
  for (int i = 0; i < 500; ++i) halves.push_back(normal(random));
  for (const Packing p : kAllPackings) {
    ASSERT_EQ(file_row_bytes(p, 512), static_cast<int64_t>(ggml_row_size(type_of(p), 512)));
    for (const int64_t blocks : {1, 2, 7}) {
      const int64_t n_in = blocks * inputs_at_once(p), n_out = 35, row = file_row_bytes(p, n_in);
      const Packed w(p, n_in, n_out, halves, random);
      std::vector<float> want(static_cast<size_t>(n_in)), got(want.size());
      for (int64_t o = 0; o < n_out; ++o) {
        ggml_get_type_traits(type_of(p))->to_float(w.file.data() + o * row, want.data(), n_in);
        unpack_row(w.matrix, o, got.data());
        for (int64_t k = 0; k < n_in; ++k) {
          ASSERT_EQ(got[static_cast<size_t>(k)], want[static_cast<size_t>(k)])
              << packing_name(p) << ", row " << o << ", input " << k;
        }
      }
    }
  }
}

TEST(Packing, EveryScaleOfMxfp4) {
  const int64_t n_in = 256 * kPackGroup;
  std::vector<uint8_t> row(static_cast<size_t>(file_row_bytes(Packing::mxfp4, n_in)), 0xA7);
  for (size_t e = 0; e < 256; ++e) row[17 * e] = static_cast<uint8_t>(e);
  const uint8_t* rows[kPackRows] = {row.data()};
  std::vector<uint8_t> tile(static_cast<size_t>(tile_bytes(Packing::mxfp4, n_in)));
  pack_tile(Packing::mxfp4, n_in, rows, tile.data());
  std::vector<float> want(static_cast<size_t>(n_in)), got(want.size());
  ggml_get_type_traits(GGML_TYPE_MXFP4)->to_float(row.data(), want.data(), n_in);
  unpack_row({Packing::mxfp4, n_in, 1, tile.data()}, 0, got.data());
  EXPECT_EQ(got, want);
}

TEST(Packing, TakesTheBytesOfTheFile) {
  for (const Packing p : kAllPackings)
    EXPECT_EQ(tile_bytes(p, 1024), kPackRows * file_row_bytes(p, 1024)) << packing_name(p);
}

TEST(Packing, RowsBeyondTheMatrixAreZeros) {
  Random random(2);
  for (const Packing p : kAllPackings) {
    const int64_t n_in = inputs_at_once(p);
    const Packed w(p, n_in, 3, {0.5F}, random);
    std::vector<float> got(static_cast<size_t>(n_in));
    for (int64_t o = 3; o < kPackRows; ++o) {
      unpack_row(w.matrix, o, got.data());
      for (const float x : got) ASSERT_EQ(x, 0) << packing_name(p);
    }
  }
}

}  // namespace
}  // namespace narrows::kernels
