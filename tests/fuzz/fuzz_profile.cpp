// The parser of cache profiles, behind --kv. A name that is accepted must describe a cache that can exist.
#include <cstdlib>

#include "fuzz/fuzz.h"
#include "narrows/config.h"

namespace {
bool accepted = false;
}

bool fuzz_accepted() { return accepted; }

std::vector<std::string> fuzz_seeds() {
  std::vector<std::string> seeds = narrows::KvProfile::names();
  seeds.insert(seeds.end(),
               {"sals-25:budget=1024", "sals-12.5:budget=all,sinks=4", "kivi-4:recent=128,sinks=0"});
  return seeds;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace narrows;
  const Result<KvProfile> p = KvProfile::parse({reinterpret_cast<const char*>(data), size});
  accepted = p.ok();
  if (accepted && (p->n_sink < 0 || p->n_recent < 1 || p->budget_at(1 << 20) < 0 || p->rank_divisor < 1))
    std::abort();
  return 0;
}
