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
  switch (real_of(dtype)) {
    case DType::float16: return to_double(Float16{static_cast<std::uint16_t>(bits)});
    case DType::bfloat16: return to_double(BFloat16{static_cast<std::uint16_t>(bits)});
    case DType::float32: return bit_copy<float>(static_cast<std::uint32_t>(bits));
    default: return bit_copy<double>(bits);
  }
}

// The pattern of the largest value of the type that is not above `limit` >= 0.
GRADCLIP_INLINE std::uint64_t pattern_below(DType dtype, double limit) {
  if (real_of(dtype) == DType::float64) return bit_copy<std::uint64_t>(limit);
  const float nearest = static_cast<float>(limit);
  std::uint32_t bits = bit_copy<std::uint32_t>(nearest);
  if (nearest > limit) --bits;
  if (real_of(dtype) == DType::float32) return bits;
  const float below = bit_copy<float>(bits);
  std::uint64_t half =
      real_of(dtype) == DType::float16 ? to_float16(below).bits : to_bfloat16(below).bits;
  if (value_of_pattern(dtype, half) > limit) --half;
  return half;
}

// The pattern of the limit rounded to nearest: to float32 first, as PyTorch's clamp rounds it.
GRADCLIP_INLINE std::uint64_t pattern_nearest(DType dtype, double limit) {
  if (real_of(dtype) == DType::float64) return bit_copy<std::uint64_t>(limit);
  const float nearest = static_cast<float>(limit);
  if (real_of(dtype) == DType::float32) return bit_copy<std::uint32_t>(nearest);
  return real_of(dtype) == DType::float16 ? to_float16(nearest).bits : to_bfloat16(nearest).bits;
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
