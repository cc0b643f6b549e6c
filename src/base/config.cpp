// Profiles behind `--kv NAME[:key=value,...]`: one table of names, one of keys, and a parser that reads any
// bytes without harm. A wrong name, key or number is answered with the list of what exists.
#include "narrows/config.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>

#include "base/utf8.h"

namespace narrows {
namespace {

struct NamedProfile {
  std::string_view name;
  KvKind kind;
  int key_bits;
  int value_bits;
  int rank_divisor;
  double key_rate = 0;
  double value_rate = 0;
};

/// By stored bits of a compressed layer, scales included: 16+16, 5+5, 4+5, 3+3, 2+3.1, 2+3, 1.1+1.6
/// (DESIGN.md).
constexpr std::array<NamedProfile, 7> kProfiles = {{
    {"f16", KvKind::f16, 16, 16, 1},
    {"kivi-4", KvKind::kivi, 4, 4, 1},
    {"sals-25", KvKind::sals, 16, 4, 4},
    {"kivi-2", KvKind::kivi, 2, 2, 1},
    {"klt", KvKind::klt, 16, 16, 1, 2, 3},
    {"sals-12.5", KvKind::sals, 16, 2, 8},
    {"klt-10x", KvKind::klt, 16, 16, 1, 1, 1.5},
}};

struct Key {
  std::string_view name;
  int64_t KvProfile::*whole;  ///< one of the two
  double KvProfile::*real;
  int64_t low;
  int64_t high;
  bool takes_all;  ///< "all" is a value too
  bool for_kivi;
  bool for_sals;
  bool for_klt;

  bool fits(KvKind kind) const {
    return (kind == KvKind::kivi && for_kivi) || (kind == KvKind::sals && for_sals) ||
           (kind == KvKind::klt && for_klt);
  }
};

/// Of the attention mass beside sinks and recent tokens, klt's selection leaves out this much at most if its
/// budget allows: half of the tokens for a tenth of the error (docs/experiments.md).
constexpr double kKltMass = 0.98;

constexpr std::array<Key, 9> kKeys = {{
    {"k", nullptr, &KvProfile::key_rate, 0, 8, false, false, false, true},
    {"v", nullptr, &KvProfile::value_rate, 0, 8, false, false, false, true},
    {"budget", &KvProfile::budget, nullptr, 1, 1'000'000'000, true, false, true, true},
    {"mass", nullptr, &KvProfile::mass, 0, 1, false, false, false, true},
    {"rank", &KvProfile::rank, nullptr, 8, 4096, false, false, false, true},
    {"block", &KvProfile::block, nullptr, 16, 64, false, false, false, true},
    {"anchors", &KvProfile::anchors, nullptr, 0, 16, false, false, false, true},
    {"sinks", &KvProfile::n_sink, nullptr, 0, 4096, false, true, true, true},
    {"recent", &KvProfile::n_recent, nullptr, 1, 65536, false, true, true, true},
}};

/// Fewest bits that still give every model a coordinate to score.
constexpr double kLeastRate = 0.25;

/// Less of the attention would not be an answer.
constexpr double kLeastMass = 0.5;

std::string keys_of(const NamedProfile& profile) {
  std::string list;
  for (const Key& key : kKeys) {
    if (key.fits(profile.kind)) list += (list.empty() ? "" : ", ") + std::string(key.name) + "=";
  }
  return list;
}

Status bad_profile(std::string_view text, const std::string& reason) {
  return {StatusCode::invalid_argument, fmt::format("cache profile {}: {}", quote(text), reason)};
}

double least_of(const Key& key) { return key.real == &KvProfile::mass ? kLeastMass : kLeastRate; }

/// Reads the value of a key into the profile; false if it is not a number in the key's range.
bool parse_number(std::string_view text, const Key& key, KvProfile& profile) {
  const char* end = text.data() + text.size();
  if (key.real != nullptr) {
    double number = 0;
    const auto [stop, error] = std::from_chars(text.data(), end, number, std::chars_format::fixed);
    if (error != std::errc() || stop != end || !(number >= least_of(key)) ||
        number > static_cast<double>(key.high))
      return false;
    profile.*(key.real) = number;
    return true;
  }
  if (key.takes_all && text == "all") {
    profile.*(key.whole) = KvProfile::kBudgetAll;
    return true;
  }
  int64_t number = 0;
  const auto [stop, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc() || stop != end || number < key.low || number > key.high) return false;
  if (key.whole == &KvProfile::block && number != 16 && number != 32 && number != 64) return false;
  if (key.whole == &KvProfile::rank && number % 8 != 0) return false;
  profile.*(key.whole) = number;
  return true;
}

/// What the value of a key may be, for an error sentence.
std::string range_of(const Key& key) {
  if (key.real == &KvProfile::mass) return fmt::format("a share of the attention from {} to 1", kLeastMass);
  if (key.real != nullptr) return fmt::format("a number of bits from {} to {}", kLeastRate, key.high);
  if (key.whole == &KvProfile::block) return "16, 32 or 64";
  return fmt::format("a {} from {} to {}{}", key.whole == &KvProfile::rank ? "multiple of 8" : "whole number",
                     key.low, key.high, key.takes_all ? " or all" : "");
}

/// One `key=value`; `seen` holds a flag for every entry of kKeys.
Status parse_setting(std::string_view text, std::string_view setting, const NamedProfile& named,
                     std::array<bool, kKeys.size()>& seen, KvProfile& profile) {
  const size_t equals = setting.find('=');
  const std::string_view name = setting.substr(0, equals);
  const auto* key = std::find_if(kKeys.begin(), kKeys.end(),
                                 [&](const Key& k) { return k.name == name && k.fits(named.kind); });
  if (key == kKeys.end() || equals == std::string_view::npos) {
    const std::string known = keys_of(named);
    return bad_profile(text, known.empty() ? fmt::format("{} takes no keys", named.name)
                                           : fmt::format("{} is not a setting of {}, which takes {}",
                                                         quote(setting), named.name, known));
  }
  bool& was_seen = seen[static_cast<size_t>(key - kKeys.begin())];
  if (was_seen) return bad_profile(text, fmt::format("{}= is given twice", name));
  was_seen = true;
  const std::string_view value = setting.substr(equals + 1);
  if (!parse_number(value, *key, profile))
    return bad_profile(text, fmt::format("{}= must be {}, not {}", name, range_of(*key), quote(value)));
  return {};
}

}  // namespace

int64_t KvProfile::budget_at(int64_t n_kv) const {
  if (budget == kBudgetAll) return n_kv;
  if (budget == kBudgetAuto && kind == KvKind::klt) return std::max(kBudgetAt4K, n_kv / 12);
  if (budget == kBudgetAuto) return std::max(kBudgetAt4K, n_kv / 8 - n_sink - n_recent);
  return budget;
}

bool KvProfile::layer_is_dense(int64_t layer, int64_t n_layer) const {
  switch (kind) {
    case KvKind::f16:
      return true;
    case KvKind::kivi:
    case KvKind::klt:
      return false;
    case KvKind::sals:
      return layer < 2 || layer == n_layer - 1;
  }
  return true;
}

bool KvProfile::takes_basis() const { return kind == KvKind::klt || kind == KvKind::sals; }

bool KvProfile::is_sparse() const { return kind == KvKind::klt || kind == KvKind::sals; }

Result<KvProfile> KvProfile::parse(std::string_view text) {
  const size_t colon = text.find(':');
  const std::string_view name = text.substr(0, colon);
  const auto* named =
      std::find_if(kProfiles.begin(), kProfiles.end(), [&](const NamedProfile& p) { return p.name == name; });
  if (named == kProfiles.end()) {
    return bad_profile(
        text, fmt::format("there is no {}, choose one of {}", quote(name), fmt::join(names(), ", ")));
  }

  KvProfile profile;
  profile.name = text;
  profile.kind = named->kind;
  profile.key_bits = named->key_bits;
  profile.value_bits = named->value_bits;
  profile.rank_divisor = named->rank_divisor;
  profile.key_rate = named->key_rate;
  profile.value_rate = named->value_rate;
  if (profile.kind == KvKind::klt) profile.mass = kKltMass;
  if (colon == std::string_view::npos) return profile;

  std::array<bool, kKeys.size()> seen = {};
  std::string_view rest = text.substr(colon + 1);
  while (true) {
    const size_t comma = rest.find(',');
    if (Status status = parse_setting(text, rest.substr(0, comma), *named, seen, profile); !status.ok())
      return status;
    if (comma == std::string_view::npos) return profile;
    rest.remove_prefix(comma + 1);
  }
}

std::vector<std::string> KvProfile::names() {
  std::vector<std::string> list;
  list.reserve(kProfiles.size());
  for (const NamedProfile& profile : kProfiles) list.emplace_back(profile.name);
  return list;
}

namespace {

constexpr std::pair<const char*, PrefillAttention> kAttentions[] = {
    {"auto", PrefillAttention::automatic},
    {"f32", PrefillAttention::f32},
    {"bf16", PrefillAttention::bf16},
    {"bf16-shift", PrefillAttention::bf16_shift},
    {"fp16", PrefillAttention::fp16},
    {"pasa", PrefillAttention::pasa},
    {"fp16-shift", PrefillAttention::fp16_shift},
};

}  // namespace

Result<PrefillAttention> parse_attention(std::string_view name) {
  for (const auto& [known, attention] : kAttentions) {
    if (name == known) return attention;
  }
  return Status(StatusCode::invalid_argument, fmt::format("there is no attention {}, choose one of {}",
                                                          quote(name), fmt::join(attention_names(), ", ")));
}

const char* attention_name(PrefillAttention attention) {
  for (const auto& [name, known] : kAttentions) {
    if (known == attention) return name;
  }
  return "";
}

std::vector<std::string> attention_names() {
  std::vector<std::string> names;
  for (const auto& [name, attention] : kAttentions) names.emplace_back(name);
  return names;
}

Result<double> parse_prefill(std::string_view text) {
  constexpr double kSparseMass = 0.95;  // docs/sparse_prefill.md
  constexpr std::string_view kWithMass = "sparse:mass=";
  if (text == "dense") return 1.0;
  if (text == "sparse") return kSparseMass;
  double mass = 0;
  if (text.starts_with(kWithMass)) {
    text.remove_prefix(kWithMass.size());
    const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), mass);
    if (error == std::errc() && stop == text.data() + text.size() && mass > 0 && mass <= 1) return mass;
    return Status(
        StatusCode::invalid_argument,
        fmt::format("the mass of a sparse prefill must be above 0 and at most 1, not {}", quote(text)));
  }
  return Status(StatusCode::invalid_argument,
                fmt::format("there is no prefill {}, choose dense, sparse or sparse:mass=X", quote(text)));
}

}  // namespace narrows
