// Key moments and eigenvectors against Jacobi rotations in double.
#include "kv/basis.h"

#include "kv/cache_data.h"

namespace narrows::test {
namespace {

TEST(Basis, SpansTheLeadingEigenvectors) {
  for (const int64_t head_dim : {16, 24}) {
    const Heads s(4, 2, head_dim);
    const Tokens tokens(s, 700);
    KeyMoments moments(s.width());
    moments.add(tokens.key(0), 1);  // pieces that do not divide the inner chunk
    moments.add(tokens.key(1), 130);
    moments.add(tokens.key(131), 700 - 131);
    EXPECT_EQ(moments.n_tokens(), 700);

    std::vector<double> values;
    const auto u = jacobi_vectors(second_moments(tokens, 0, 700), s.width(), &values);
    double total = 0;
    for (const double x : values) total += x;
    for (const int64_t rank : {int64_t{1}, int64_t{5}, s.width() / 4, s.width()}) {
      const auto basis = moments.leading(rank);
      ASSERT_TRUE(basis.ok());
      EXPECT_EQ(basis->rank, rank);
      ASSERT_EQ(basis->u.size(), static_cast<size_t>(s.width() * rank));
      const auto want = projector(u, s.width(), rank);
      for (int64_t i = 0; i < s.width(); ++i) {
        EXPECT_NEAR(basis->energy[static_cast<size_t>(i)], values[static_cast<size_t>(i)] / total, 1e-6);
        for (int64_t j = 0; j < s.width(); ++j) {
          double got = 0;
          for (int64_t c = 0; c < rank; ++c) {
            got += static_cast<double>(basis->u[static_cast<size_t>(i * rank + c)]) *
                   static_cast<double>(basis->u[static_cast<size_t>(j * rank + c)]);
          }
          // float32 products: the subspace turns by their error over the gap of the spectrum
          ASSERT_NEAR(got, want[static_cast<size_t>(i * s.width() + j)], 2e-4) << rank;
        }
      }
    }
  }
}

TEST(Basis, MomentsAreSums) {
  const Heads s(2, 1, 10);
  const Tokens tokens(s, 333);
  KeyMoments moments(10);
  moments.add(tokens.k.data(), 333);
  const auto want = second_moments(tokens, 0, 333);
  for (size_t i = 0; i < want.size(); ++i)
    EXPECT_NEAR(moments.moments()[i], want[i], 1e-6 * want[0] + 1e-6 * std::fabs(want[i]) + 1e-3);
  for (size_t d = 0; d < 10; ++d) {
    double sum = 0;
    for (size_t t = 0; t < 333; ++t) sum += static_cast<double>(tokens.k[t * 10 + d]);
    EXPECT_NEAR(moments.sum()[d], sum, 1e-9 * 333 * 10);
  }
}

TEST(Basis, MomentsOfPiecesAreThoseOfTheWhole) {
  const Heads s(2, 1, 10);
  const Tokens tokens(s, 333);
  KeyMoments whole(10), pieces(10);
  whole.add(tokens.k.data(), 333);
  int64_t at = 0;
  for (int64_t i = 0; at < 333; ++i) {  // ones, blocks, and what falls between; read now and then
    const int64_t sizes[] = {1, 31, 32, 5, 40, 1};
    const int64_t n = std::min(sizes[i % 6], 333 - at);
    pieces.add(tokens.k.data() + at * 10, n);
    pieces.add(tokens.k.data(), 0);
    at += n;
    ASSERT_EQ(pieces.n_tokens(), at);
    if (i % 5 == 3) {
      const auto want = second_moments(tokens, 0, static_cast<size_t>(at));
      EXPECT_NEAR(pieces.moments()[0], want[0], 1e-6 * want[0]);
    }
  }
  const double largest = *std::max_element(whole.moments().begin(), whole.moments().end());
  for (size_t i = 0; i < 100; ++i) EXPECT_NEAR(pieces.moments()[i], whole.moments()[i], 1e-6 * largest);
  for (size_t i = 0; i < 10; ++i) EXPECT_NEAR(pieces.sum()[i], whole.sum()[i], 1e-9 * 333 * 10);
  KeyMoments sum(10), rest(10);  // of which tokens still wait
  sum.add(tokens.k.data(), 103);
  rest.add(tokens.k.data() + 103 * 10, 3);
  sum.add(rest);
  sum.add(tokens.k.data() + 106 * 10, 227);
  EXPECT_EQ(sum.n_tokens(), 333);
  for (size_t i = 0; i < 100; ++i) EXPECT_NEAR(sum.moments()[i], whole.moments()[i], 1e-6 * largest);
  const auto a = pieces.leading(4), b = whole.leading(4);
  ASSERT_TRUE(a.ok() && b.ok());
  EXPECT_NEAR(a->energy[0], b->energy[0], 1e-6);
}

TEST(Basis, RefusesWhatHasNone) {
  KeyMoments moments(8);
  EXPECT_EQ(moments.leading(4).status().code(), StatusCode::invalid_argument);
  const std::vector<float> zero(8);
  moments.add(zero.data(), 1);
  EXPECT_EQ(moments.leading(0).status().code(), StatusCode::invalid_argument);
  EXPECT_EQ(moments.leading(9).status().code(), StatusCode::invalid_argument);
  const auto basis = moments.leading(4);  // no energy anywhere, but directions all the same
  ASSERT_TRUE(basis.ok());
  EXPECT_EQ(basis->energy[0], 0);
  const std::vector<float> huge(8, 1e30F);
  moments.add(huge.data(), 1);
  EXPECT_EQ(moments.leading(4).status().code(), StatusCode::non_finite);
}

}  // namespace
}  // namespace narrows::test
