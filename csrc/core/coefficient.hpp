// The clip coefficient: one function for host and device.
#pragma once

#include "core/float_bits.hpp"
#include "core/platform.hpp"

namespace gradclip {

// What to do when a norm is infinite or NaN. `raise` and `skip` write nothing.
enum class NonFinite { raise, skip, zero, propagate };

// What a group of this norm is multiplied by: exactly 1 when nothing is to be clipped.
// A threshold of infinity measures and never clips, whatever the norm. `epsilon` is added to the norm: 0
// but where another library's formula is to be followed.
GRADCLIP_INLINE double clip_coefficient(double norm, double max_norm, double epsilon = 0.0) {
  if (max_norm == infinity()) return 1.0;
  if (is_nan(norm)) return quiet_nan();
  norm += epsilon;
  return norm > max_norm ? max_norm / norm : 1.0;
}
// A threshold of 0 makes everything 0.
GRADCLIP_INLINE bool is_threshold(double max_norm) { return max_norm >= 0.0; }

}  // namespace gradclip
