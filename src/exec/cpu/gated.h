// The gated activation of a feed-forward as a kernel of this CPU.
#pragma once

#include "kernels/ops.h"
#include "model/spec.h"

namespace narrows {

/// y [n] = activation(gate) * up; y may be either.
inline auto gated_by(Activation activation) {
  return activation == Activation::gelu ? kernels::ops().geglu : kernels::ops().swiglu;
}

}  // namespace narrows
