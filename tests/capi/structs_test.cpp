// Structs of the C API from programs that were compiled with an older or a newer header.
#include <cstddef>

#include "capi.h"
#include "capi/call.h"

namespace narrows::testing {
namespace {

/// A struct as its second version has it; the first ended before `b`.
struct Grown {
  size_t struct_size;
  int64_t a;
  int64_t b;
};
constexpr size_t kFirst = offsetof(Grown, b);
constexpr Grown kDefaults = {sizeof(Grown), 1, 2};

Status read(const void* from, Grown* to) {
  *to = kDefaults;
  return capi::read_struct(static_cast<const Grown*>(from), kFirst, "grown", to);
}

TEST(CApiStructs, AnOlderOneHasDefaultsForTheRest) {
  const struct {
    size_t struct_size = kFirst;
    int64_t a = 7;
    int64_t not_its_own = 99;
  } older;
  Grown g{};
  ASSERT_OK(read(&older, &g));
  EXPECT_EQ(g.a, 7);
  EXPECT_EQ(g.b, 2);
  const Grown same = {sizeof same, 5, 6};
  ASSERT_OK(read(&same, &g));
  EXPECT_EQ(g.b, 6);
  ASSERT_OK(read(nullptr, &g));
  EXPECT_EQ(g.a, 1);
}

TEST(CApiStructs, ANewerOneMayOnlySayWhatIsKnown) {
  struct {
    size_t struct_size = sizeof(Grown) + 8;
    int64_t a = 7, b = 8, c = 0;
  } newer;
  Grown g{};
  ASSERT_OK(read(&newer, &g));
  EXPECT_EQ(g.b, 8);
  newer.c = 1;
  EXPECT_EQ(read(&newer, &g).code(), StatusCode::unsupported);
}

TEST(CApiStructs, SizesThatCannotBe) {
  Grown g{};
  for (const size_t size : {size_t{0}, size_t{8}, kFirst - 1, size_t{4097}, SIZE_MAX}) {
    const Grown wrong = {size, 5, 6};
    const Status s = read(&wrong, &g);
    EXPECT_EQ(s.code(), StatusCode::invalid_argument) << size;
    EXPECT_NE(s.message().find(std::to_string(size)), std::string::npos) << s.message();
    EXPECT_EQ(g.a, 1) << "nothing was read";
  }
}

TEST(CApiStructs, InitWritesAsMuchAsTheCallerHas) {
  struct {
    Grown grown;
    int64_t beyond;
  } room;
  const auto init = [&](size_t size) {
    std::memset(&room, 0xAA, sizeof room);
    capi::init_struct(&room.grown, size, kDefaults);
  };
  init(kFirst);
  EXPECT_EQ(room.grown.struct_size, kFirst);
  EXPECT_EQ(room.grown.a, 1);
  EXPECT_EQ(static_cast<uint64_t>(room.grown.b), 0xAAAAAAAAAAAAAAAAU) << "behind an older struct";
  init(sizeof room);
  EXPECT_EQ(room.grown.b, 2);
  EXPECT_EQ(room.beyond, 0) << "what only a newer header knows is zero";
  init(3);
  EXPECT_EQ(room.grown.struct_size, 0xAAAAAAAAAAAAAAAAU);
}

TEST(CApiStructs, OutputsGoAsFarAsTheCallersStruct) {
  struct {
    Grown grown;
    int64_t beyond;
  } room = {{kFirst, 0, 77}, 78};
  ASSERT_OK(capi::write_struct(Grown{0, 5, 6}, kFirst, "grown", &room.grown));
  EXPECT_EQ(room.grown.a, 5);
  EXPECT_EQ(room.grown.b, 77);
  room.grown.struct_size = sizeof room;
  ASSERT_OK(capi::write_struct(Grown{0, 5, 6}, kFirst, "grown", &room.grown));
  EXPECT_EQ(room.grown.b, 6);
  EXPECT_EQ(room.beyond, 0);
  EXPECT_EQ(room.grown.struct_size, sizeof room);
  room.grown.struct_size = 0;
  EXPECT_EQ(capi::write_struct(Grown{0, 5, 6}, kFirst, "grown", &room.grown).code(),
            StatusCode::invalid_argument);
}

TEST(CApiStructs, EveryCallLooksAtTheSize) {
  narrows_model_options mo;
  narrows_model_options_init(&mo);
  narrows_session_options so = c_options();
  narrows_sampler_options po;
  narrows_sampler_options_init(&po);
  narrows_model* m = nullptr;
  narrows_session* s = nullptr;
  narrows_sampler* p = nullptr;
  narrows_model_info info = {};
  narrows_cache_stats stats = {};
  const CSession session = c_session(so);
  narrows_memory_stats memory = {};
  mo.struct_size = so.struct_size = po.struct_size = info.struct_size = stats.struct_size =
      memory.struct_size = sizeof(size_t);
  const char* path = tiny().cpp.path.c_str();
  expect_refused(narrows_model_load(path, &mo, &m), NARROWS_INVALID_ARGUMENT, "narrows_model_options");
  expect_refused(narrows_session_create(tiny().c.get(), &so, &s), NARROWS_INVALID_ARGUMENT,
                 "narrows_session_options");
  expect_refused(narrows_session_load(tiny().c.get(), &so, path, &s), NARROWS_INVALID_ARGUMENT,
                 "narrows_session_options");
  expect_refused(narrows_sampler_create(tiny().c.get(), &po, &p), NARROWS_INVALID_ARGUMENT,
                 "narrows_sampler_options");
  expect_refused(narrows_model_get_info(tiny().c.get(), &info), NARROWS_INVALID_ARGUMENT,
                 "narrows_model_info");
  expect_refused(narrows_session_get_cache_stats(session.get(), &stats), NARROWS_INVALID_ARGUMENT,
                 "narrows_cache_stats");
  expect_refused(narrows_memory_get_stats(&memory), NARROWS_INVALID_ARGUMENT, "narrows_memory_stats");
}

/// The layout of version 0.1, which programs are compiled with: a change of it breaks them.
TEST(CApiStructs, LayoutOfTheFirstVersion) {
  if (sizeof(void*) != 8) GTEST_SKIP() << "written down for 64-bit machines";
  EXPECT_EQ(offsetof(narrows_model_options, float_weights), 12U);
  EXPECT_EQ(offsetof(narrows_model_info, has_chat_template), 104U);
  EXPECT_EQ(offsetof(narrows_session_options, n_ctx), 48U);
  EXPECT_EQ(offsetof(narrows_session_options, segments), 60U);
  EXPECT_EQ(offsetof(narrows_cache_stats, n_layer_compressed), 72U);
  EXPECT_EQ(offsetof(narrows_memory_stats, free), 56U);
  EXPECT_EQ(offsetof(narrows_sampler_options, temperature), 32U);
  EXPECT_EQ(offsetof(narrows_sampler_options, reserved), 68U);
  EXPECT_EQ(sizeof(narrows_logit_bias), 8U);
}

}  // namespace
}  // namespace narrows::testing
