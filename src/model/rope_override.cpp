#include "model/rope_override.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace narrows {

namespace {

using Scaling = RopeOverrides::Scaling;

Status in_range(const char* name, double x, double low, double high) {
  if (x >= low && x <= high) return {};
  return {StatusCode::invalid_argument, fmt::format("{} = {} is not between {} and {}", name, x, low, high)};
}

Status check(const RopeOverrides& o) {
  struct Range {
    const char* name;
    double value, unset, low, high;
  };
  const Range all[] = {{"--rope-freq-base", o.freq_base, 0, 1e-3, 1e15},
                       {"--rope-freq-scale", o.freq_scale, 0, 1e-6, 1e6},
                       {"--yarn-orig-ctx", static_cast<double>(o.yarn_orig_ctx), 0, 1, 1e12},
                       {"--yarn-ext-factor", o.yarn_ext_factor, -1, 0, 1e3},
                       {"--yarn-attn-factor", o.yarn_attn_factor, -1, 1e-6, 1e6},
                       {"--yarn-beta-slow", o.yarn_beta_slow, -1, 0, 1e6},
                       {"--yarn-beta-fast", o.yarn_beta_fast, -1, 0, 1e6}};
  for (const Range& r : all) {
    if (r.value == r.unset) continue;
    if (Status s = in_range(r.name, r.value, r.low, r.high); !s.ok()) return s;
  }
  return {};
}

}  // namespace

Status override_rope(const RopeOverrides& o, ModelSpec& spec) {
  if (o == RopeOverrides()) return {};
  if (Status s = check(o); !s.ok()) return s;
  kernels::RopeParams& r = spec.ropes.front();
  if (o.freq_base > 0) r.freq_base = o.freq_base;
  if (o.freq_scale > 0) r.freq_scale = o.freq_scale;
  if (o.yarn_orig_ctx > 0) r.n_ctx_orig = o.yarn_orig_ctx;
  const bool yarn = o.scaling == Scaling::yarn || (o.scaling == Scaling::of_file && r.ext_factor != 0);
  if (o.scaling == Scaling::none) r.freq_scale = 1;
  if (!yarn) r.ext_factor = 0;
  if (yarn && r.ext_factor == 0) r.ext_factor = 1;
  if (o.yarn_ext_factor >= 0) r.ext_factor = o.yarn_ext_factor;
  if (o.yarn_attn_factor >= 0) r.attn_factor *= o.yarn_attn_factor;
  if (o.yarn_beta_slow >= 0) r.beta_slow = o.yarn_beta_slow;
  if (o.yarn_beta_fast >= 0) r.beta_fast = o.yarn_beta_fast;
  if (o.freq_scale > 0 && r.freq_scale < 1) {
    const double grown = static_cast<double>(r.n_ctx_orig) / r.freq_scale;
    spec.n_ctx_train =
        std::max(spec.n_ctx_train,
                 static_cast<int64_t>(std::min(std::round(grown), static_cast<double>(kMaxContext))));
  }
  return {};
}

std::string describe(const RopeOverrides& o) {
  if (o == RopeOverrides()) return {};
  return fmt::format("rope {} {} {} {} {} {} {} {}", static_cast<int>(o.scaling), o.freq_base, o.freq_scale,
                     o.yarn_orig_ctx, o.yarn_ext_factor, o.yarn_attn_factor, o.yarn_beta_slow,
                     o.yarn_beta_fast);
}

}  // namespace narrows
