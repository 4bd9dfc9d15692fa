// The reduction order: the one place that says in which order a tensor is summed.
// Explained, with the proof of its error bound, in docs/reduction-order.md.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/float_bits.hpp"
#include "core/platform.hpp"

namespace gradclip::order {

inline constexpr std::size_t kBlockBytes = 64;  // 16 float32 terms or 8 float64 terms
inline constexpr std::size_t kBlocksPerRow = 8;
inline constexpr std::size_t kRowBytes = kBlockBytes * kBlocksPerRow;
inline constexpr std::size_t kRowsPerTile = 32;
inline constexpr std::size_t kTileBytes = kRowBytes * kRowsPerTile;

// Terms that the slow path (other p, complex magnitudes) adds one after the other.
inline constexpr std::size_t kTermsPerRun = 32;

// What they multiply elements by where the largest magnitude is `unit`: complex magnitudes that would
// be subnormal keep their bits.
GRADCLIP_INLINE double power_scale(double unit) { return unit < 0x1p-900 ? 0x1p600 : 1.0; }

// Step 2: the blocks of a row, by whatever holds the terms of one block:
// ((b0 + b1) + (b2 + b3)) + ((b4 + b5) + (b6 + b7)). Asked for one after the other, so that memory is
// read by increasing address.
template <class BlockTerms>
GRADCLIP_INLINE auto fold_row(BlockTerms block) {
  const auto b0 = block(0), b1 = block(1), b2 = block(2), b3 = block(3);
  const auto left = (b0 + b1) + (b2 + b3);
  const auto b4 = block(4), b5 = block(5), b6 = block(6), b7 = block(7);
  return left + ((b4 + b5) + (b6 + b7));
}

// Step 3, its end: the accumulators of a tile, halved until one is left.
template <int Lanes>
GRADCLIP_INLINE double fold_lanes(const double (&lanes)[Lanes]) {
  if constexpr (Lanes == 1) {
    return lanes[0];
  } else {
    double half[Lanes / 2];
    for (int i = 0; i < Lanes / 2; ++i) half[i] = lanes[i] + lanes[i + Lanes / 2];
    return fold_lanes(half);
  }
}

// Whether the sum of a tile shows that nothing was lost; else the tile is done again. NaN is not.
GRADCLIP_INLINE bool can_be_trusted(double sum, bool input_is_float64) {
  return sum >= (input_is_float64 ? 0x1p-900 : 0x1p-100) && sum <= 0x1.fffffffffffffp1023;
}

// The k by which a float64 tile is scaled (x * 2^-k) when it is done again, from the pattern of its
// largest magnitude, which is finite and not 0.
GRADCLIP_INLINE int scale_exponent(std::uint64_t largest_bits) {
  const int exponent =
      static_cast<int>(largest_bits >> 52) - 1023;  // of subnormals: clamped anyway
  return exponent < -1000 ? -1000 : exponent > 1000 ? 1000 : exponent;
}

}  // namespace gradclip::order
