// Sums as 32-bit words: value, exponent (of 64 bits) and unit. A framework can hand them on, whatever floats it has, and
// an all-reduce of integers adds them to zeros.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/norm.hpp"

namespace gradclip {

inline constexpr std::size_t kSumWords = 6;

GRADCLIP_INLINE void store_sum(const NormSum& sum, std::uint32_t* words) {
  const std::int64_t exponent = sum.exponent;
  std::memcpy(words, &sum.value, 8);
  std::memcpy(words + 2, &exponent, 8);
  std::memcpy(words + 4, &sum.unit, 8);
}
GRADCLIP_INLINE NormSum load_sum(const std::uint32_t* words) {
  NormSum sum;
  std::int64_t exponent = 0;
  std::memcpy(&sum.value, words, 8);
  std::memcpy(&exponent, words + 2, 8);
  std::memcpy(&sum.unit, words + 4, 8);
  sum.exponent = static_cast<int>(exponent);
  return sum;
}

}  // namespace gradclip
