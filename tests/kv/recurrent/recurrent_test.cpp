// The state of a recurrent layer as a cache: pieces and steps are the whole, where it can go back to, what it
// shares, what bytes of others it refuses.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <random>

#include "base/memory_ledger.h"
#include "kernels/ops.h"
#include "kv/recurrent/recurrent_layer.h"
#include "kv/step/step_scratch.h"

namespace narrows::test {
namespace {

constexpr int64_t kSink = 16;
constexpr int64_t kPlace = kSink + kSegmentTokens;  ///< the first

/// A layer's weights and rows, random.
struct Net {
  kernels::DeltaNetShape shape{2, 4, 8, 4, true};
  std::vector<float> conv, rate, bias, norm;
  kernels::DeltaNet net;
  kernels::RopeTable rope;

  Net() {
    conv = numbers(shape.n_conv * shape.n_channel(), 1);
    bias = numbers(shape.n_head_v, 2);
    norm = numbers(shape.head_dim, 3);
    rate.assign(static_cast<size_t>(shape.n_head_v), -0.1F);
    net = {shape, conv.data(), rate.data(), bias.data(), norm.data(), 1e-6F};
  }
  std::vector<float> numbers(int64_t n, uint32_t seed) const {
    std::mt19937 random(seed);
    std::normal_distribution<float> draw(0, 1);
    std::vector<float> x(static_cast<size_t>(n));
    for (float& y : x) y = draw(random);
    return x;
  }
  std::vector<float> rows(int64_t n, uint32_t seed = 7) const { return numbers(n * shape.n_row(), seed); }
  RecurrentLayer layer(bool segmented = false) const { return {shape, &rope, kSink, segmented}; }
};

const Net& net() {
  static const Net made;
  return made;
}

using Floats = std::vector<float>;

/// Rows [first, first + n) of a prompt through a layer; what it gives for them.
Floats read(RecurrentLayer& layer, const Floats& rows, int64_t first, int64_t n, bool counts = true,
            int n_threads = 2) {
  const int64_t ld = net().shape.n_row(), width = net().shape.width_v();
  Floats out(static_cast<size_t>(n * width)),
      work(static_cast<size_t>(n_threads * RecurrentRows::work_floats(net().shape)));
  EXPECT_TRUE(layer.begin_rows(n).ok());
  const RecurrentRows chunk{&net().net, rows.data() + first * ld, ld, out.data(), width, n, work.data()};
  for (int phase = 0; phase < RecurrentRows::kPhases; ++phase) {
    for (int ith = 0; ith < n_threads; ++ith) layer.run_rows(phase, chunk, ith, n_threads);
  }
  if (counts && !layer.append(nullptr, nullptr, n).ok()) ADD_FAILURE();
  return out;
}

Floats step(RecurrentLayer& layer, const Floats& rows, int64_t at, bool counts = true) {
  StepScratch scratch(AttentionShape{}, 2);
  Floats out(static_cast<size_t>(net().shape.width_v()));
  EXPECT_TRUE(layer.begin_step(scratch).ok());
  const DecodeStep step{
      rows.data() + at * net().shape.n_row(), nullptr, nullptr, out.data(), nullptr, &net().net};
  for (int ith = 0; ith < 2; ++ith) layer.run_phase(0, step, scratch, ith, 2);
  if (counts) layer.end_step();
  return out;
}

double difference(const Floats& a, const float* b) {
  double most = 0;
  for (size_t i = 0; i < a.size(); ++i) most = std::max(most, std::fabs(double{a[i]} - double{b[i]}));
  return most;
}

TEST(Recurrent, PiecesAndStepsAreTheWhole) {
  const Floats rows = net().rows(300);
  RecurrentLayer whole = net().layer(true);
  const Floats want = read(whole, rows, 0, 300);
  const auto width = net().shape.width_v();
  for (const std::vector<int64_t>& pieces :
       std::vector<std::vector<int64_t>>{{1, 2, 3, 64, 65, 165}, {128, 172}, {5, 295}, {299, 1}}) {
    RecurrentLayer layer = net().layer(false);
    int64_t at = 0;
    for (const int64_t n : pieces) {
      EXPECT_LT(difference(read(layer, rows, at, n), want.data() + at * width), 2e-5) << at;
      at += n;
    }
  }
  RecurrentLayer steps = net().layer();
  for (int64_t t = 0; t < 300; ++t)
    ASSERT_LT(difference(step(steps, rows, t), want.data() + t * width), 2e-5) << t;
  EXPECT_EQ(steps.n_tokens(), 300);
}

TEST(Recurrent, ThreadsMakeNoDifference) {
  const Floats rows = net().rows(200);
  RecurrentLayer one = net().layer();
  const Floats want = read(one, rows, 0, 200, true, 1);
  for (const int n_threads : {2, 3, 7}) {
    RecurrentLayer layer = net().layer();
    EXPECT_EQ(difference(read(layer, rows, 0, 200, true, n_threads), want.data()), 0);
  }
}

// A snapshot within a chunk is the state that a prompt which ends there leaves.
TEST(Recurrent, SnapshotsOfAChunkAreThoseOfItsTokens) {
  const Floats rows = net().rows(600);
  RecurrentLayer layer = net().layer();
  read(layer, rows, 0, 600);
  for (const int64_t n : {kPlace + kSegmentTokens, kPlace}) {
    ASSERT_TRUE(layer.can_keep(n));
    layer.keep(n);
    EXPECT_EQ(layer.n_tokens(), n);
    RecurrentLayer fresh = net().layer();
    read(fresh, rows, 0, n);
    EXPECT_LT(difference(step(fresh, rows, n), step(layer, rows, n).data()), 2e-5);
    layer.keep(n);
  }
}

TEST(Recurrent, GoesBackToSnapshotsAlone) {
  const Floats rows = net().rows(3000);
  RecurrentLayer layer = net().layer();
  read(layer, rows, 0, 2000);
  const int64_t newest = kSink + 7 * kSegmentTokens;
  for (int64_t n = 0; n <= 2001; ++n)
    ASSERT_EQ(layer.can_keep(n), n == 0 || n == 2000 || n == newest || n == newest - kSegmentTokens) << n;
  // Steps have one of their own, which the next prompt leaves, and two of that prompt.
  for (int64_t t = 2000; t < 2600; ++t) step(layer, rows, t);
  const int64_t of_steps = kSink + 10 * kSegmentTokens;
  EXPECT_TRUE(layer.can_keep(newest));
  EXPECT_TRUE(layer.can_keep(of_steps));
  EXPECT_FALSE(layer.can_keep(of_steps - kSegmentTokens));
  read(layer, rows, 2600, 400);
  EXPECT_TRUE(layer.can_keep(of_steps));
  EXPECT_FALSE(layer.can_keep(newest));
  EXPECT_TRUE(layer.can_keep(of_steps + kSegmentTokens));
  EXPECT_LE(layer.bytes().total(), RecurrentLayer::bytes_for(net().shape, 3000));
}

TEST(Recurrent, WithSegmentsTheFirstPromptsEndStays) {
  const Floats rows = net().rows(400);
  RecurrentLayer layer = net().layer(true);
  const auto prompt = [&](int n_segment) {
    for (int i = 0; i < n_segment; ++i) {
      int64_t changed = 0;
      read(layer, rows, 0, i == 0 && layer.n_tokens() == 0 ? kPlace : kSegmentTokens);
      EXPECT_TRUE(layer.seal(&changed).ok());
      EXPECT_EQ(changed, layer.n_tokens());
    }
    read(layer, rows, 0, 100);
    for (int64_t t = 0; t < 30; ++t) step(layer, rows, t);
  };
  prompt(5);
  const int64_t first = kSink + 4 * kSegmentTokens;
  EXPECT_TRUE(layer.can_keep(first));
  for (int i = 0; i < 4; ++i) {
    const int64_t end = kSink + 5 * kSegmentTokens + 2 * i * kSegmentTokens;
    ASSERT_TRUE(layer.can_keep(end));
    layer.keep(end);
    prompt(2);
    EXPECT_TRUE(layer.can_keep(first)) << i;
    EXPECT_TRUE(layer.can_keep(end)) << i;
    EXPECT_LE(layer.bytes().total(), RecurrentLayer::bytes_for(net().shape, layer.n_tokens()));
  }
}

// What has changed a state without being counted leaves it no place to be.
TEST(Recurrent, HalfReadTokensAreNoPlace) {
  const Floats rows = net().rows(700);
  RecurrentLayer layer = net().layer();
  read(layer, rows, 0, 600);
  RecurrentLayer same = net().layer();
  ASSERT_TRUE(same.share(layer, 600).ok());
  read(layer, rows, 600, 50, /*counts=*/false);
  EXPECT_EQ(layer.n_tokens(), 600);
  EXPECT_FALSE(layer.can_keep(600));
  EXPECT_FALSE(layer.append(nullptr, nullptr, 49).ok());
  ASSERT_TRUE(layer.can_keep(kPlace + kSegmentTokens));
  layer.keep(kPlace + kSegmentTokens);
  step(layer, rows, 0, /*counts=*/false);
  EXPECT_FALSE(layer.can_keep(kPlace + kSegmentTokens + 1));
  EXPECT_TRUE(layer.can_keep(kPlace + kSegmentTokens));  // by its snapshot
  // The other one, which shared its pages, has seen nothing of that.
  RecurrentLayer fresh = net().layer();
  read(fresh, rows, 0, 600);
  EXPECT_EQ(difference(step(fresh, rows, 600), step(same, rows, 600).data()), 0);
}

TEST(Recurrent, IsCountedOnceHoweverManyShareIt) {
  const Floats rows = net().rows(700);
  const auto counted = [] { return MemoryLedger::process().bytes(MemoryUse::cache); };
  const int64_t before = counted();
  {
    RecurrentLayer layer = net().layer();
    read(layer, rows, 0, 600);
    const int64_t one = counted() - before;
    EXPECT_EQ(one, layer.bytes().total());
    RecurrentLayer other = net().layer();
    ASSERT_TRUE(other.share(layer, kPlace).ok());
    EXPECT_EQ(counted() - before, one);
    EXPECT_GT(other.bytes().total(), 0);
    step(other, rows, 0);
    EXPECT_GT(counted() - before, one);
  }
  EXPECT_EQ(counted(), before);
}

std::string saved(const RecurrentLayer& layer) {
  std::FILE* file = std::tmpfile();
  SnapshotWriter out(file);
  layer.save(out);
  std::string bytes(out.size(), '\0');
  std::rewind(file);
  EXPECT_EQ(std::fread(bytes.data(), 1, bytes.size(), file), bytes.size());
  (void)std::fclose(file);
  return bytes;
}

TEST(Recurrent, IsSavedAndRestoredWithItsSnapshots) {
  const Floats rows = net().rows(700);
  RecurrentLayer layer = net().layer();
  read(layer, rows, 0, 600);
  const std::string bytes = saved(layer);
  RecurrentLayer other = net().layer();
  SnapshotReader in(bytes);
  ASSERT_TRUE(other.load(in).ok());
  EXPECT_EQ(in.left(), 0U);
  EXPECT_EQ(difference(step(layer, rows, 600), step(other, rows, 600).data()), 0);
  layer.keep(kPlace);
  ASSERT_TRUE(other.can_keep(kPlace));
  other.keep(kPlace);
  EXPECT_EQ(difference(step(layer, rows, 5), step(other, rows, 5).data()), 0);
  RecurrentLayer empty = net().layer();
  const std::string nothing = saved(empty);
  SnapshotReader none(nothing);
  EXPECT_TRUE(other.load(none).ok());
  EXPECT_EQ(other.n_tokens(), 0);
}

TEST(Recurrent, RefusesBytesThatAreNone) {
  RecurrentLayer layer = net().layer();
  read(layer, net().rows(600), 0, 600);
  const std::string good = saved(layer);
  const auto refused = [&](const std::string& bytes) {
    RecurrentLayer other = net().layer();
    SnapshotReader in(bytes);
    const bool failed = !other.load(in).ok();
    return failed && other.n_tokens() == 0 && other.bytes().total() == 0;
  };
  for (size_t n = 0; n < good.size(); n += n < 64 ? 1 : 997) EXPECT_TRUE(refused(good.substr(0, n))) << n;
  const auto with = [&](size_t at, int64_t number) {
    std::string bytes = good;
    std::memcpy(bytes.data() + at, &number, sizeof(number));
    return bytes;
  };
  EXPECT_TRUE(refused(with(0, -1)));  // tokens
  EXPECT_TRUE(refused(with(8, 0)));   // of tokens, but without a state
  EXPECT_TRUE(refused(with(8, 2)));
  const auto marks = 16 + static_cast<size_t>(RecurrentLayer::bytes_for(net().shape, 1));
  EXPECT_TRUE(refused(with(marks, 5)));        // more snapshots than there can be
  EXPECT_TRUE(refused(with(marks + 8, 0)));    // behind no token
  EXPECT_TRUE(refused(with(marks + 8, 601)));  // behind more than there are
  EXPECT_TRUE(refused(with(marks + 16, 4)));   // of no kind
}

}  // namespace
}  // namespace narrows::test
