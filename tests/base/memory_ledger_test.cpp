#include "base/memory_ledger.h"

#include <gtest/gtest.h>

#include <utility>

namespace narrows {
namespace {

/// A machine whose numbers a test sets.
struct Machine {
  MachineMemory now{.available = 1000, .resident = 0};
  MemoryLedger ledger{[this] { return now; }};
};

TEST(MemoryLedger, TakesWhatFitsAndRefusesTheRest) {
  Machine m;
  EXPECT_TRUE(m.ledger.claim(MemoryUse::weights, 600));
  EXPECT_EQ(m.ledger.free_bytes(), 400);
  EXPECT_FALSE(m.ledger.claim(MemoryUse::cache, 401));
  EXPECT_EQ(m.ledger.bytes(), 600);
  EXPECT_TRUE(m.ledger.claim(MemoryUse::cache, 400));
  EXPECT_EQ(m.ledger.free_bytes(), 0);
  EXPECT_EQ(m.ledger.bytes(MemoryUse::cache), 400);
}

TEST(MemoryLedger, WhatIsWrittenToIsNotCountedTwice) {
  Machine m;
  ASSERT_TRUE(m.ledger.claim(MemoryUse::weights, 600));
  m.now = {.available = 400, .resident = 600};  // the promise has been kept
  EXPECT_EQ(m.ledger.free_bytes(), 400);
  m.now = {.available = 700, .resident = 300};  // half of it
  EXPECT_EQ(m.ledger.free_bytes(), 400);
  m.now = {.available = 400, .resident = 900};  // and what nobody claimed
  EXPECT_EQ(m.ledger.free_bytes(), 400);
}

TEST(MemoryLedger, OthersOnTheMachineCount) {
  Machine m;
  ASSERT_TRUE(m.ledger.claim(MemoryUse::cache, 500));
  m.now.available = 300;
  EXPECT_EQ(m.ledger.free_bytes(), 0);
  EXPECT_FALSE(m.ledger.claim(MemoryUse::cache, 1));
}

TEST(MemoryLedger, ALimitHoldsForAllUsesTogether) {
  Machine m;
  m.ledger.set_limit(300);
  EXPECT_TRUE(m.ledger.claim(MemoryUse::weights, 200));
  EXPECT_FALSE(m.ledger.claim(MemoryUse::prompt, 101));
  EXPECT_TRUE(m.ledger.claim(MemoryUse::prompt, 100));
  m.ledger.set_limit(100);  // less than is promised: nothing more, and what there is may go
  EXPECT_EQ(m.ledger.free_bytes(), 0);
  EXPECT_TRUE(m.ledger.claim(MemoryUse::prompt, -100));
  EXPECT_FALSE(m.ledger.claim(MemoryUse::prompt, 1));
}

TEST(MemoryLedger, RefusesNothingWhereNobodyKnows) {
  MemoryLedger ledger([] { return MachineMemory{}; });
  EXPECT_EQ(ledger.free_bytes(), INT64_MAX);
  EXPECT_TRUE(ledger.claim(MemoryUse::cache, int64_t{1} << 60));
  ledger.set_limit(1000);
  EXPECT_FALSE(ledger.claim(MemoryUse::cache, 1));
}

TEST(MemoryLedger, WithoutAResidentSetOnlyTheSystemCounts) {
  Machine m;
  m.now.resident = -1;
  ASSERT_TRUE(m.ledger.claim(MemoryUse::cache, 900));
  EXPECT_EQ(m.ledger.free_bytes(), 1000);
}

TEST(MemoryClaim, GivesBackWhatItHolds) {
  Machine m;
  {
    MemoryClaim claim(MemoryUse::cache, m.ledger);
    EXPECT_TRUE(claim.resize(700));
    EXPECT_FALSE(claim.resize(1001));
    EXPECT_EQ(claim.bytes(), 700);
    EXPECT_TRUE(claim.resize(1000));
    EXPECT_TRUE(claim.resize(10));
    EXPECT_EQ(m.ledger.bytes(), 10);
    MemoryClaim other = std::move(claim);
    EXPECT_EQ(m.ledger.bytes(), 10);
    MemoryClaim third(MemoryUse::file, m.ledger);
    ASSERT_TRUE(third.resize(5));
    third = std::move(other);
    EXPECT_EQ(third.bytes(), 10);
    EXPECT_EQ(m.ledger.bytes(MemoryUse::cache), 10);
  }
  EXPECT_EQ(m.ledger.bytes(), 0);
}

TEST(MemoryLedger, TheProcessKnowsItsMachine) {
  MemoryLedger& ledger = MemoryLedger::process();
  EXPECT_GT(ledger.free_bytes(), 0);
  const int64_t before = ledger.bytes(MemoryUse::file);
  {
    MemoryClaim claim(MemoryUse::file);
    EXPECT_FALSE(claim.resize(int64_t{1} << 60));
    EXPECT_TRUE(claim.resize(1));
    EXPECT_EQ(ledger.bytes(MemoryUse::file), before + 1);
  }
  EXPECT_EQ(ledger.bytes(MemoryUse::file), before);
}

}  // namespace
}  // namespace narrows
