// Exact arithmetic to compare with: fixed point, wide enough for every sum of squares.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "core/exact_sum.hpp"

namespace gradclip::test {

// Whether two pairs of value and exponent are the same number (or both NaN).
inline bool same_number(WideValue a, WideValue b) {
  if (std::isnan(a.value) || std::isnan(b.value)) return std::isnan(a.value) && std::isnan(b.value);
  if (a.value == 0.0 || std::isinf(a.value)) return a.value == b.value;
  int a_binary = 0, b_binary = 0;
  const double a_mantissa = std::frexp(a.value, &a_binary);
  const double b_mantissa = std::frexp(b.value, &b_binary);
  return a_mantissa == b_mantissa && a_binary + a.exponent == b_binary + b.exponent;
}

// The place of the leading bit of value * 2^exponent.
inline int leading_bit(WideValue x) { return std::ilogb(x.value) + x.exponent; }

// A non-negative number in digits of 32 bits; the lowest bit is 2^kLowest.
class FixedPoint {
 public:
  static constexpr int kLowest = -6400, kHighest = 6400;

  // Add x, rounded down to a multiple of 2^unit.
  void add(WideValue x, int unit = kLowest) {
    if (x.value == 0.0) return;
    int binary = 0;
    auto mantissa = static_cast<std::uint64_t>(std::ldexp(std::frexp(x.value, &binary), 53));
    int place = binary - 53 + x.exponent;  // of the mantissa's last bit
    if (place < unit) {
      mantissa = unit - place < 53 ? mantissa >> (unit - place) : 0;
      place = unit;
    }
    const auto bit = static_cast<std::size_t>(place - kLowest);
    unsigned __int128 rest = static_cast<unsigned __int128>(mantissa) << (bit % 32);
    for (std::size_t digit = bit / 32; rest != 0; ++digit) {
      rest += digits_[digit];
      digits_[digit] = static_cast<std::uint32_t>(rest);
      rest >>= 32;
    }
  }

  // Rounded to 53 bits, to nearest even; the value is 0 or in [1, 2].
  WideValue rounded() const {
    int top = static_cast<int>(digits_.size()) * 32 - 1;
    while (top >= 0 && !bit(top)) --top;
    if (top < 0) return {0.0, 0};
    std::uint64_t mantissa = 0;
    for (int i = top; i > top - 53; --i) mantissa = mantissa << 1 | bit(i);
    bool below_half = false;
    for (int i = top - 54; i >= 0 && !below_half; --i) below_half = bit(i);
    if (bit(top - 53) && (below_half || mantissa & 1)) ++mantissa;
    return {std::ldexp(static_cast<double>(mantissa), -52), top + kLowest};
  }

 private:
  bool bit(int i) const {
    return i >= 0 && (digits_[static_cast<std::size_t>(i) / 32] >> (i % 32) & 1u);
  }

  std::vector<std::uint32_t> digits_ = std::vector<std::uint32_t>((kHighest - kLowest) / 32);
};

// Steps 4 and 5 of docs/reduction-order.md: every number cut at the lowest of four bins of 32 bits,
// of which the highest holds the leading bit of the largest number; added; rounded once.
inline WideValue add_in_bins(std::span<const WideValue> numbers) {
  bool has_infinity = false;
  int top = FixedPoint::kLowest;
  for (const WideValue& x : numbers) {
    if (std::isnan(x.value)) return x;
    has_infinity = has_infinity || std::isinf(x.value);
    if (std::isfinite(x.value) && x.value != 0.0) top = std::max(top, leading_bit(x));
  }
  if (has_infinity) return {INFINITY, 0};
  const int highest_bin = static_cast<int>(std::floor(top / 32.0));
  FixedPoint sum;
  for (const WideValue& x : numbers)
    sum.add(x, std::max(FixedPoint::kLowest, 32 * (highest_bin - 3)));
  return sum.rounded();
}

}  // namespace gradclip::test
