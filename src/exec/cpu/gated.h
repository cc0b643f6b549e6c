// The gated activation of a feed-forward as a kernel of this CPU.
#pragma once

#include "kernels/ops.h"
#include "model/spec.h"

namespace narrows {

/// y [n] = activation(gate) * up; y may be either.
inline auto gated_by(Activation activation) {
  const kernels::Ops& op = kernels::ops();
  switch (activation) {
    case Activation::gelu:
      return op.geglu;
    case Activation::clamped:
      return op.swiglu_clamped;
    case Activation::silu:
      break;
  }
  return op.swiglu;
}

}  // namespace narrows
