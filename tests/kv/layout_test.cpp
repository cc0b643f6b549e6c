// Every field of a page lies inside it, no two overlap, and the sizes are those of docs/cache_layout.md.
#include "kv/layout.h"

#include <gtest/gtest.h>

#include <vector>

namespace narrows {
namespace {

/// Marks bytes as taken; a second taker or one outside is an error.
class Map {
 public:
  explicit Map(int64_t bytes) : taken_(static_cast<size_t>(bytes)), page_(static_cast<size_t>(bytes)) {}
  std::byte* page() { return page_.data(); }
  template <class T>
  void take(const T* begin, int64_t n) {
    const auto from = reinterpret_cast<const std::byte*>(begin) - page_.data();
    for (int64_t i = from; i < from + n * static_cast<int64_t>(sizeof(T)); ++i) {
      ASSERT_GE(i, 0);
      ASSERT_LT(i, static_cast<int64_t>(taken_.size()));
      ASSERT_FALSE(taken_[static_cast<size_t>(i)]) << "byte " << i;
      taken_[static_cast<size_t>(i)] = true;
    }
  }
  int64_t n_free() const { return std::count(taken_.begin(), taken_.end(), false); }

 private:
  std::vector<bool> taken_;
  std::vector<std::byte> page_;
};

void take_values(Map& map, const ValueLayout& v) {
  for (int64_t t = 0; t < kPageTokens; ++t) {
    map.take(v.codes(map.page(), t), v.n_group() * kernels::kGroup * v.bits / 8);
    map.take(v.params(map.page(), t), v.n_group() * 2);
  }
}

TEST(Layout, ExactFieldsFillTheBlock) {
  for (const int64_t head_dim : {5, 48, 64, 128}) {
    const ExactLayout l{3, head_dim, 16};
    Map map(l.bytes());
    for (int64_t h = 0; h < 3; ++h) {
      map.take(l.key_t(map.page(), h), head_dim * 16);
      map.take(l.value(map.page(), h), 16 * head_dim);
    }
    EXPECT_EQ(map.n_free(), 0);
    EXPECT_EQ(l.bytes() % 64, 0);
  }
}

TEST(Layout, SalsFieldsFillThePage) {
  for (const int64_t width : {7, 40, 80, 128, 192, 1024}) {
    for (const int bits : {2, 4}) {
      for (const int divisor : {4, 8}) {
        const SalsLayout l(width, divisor, bits);
        EXPECT_EQ(l.rank, std::max<int64_t>(1, width / divisor));
        Map map(l.bytes());
        map.take(l.index(map.page()), l.rank_score * kPageTokens);
        for (int64_t t = 0; t < kPageTokens; ++t) map.take(l.rest(map.page(), t), l.rank - l.rank_score);
        take_values(map, l.values);
        EXPECT_EQ(map.n_free(), 0) << width;
        EXPECT_EQ(l.bytes() % 64, 0);
      }
    }
  }
}

TEST(Layout, KiviFieldsFitThePage) {
  for (const int64_t width : {7, 40, 80, 128, 192, 1024}) {
    for (const int bits : {2, 4}) {
      const KiviLayout l(width, bits, bits);
      Map map(l.bytes());
      for (int64_t d = 0; d < width; ++d) {
        for (int64_t unit = 0; unit < 2; ++unit) {
          map.take(l.key_codes(map.page(), d, unit), 32 * bits / 8);
          map.take(l.key_params(map.page(), d, unit), 2);
        }
      }
      take_values(map, l.values);
      EXPECT_LT(map.n_free(), 64) << width;  // rounding up to a cache line, nothing else
      EXPECT_EQ(l.bytes() % 64, 0);
    }
  }
}

// The figures of docs/cache_layout.md: bytes a token of a layer in pages, D = 192, against 768 of f16.
TEST(Layout, BytesPerTokenAreAsDocumented) {
  EXPECT_EQ((ExactLayout{3, 64, 16}.bytes()), 16 * 768);
  EXPECT_EQ(SalsLayout(192, 4, 4).bytes(), 64 * (48 * 2 + 96 + 6 * 4));
  EXPECT_EQ(SalsLayout(192, 4, 4).bytes(), 64 * 216);
  EXPECT_EQ(SalsLayout(192, 8, 2).bytes(), 64 * 120);
  EXPECT_EQ(KiviLayout(192, 4, 4).bytes(), 64 * 240);
  EXPECT_EQ(KiviLayout(192, 2, 2).bytes(), 64 * 144);
}

TEST(Layout, WindowHoldsWhatIsRecent) {
  for (const int64_t unit : {16, 32}) {
    for (const int64_t n_sink : {0, 5, 16}) {
      for (const int64_t n_recent : {0, 1, 40, 64}) {
        WindowPlan plan;
        plan.n_sink = n_sink;
        plan.n_recent = n_recent;
        plan.unit = unit;
        for (int64_t n = 0; n < 400; ++n) {
          const int64_t pages = plan.in_pages(n);
          const int64_t window = n - n_sink - pages;
          EXPECT_EQ(pages % unit, 0);
          if (pages > 0) {
            EXPECT_GE(window, std::max<int64_t>(n_recent, 1));
          }
          EXPECT_LT(window, std::max<int64_t>(n_recent, 1) + unit);
        }
      }
    }
  }
}

}  // namespace
}  // namespace narrows
