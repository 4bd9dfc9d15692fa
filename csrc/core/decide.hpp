// The decision of a clip, for one group: one function for host and device.
#pragma once

#include "core/float_bits.hpp"
#include "core/platform.hpp"

namespace gradclip {

// What to do when a norm is infinite or NaN. `raise` and `skip` write nothing.
enum class NonFinite { raise, skip, zero, propagate };

// What is done to the gradients of a call.
enum class Action { nothing, scale, zero };

struct ClipOptions {
  NonFinite nonfinite = NonFinite::raise;
  // What the gradients have been multiplied by; it is divided out as they are written.
  double grad_scale = 1.0;
  // Added to norms: 0 but where another library's formula is to be followed.
  double epsilon = 0.0;
  // What is given for each group is its coefficient, in place of a threshold.
  bool are_coefficients = false;
  // Whether what is written differs from what was read also by a coefficient of 1: it has been added to.
  bool always_changes = false;
  // Of rounding down: how far below the true norm a norm may lie, relative; 0 of rounding to nearest.
  double norm_error = 0.0;
  // Thresholds were made of norms that had been rounded to float32: one that is the rounded norm is the norm.
  bool as_reported = false;

  GRADCLIP_INLINE bool rounds_down() const { return norm_error != 0.0; }
};

// Whether a threshold, or a coefficient, can be used. A threshold of 0 makes everything 0.
GRADCLIP_INLINE bool is_usable(const ClipOptions& options, double limit) {
  return options.are_coefficients ? is_finite(limit) : limit >= 0.0;
}

// A factor that multiplies nothing: every element is set to +0, also where it was not finite.
inline constexpr double kSetToZero = -0.0;
GRADCLIP_INLINE bool sets_to_zero(double factor) {
  return bit_copy<std::uint64_t>(factor) == FloatBits<double>::sign;
}

// What a group of this norm is multiplied by: exactly 1 when nothing is to be clipped.
// A threshold of infinity measures and never clips, whatever the norm.
GRADCLIP_INLINE double clip_coefficient(double norm, double max_norm, double epsilon = 0.0) {
  if (max_norm == infinity()) return 1.0;
  if (is_nan(norm)) return quiet_nan();
  norm += epsilon;
  return norm > max_norm ? max_norm / norm : 1.0;
}

// The same, so that what is written is not above the threshold, exactly: docs/reduction-order.md has the proof.
GRADCLIP_INLINE double clip_coefficient_down(double norm, double max_norm, double norm_error) {
  if (max_norm == infinity()) return 1.0;
  if (is_nan(norm)) return quiet_nan();
  const double bound = norm == 0.0 ? 0.0 : norm * (1.0 + norm_error) + 0x1p-1073;
  if (bound <= max_norm) return 1.0;
  const double coefficient = max_norm / bound;
  return coefficient < 0x1p-1000 ? 0.0
                                 : coefficient;  // quotients that are subnormal are not so exact
}

// What is known of all groups before any is decided.
struct GroupFindings {
  bool any_nonfinite = false;  // a norm
  bool any_unusable = false;   // a threshold, which only a device reads so late: nothing is written
};

struct GroupDecision {
  double coefficient;
  bool clips;
  bool changes;  // memory, which dividing by a scale does, too
};

GRADCLIP_INLINE GroupDecision decide_group(double norm, double limit, const ClipOptions& options,
                                           const GroupFindings& all) {
  if (all.any_unusable) return {quiet_nan(), false, false};
  if (all.any_nonfinite) {
    if (options.nonfinite == NonFinite::raise || options.nonfinite == NonFinite::skip)
      return {1.0, false, false};
    if (options.nonfinite == NonFinite::zero) return {0.0, true, true};
  }
  if (options.as_reported && static_cast<double>(static_cast<float>(norm)) == limit) limit = norm;
  const double coefficient = options.are_coefficients ? limit
                             : options.rounds_down()
                                 ? clip_coefficient_down(norm, limit, options.norm_error)
                                 : clip_coefficient(norm, limit, options.epsilon);
  return {coefficient, coefficient != 1.0,
          options.always_changes || coefficient / options.grad_scale != 1.0};
}

// Where some group `changes`.
GRADCLIP_INLINE Action action_of(const ClipOptions& options, const GroupFindings& all,
                                 bool any_changes) {
  if (!any_changes) return Action::nothing;
  return all.any_nonfinite && options.nonfinite == NonFinite::zero ? Action::zero : Action::scale;
}

}  // namespace gradclip
