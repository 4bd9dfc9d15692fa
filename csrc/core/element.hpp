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
