// The text behind --kv: accepted with numbers in range, or refused in one line.
#include <algorithm>
#include <string_view>

#include "fuzz/fuzz.h"
#include "narrows/config.h"

namespace narrows::fuzz {

std::vector<Seed> seeds() {
  std::vector<Seed> all;
  for (const std::string& name : KvProfile::names()) all.push_back({name, name.size()});
  for (const char* text : {"sals-25:budget=1024", "sals-12.5:budget=all,sinks=0,recent=1",
                           "kivi-2:sinks=4096,recent=65536", "sals-25:budget=999999999"}) {
    all.push_back({text, std::string_view(text).size()});
  }
  return all;
}

}  // namespace narrows::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace narrows;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const Result<KvProfile> profile = KvProfile::parse(text);
  if (!profile.ok()) {
    fuzz::check(profile.status().code() == StatusCode::invalid_argument, "another code");
    fuzz::check_sentence(profile.status());
    return 0;
  }
  ++fuzz::g_accepted;
  const KvProfile& p = *profile;
  fuzz::check(p.name == text, "the name is not what was asked for");
  const std::string name = p.name.substr(0, p.name.find(':'));
  const auto names = KvProfile::names();
  fuzz::check(std::find(names.begin(), names.end(), name) != names.end(), "an unknown profile was accepted");
  fuzz::check(p.n_sink >= 0 && p.n_sink <= 4096 && p.n_recent >= 1 && p.n_recent <= 65536,
              "a window is out of range");
  fuzz::check(p.value_bits == 2 || p.value_bits == 4 || p.value_bits == 16, "bits");
  for (const int64_t n : {int64_t{0}, int64_t{1}, int64_t{100}, int64_t{1} << 40}) {
    const int64_t budget = p.budget_at(n);
    fuzz::check(budget >= 0 && budget <= std::max<int64_t>(n, 1'000'000'000), "a budget is out of range");
  }
  for (int64_t layer = 0; layer < 5; ++layer) (void)p.layer_is_dense(layer, 5);
  return 0;
}
