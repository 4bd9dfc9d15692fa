// What scaling and clipping mean for one element: one definition for every backend.
#pragma once

#include <cstdint>

#include "core/dtype.hpp"
#include "core/float_bits.hpp"
#include "core/platform.hpp"

namespace gradclip {

// Whether 16- and 32-bit elements can be multiplied in float32: the factor must keep its bits.
GRADCLIP_INLINE bool fits_float(double factor) {
  const double size = factor < 0.0 ? -factor : factor;
  return size == 0.0 || !(size < 0x1p-126 || size > 0x1.fffffep127);
}

// --- Products that are never above the exact one, in magnitude -----------------------------------------

// The next number towards zero; of 0 and NaN, itself.
GRADCLIP_INLINE double next_below(double x) {
  return x == 0.0 || is_nan(x) ? x : bit_copy<double>(bit_copy<std::uint64_t>(x) - 1);
}
GRADCLIP_INLINE float next_below(float x) {
  return x == 0.0f || is_nan(x) ? x : bit_copy<float>(bit_copy<std::uint32_t>(x) - 1);
}

// A factor for products that are rounded to nearest: they are not above those by `factor` where they are normal
// numbers, for the factor is smaller by half of a unit in its last place or more.
GRADCLIP_INLINE double factor_below(double factor) {
  return factor < 0x1p-1000 ? 0.0 : next_below(factor);  // as in clip_coefficient_down()
}
GRADCLIP_INLINE float float_factor_below(double factor) {
  const float nearest = static_cast<float>(factor);
  return next_below(nearest > factor ? next_below(nearest) : nearest);
}
// And where they are not: rounded by up to half of the smallest number.
GRADCLIP_INLINE double below_if_subnormal(double x) {
  const double size = x < 0.0 ? -x : x;
  return size < 0x1p-1022 ? next_below(x) : x;
}
GRADCLIP_INLINE float below_if_subnormal(float x) {
  const float size = x < 0.0f ? -x : x;
  return size < 0x1p-126f ? next_below(x) : x;
}

// By a factor_below().
template <class T>
GRADCLIP_INLINE T scaled_down(T x, float factor) {
  T result;
  truncate_to(below_if_subnormal(to_float(x) * factor), result);
  return result;
}
GRADCLIP_INLINE double scaled_down(double x, double factor) {
  const double product = x * factor;
  if (!is_finite(product) && is_finite(x)) return next_below(product);  // it was too large
  return below_if_subnormal(product);
}
// Towards zero.
GRADCLIP_INLINE void truncate_from(double x, double& to) { to = x; }
template <class T>
GRADCLIP_INLINE void truncate_from(double x, T& to) {
  const float nearest = static_cast<float>(x);
  const bool above = nearest < 0.0f ? nearest < x : nearest > x;
  truncate_to(above ? next_below(nearest) : nearest, to);
}
template <class T>
GRADCLIP_INLINE T scaled_down(T x, double factor) {
  T result;
  truncate_from(scaled_down(to_double(x), factor), result);
  return result;
}

// The value of a magnitude's bit pattern.
GRADCLIP_INLINE double value_of_pattern(DType dtype, std::uint64_t bits) {
  return visit_real_type(dtype, [=](auto type) {
    using T = decltype(type);
    return to_double(bit_copy<T>(static_cast<typename FloatBits<T>::Word>(bits)));
  });
}

// The pattern of the limit rounded to nearest: to float32 first, as PyTorch's clamp rounds it.
GRADCLIP_INLINE std::uint64_t pattern_nearest(DType dtype, double limit) {
  return visit_real_type(dtype, [=](auto rounded) -> std::uint64_t {
    if constexpr (sizeof(rounded) == sizeof(double))
      rounded = limit;
    else
      round_to(static_cast<float>(limit), rounded);
    return bit_copy<typename FloatBits<decltype(rounded)>::Word>(rounded);
  });
}

// The pattern of the largest value of the type that is not above `limit` >= 0.
GRADCLIP_INLINE std::uint64_t pattern_below(DType dtype, double limit) {
  const std::uint64_t nearest = pattern_nearest(dtype, limit);
  return value_of_pattern(dtype, nearest) > limit ? nearest - 1 : nearest;
}

// What a clip by value clips to: a number that is not negative, rounded to the type of each tensor.
struct ValueLimit {
  double value;
  bool to_nearest = false;  // else towards zero: no element is beyond the number afterwards

  GRADCLIP_INLINE std::uint64_t pattern(DType dtype) const {
    return to_nearest ? pattern_nearest(dtype, value) : pattern_below(dtype, value);
  }
};

}  // namespace gradclip
