// Inputs for kernels: kinds of values that take different ways through them, and sizes around every
// boundary.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "core/reduction_order.hpp"
#include "support.hpp"

namespace gradclip::test {

enum class Values {
  ordinary,
  huge,         // squares overflow
  tiny,         // squares underflow
  hardly_kept,  // sums on both sides of the one below which a tile is done again
  any_finite,
  zeros,
  one_infinity,
  one_nan,
  any_pattern,
};
inline constexpr Values kAllValues[] = {
    Values::ordinary,     Values::huge,       Values::tiny,
    Values::hardly_kept,  Values::any_finite, Values::zeros,
    Values::one_infinity, Values::one_nan,    Values::any_pattern};

// The exponents of the smallest and the largest numbers of T.
template <class T>
inline constexpr int kLowestExponent = -1074;
template <>
inline constexpr int kLowestExponent<float> = -149;
template <>
inline constexpr int kLowestExponent<Float16> = -24;
template <>
inline constexpr int kLowestExponent<BFloat16> = -133;
template <class T>
inline constexpr int kHighestExponent = 1023;
template <>
inline constexpr int kHighestExponent<float> = 127;
template <>
inline constexpr int kHighestExponent<Float16> = 15;
template <>
inline constexpr int kHighestExponent<BFloat16> = 127;
// Half the exponent of the smallest sum that is trusted; float16 cannot go so low.
template <class T>
inline constexpr int kHardlyKept = sizeof(T) == 8 ? -450 : -50;
template <>
inline constexpr int kHardlyKept<Float16> = -18;

template <class T>
T random_pattern(Random& random, bool finite) {
  for (;;) {
    const auto bits = static_cast<WordOf<T>>(random.bits());
    if (!finite || (bits & kMagnitude<T>) < FloatBits<T>::infinity) return bit_copy<T>(bits);
  }
}

template <class T>
std::vector<T> sample(Values values, std::size_t count, Random& random) {
  const auto between = [&](int low, int high) {
    const double sign = random.bits() % 2 ? -1.0 : 1.0;
    return element<T>(sign * random_magnitude(random, low, high));
  };
  std::vector<T> result(count);
  for (T& x : result) {
    switch (values) {
      case Values::huge: x = between(kHighestExponent<T> - 3, kHighestExponent<T> - 1); break;
      case Values::tiny: x = between(kLowestExponent<T>, kLowestExponent<T> + 12); break;
      case Values::hardly_kept: x = between(kHardlyKept<T> - 6, kHardlyKept<T> + 6); break;
      case Values::any_finite: x = random_pattern<T>(random, true); break;
      case Values::any_pattern: x = random_pattern<T>(random, false); break;
      case Values::zeros: x = element<T>(random.bits() % 2 ? 0.0 : -0.0); break;
      default: x = between(-6, 6);
    }
  }
  if (count == 0) return result;
  if (values == Values::one_infinity) result[random.bits() % count] = element<T>(-INFINITY);
  if (values == Values::one_nan) result[random.bits() % count] = element<T>(-NAN);
  return result;
}

// Numbers of elements of up to one tile: one less and one more than every boundary in it.
template <class T>
std::vector<std::size_t> sizes_in_a_tile() {
  constexpr std::size_t kBlock = order::kBlockBytes / sizeof(T),
                        kRow = order::kRowBytes / sizeof(T), kTile = order::kTileBytes / sizeof(T);
  std::vector<std::size_t> sizes{0, 1, 2, 3};
  for (const std::size_t boundary :
       {kBlock / 4, kBlock / 2, kBlock, 2 * kBlock, 3 * kBlock, 7 * kBlock, kRow, kRow + kBlock,
        2 * kRow, 3 * kRow + 5 * kBlock, kTile - kRow, kTile - kBlock})
    sizes.insert(sizes.end(), {boundary - 1, boundary, boundary + 1});
  sizes.insert(sizes.end(), {kTile - 1, kTile});
  return sizes;
}

// Of the offsets from a multiple of 64 bytes: all, or every third where each access costs more.
inline constexpr std::size_t kOffsetStep = kSanitized ? 3 : 1;

}  // namespace gradclip::test
