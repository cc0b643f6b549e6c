// Profiles behind `--kv NAME[:key=value,...]`: one table of names, one of keys, and a parser that reads any
// bytes without harm. A wrong name, key or number is answered with the list of what exists.
#include "narrows/config.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <optional>

#include "base/utf8.h"

namespace narrows {
namespace {

struct NamedProfile {
  std::string_view name;
  KvKind kind;
  int key_bits;
  int value_bits;
  int rank_divisor;
};

/// By stored bits of a compressed layer, scales included: 16+16, 5+5, 4+5, 3+3, 2+3 (DESIGN.md).
constexpr std::array<NamedProfile, 5> kProfiles = {{
    {"f16", KvKind::f16, 16, 16, 1},
    {"kivi-4", KvKind::kivi, 4, 4, 1},
    {"sals-25", KvKind::sals, 16, 4, 4},
    {"kivi-2", KvKind::kivi, 2, 2, 1},
    {"sals-12.5", KvKind::sals, 16, 2, 8},
}};

struct Key {
  std::string_view name;
  int64_t KvProfile::*member;
  int64_t low;
  int64_t high;
  bool takes_all;  ///< "all" is a value too
  bool for_kivi;
  bool for_sals;

  bool fits(KvKind kind) const {
    return (kind == KvKind::kivi && for_kivi) || (kind == KvKind::sals && for_sals);
  }
};

constexpr std::array<Key, 3> kKeys = {{
    {"budget", &KvProfile::budget, 1, 1'000'000'000, true, false, true},
    {"sinks", &KvProfile::n_sink, 0, 4096, false, true, true},
    {"recent", &KvProfile::n_recent, 1, 65536, false, true, true},
}};

/// Tokens that SALS selects at 4K, beside 16 sinks and 64 recent ones (arXiv:2510.24273).
constexpr int64_t kBudgetAt4K = 432;

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

std::optional<int64_t> parse_number(std::string_view text, const Key& key) {
  if (key.takes_all && text == "all") return KvProfile::kBudgetAll;
  int64_t number = 0;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc() || stop != end || number < key.low || number > key.high) return std::nullopt;
  return number;
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
  const std::optional<int64_t> number = parse_number(value, *key);
  if (!number) {
    return bad_profile(text, fmt::format("{}= must be a whole number from {} to {}{}, not {}", name, key->low,
                                         key->high, key->takes_all ? " or all" : "", quote(value)));
  }
  profile.*(key->member) = *number;
  return {};
}

}  // namespace

int64_t KvProfile::budget_at(int64_t n_kv) const {
  if (budget == kBudgetAll) return n_kv;
  if (budget == kBudgetAuto) return std::max(kBudgetAt4K, n_kv / 8 - n_sink - n_recent);
  return budget;
}

bool KvProfile::layer_is_dense(int64_t layer, int64_t n_layer) const {
  switch (kind) {
    case KvKind::f16:
      return true;
    case KvKind::kivi:
      return false;
    case KvKind::sals:
      return layer < 2 || layer == n_layer - 1;
  }
  return true;
}

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

}  // namespace narrows
