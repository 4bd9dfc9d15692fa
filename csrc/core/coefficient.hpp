// The clip coefficient: one function for host and device.
#pragma once

#include "core/float_bits.hpp"
#include "core/platform.hpp"

namespace gradclip {

// What to do when a norm is infinite or NaN. `raise` and `skip` write nothing.
enum class NonFinite { raise, skip, zero, propagate };

// What a group of this norm is multiplied by: exactly 1 when nothing is to be clipped.
// A threshold of infinity measures and never clips, whatever the norm.
GRADCLIP_INLINE double clip_coefficient(double norm, double max_norm) {
  if (max_norm == infinity()) return 1.0;
  if (is_nan(norm)) return quiet_nan();
  return norm > max_norm ? max_norm / norm : 1.0;
}

}  // namespace gradclip
