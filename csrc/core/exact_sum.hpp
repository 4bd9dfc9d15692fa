// The sum of non-negative float64 values, added exactly as integers and rounded once.
//
// Integer addition is associative, so the order of the additions cannot change the result: steps 4
// and 5 of docs/reduction-order.md. A value is cut at multiples of 2^32 of a fixed grid; the four
// highest bins that have been touched are kept.
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>

#include "core/float_bits.hpp"
#include "core/platform.hpp"

namespace gradclip {

// value * 2^exponent: a sum of squares of float64 elements can be beyond float64.
struct WideValue {
  double value = 0.0;
  int exponent = 0;
};

// Places of 64-bit words that processes add as integers, in any order: word w counts units of 2^(32 (lowest + w)).
// Two more count NaNs and infinities.
struct WordGrid {
  int lowest, highest;
  constexpr std::size_t words() const { return static_cast<std::size_t>(highest - lowest) + 3; }
};
// Of tile sums of 16 and 32 bits, 2^-298 to 2^270 with all that a norm adds up; and of everything.
inline constexpr WordGrid kNarrowGrid{-12, 9}, kWideGrid{-70, 66};

class ExactSum {
 public:
  // Add |value| * 2^exponent. At most 2^32 additions.
  GRADCLIP_INLINE void add(double value, int exponent = 0) {
    // The sign can be set where there is nothing negative: -0, and the NaN that x86 makes itself.
    std::uint64_t bits = bit_copy<std::uint64_t>(value) & ~FloatBits<double>::sign;
    int biased = static_cast<int>(bits >> 52);
    if (biased == 0) {
      if (bits == 0) return;
      // Subnormal: 2^54 times as large it is a normal number.
      bits = bit_copy<std::uint64_t>(bit_copy<double>(bits) * 0x1p54);
      biased = static_cast<int>(bits >> 52) - 54;
    } else if (biased == 0x7ff) {
      has_nan_ |= is_nan(value);
      has_infinity_ |= !is_nan(value);
      return;
    }
    const std::uint64_t mantissa = (bits & 0xfffffffffffffu) | 0x10000000000000u;
    const int leading = biased - 1023 + exponent;  // the place of the leading bit
    const int grid = leading >> 5, offset = leading & 31;
    if (grid > top_) raise_top(grid);
    const std::uint64_t low = mantissa << (12 + offset);  // what reaches below the first bin
    add_piece(top_ - grid, mantissa >> (52 - offset));
    add_piece(top_ - grid + 1, low >> 32);
    add_piece(top_ - grid + 2, low & 0xffffffffu);
  }
  GRADCLIP_INLINE void add(WideValue x) { add(x.value, x.exponent); }

  GRADCLIP_INLINE void add(const ExactSum& other) {
    has_nan_ |= other.has_nan_;
    has_infinity_ |= other.has_infinity_;
    if (other.top_ == kEmpty) return;
    if (other.top_ > top_) raise_top(other.top_);
    for (int i = 0; i < kBins; ++i) add_piece(top_ - other.top_ + i, other.bins_[i]);
  }

  // Onto words that are 0; and from the sums of the words of many processes: what one of them would have that had
  // added everything.
  void store(const WordGrid& grid, std::int64_t* words) const {
    std::int64_t* const counts = words + grid.words() - 2;
    counts[0] = has_nan_;
    counts[1] = has_infinity_;
    for (int i = 0; i < kBins; ++i)
      if (top_ - i >= grid.lowest)
        words[top_ - i - grid.lowest] = static_cast<std::int64_t>(bins_[i]);
  }
  static ExactSum load(const WordGrid& grid, const std::int64_t* words) {
    const std::int64_t* const counts = words + grid.words() - 2;
    ExactSum sum;
    sum.has_nan_ = counts[0] != 0;
    sum.has_infinity_ = counts[1] != 0;
    int top = grid.highest;
    while (top >= grid.lowest && words[top - grid.lowest] == 0) --top;
    if (top < grid.lowest) return sum;
    sum.top_ = top;
    for (int i = 0; i < kBins && top - i >= grid.lowest; ++i)
      sum.bins_[i] = static_cast<std::uint64_t>(words[top - i - grid.lowest]);
    return sum;
  }

  // The sum, rounded to nearest even; its value is 0, infinite, NaN, or in [1, 2].
  GRADCLIP_INLINE WideValue rounded() const {
    if (has_nan_) return {quiet_nan(), 0};
    if (has_infinity_) return {infinity(), 0};
    if (top_ == kEmpty) return {0.0, 0};
    const std::uint64_t b3 = bins_[3];
    const std::uint64_t b2 = bins_[2] + (b3 >> 32);
    const std::uint64_t b1 = bins_[1] + (b2 >> 32);
    const std::uint64_t high = bins_[0] + (b1 >> 32);  // in units of 2^(32 top); never 0
    const std::uint64_t middle = (b1 << 32) | (b2 & 0xffffffffu);
    const int shift = leading_zeros(high);
    std::uint64_t word = high << shift;
    if (shift != 0) word |= middle >> (64 - shift);
    // Bits below the word only matter as "not exactly half": one sticky bit.
    if ((middle << shift) != 0 || (b3 & 0xffffffffu) != 0) word |= 1;
    return {static_cast<double>(word) * 0x1p-63, 32 * top_ - shift + 63};
  }

 private:
  static constexpr int kBins = 4;
  static constexpr int kEmpty = INT_MIN / 2;

  GRADCLIP_INLINE static int leading_zeros(std::uint64_t word) {
#if defined(__CUDA_ARCH__)
    return __clzll(static_cast<long long>(word));
#else
    return __builtin_clzll(word);
#endif
  }
  GRADCLIP_INLINE void add_piece(int bin, std::uint64_t piece) {
    if (bin < kBins) bins_[bin] += piece;
  }
  GRADCLIP_INLINE void raise_top(int grid) {
    const int by = top_ == kEmpty ? kBins : grid - top_;
    for (int i = kBins - 1; i >= 0; --i) bins_[i] = i >= by ? bins_[i - by] : 0;
    top_ = grid;
  }

  std::uint64_t bins_[kBins] = {};  // highest first; no carries until the end
  std::int32_t top_ = kEmpty;       // bins_[0] counts units of 2^(32 top)
  bool has_nan_ = false, has_infinity_ = false;
};

// x as one float64: 0 or infinity where it is beyond.
GRADCLIP_INLINE double narrow(WideValue x) {
  if (x.value == 0.0 || !is_finite(x.value)) return x.value;
  if (x.exponent > 2200) return infinity();
  if (x.exponent < -2200) return 0.0;
  // Two or three exact steps, and one that rounds: a subnormal result must not be rounded twice.
  while (x.exponent > 1000) x = {x.value * power_of_two(1000), x.exponent - 1000};
  if (x.exponent < -1022) {
    const int rest = x.exponent + 1022;
    return x.value * power_of_two(-1022) * power_of_two(rest < -1022 ? -1022 : rest);
  }
  return x.value * power_of_two(x.exponent);
}

}  // namespace gradclip
