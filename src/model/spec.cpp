#include "model/spec.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

#include "base/utf8.h"
#include "model/arch/architecture.h"

namespace narrows {

float AttentionSpec::query_factor(int64_t position) const {
  return static_cast<float>(1 + temperature * std::log(static_cast<double>(position / temperature_step) + 1));
}

const AttentionSpec& ModelSpec::attention() const {
  const auto attends = [](const LayerSpec& l) { return !l.delta_net; };
  return std::find_if(layers.begin(), layers.end(), attends)->attention;
}

int64_t ModelSpec::n_recurrent() const {
  return std::count_if(layers.begin(), layers.end(),
                       [](const LayerSpec& l) { return static_cast<bool>(l.delta_net); });
}

int64_t ModelSpec::most_width_q() const {
  int64_t most = 0;
  for (const LayerSpec& l : layers) most = std::max(most, l.attention.width_q());
  return most;
}

int64_t ModelSpec::most_width_kv() const {
  int64_t most = 0;
  for (const LayerSpec& l : layers) most = std::max(most, l.attention.width_kv());
  return most;
}

int64_t ModelSpec::most_ff() const {
  int64_t most = 0;
  for (const LayerSpec& l : layers) most = std::max(most, l.ffn.n_ff);
  return most;
}

std::vector<kernels::RopeTable> rope_tables(const ModelSpec& spec, int64_t n_ctx) {
  std::vector<kernels::RopeTable> tables;
  for (kernels::RopeParams r : spec.ropes) {
    if (!r.long_factors.empty() && n_ctx > r.n_ctx_orig) r.freq_factors = r.long_factors;
    tables.emplace_back(r, n_ctx);
  }
  return tables;
}

const std::vector<std::string>& supported_architectures() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all;
    for (const Architecture* a : architectures()) all.emplace_back(a->name);
    return all;
  }();
  return names;
}

Result<ModelSpec> read_spec(const GgufFile& file) {
  ModelSpec spec;
  Result<std::optional<std::string>> arch = file.text("general.architecture");
  if (!arch.ok()) return arch.status();
  if (!arch->has_value()) {
    return Status(StatusCode::invalid_file,
                  fmt::format("{}: metadata general.architecture is missing", file.path()));
  }
  spec.architecture = **arch;
  const auto all = architectures();
  const auto family = std::find_if(all.begin(), all.end(),
                                   [&](const Architecture* a) { return spec.architecture == a->name; });
  if (family == all.end()) {
    return Status(StatusCode::unsupported,
                  fmt::format("{}: architecture {} is not supported, this build runs {}", file.path(),
                              quote(spec.architecture), fmt::join(supported_architectures(), ", ")));
  }
  Result<std::optional<std::string>> name = file.text("general.name");
  if (!name.ok()) return name.status();
  spec.name = name->value_or("");
  KeyReader keys(file, spec.architecture + ".");
  if (Status s = (*family)->read(keys, spec); !s.ok()) return s;
  if (!keys.status().ok()) return keys.status();
  if (spec.n_recurrent() == spec.n_layer())
    return keys.unsupported("no layer attends, which this build cannot do without");
  return spec;
}

}  // namespace narrows
