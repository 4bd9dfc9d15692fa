// x^p and |z| from additions, multiplications, divisions and square roots alone, each rounded on its
// own: the same bits on every machine, where the C libraries' pow and hypot differ.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/float_bits.hpp"
#include "core/platform.hpp"

namespace gradclip {

// log2(x) of a positive normal x, relative error below 4e-16.
GRADCLIP_INLINE double log2_of(double x) {
  const std::uint64_t bits = bit_copy<std::uint64_t>(x);
  int exponent = static_cast<int>(bits >> 52) - 1023;
  double mantissa = bit_copy<double>((bits & 0xfffffffffffffu) | 0x3ff0000000000000u);
  if (mantissa > 0x1.6a09e667f3bcdp0) {  // sqrt(2): keep the logarithm of the mantissa small
    mantissa *= 0.5;
    exponent += 1;
  }
  // log(m) = 2 artanh(f), f = (m - 1) / (m + 1), |f| < 0.172: the terms fall by 0.0295 each.
  const double f = (mantissa - 1.0) / (mantissa + 1.0);
  const double square = f * f;
  double series = 1.0 / 23.0;
  for (int k = 21; k >= 3; k -= 2) series = series * square + 1.0 / k;
  const double log_mantissa = 2.0 * (f + f * (square * series));
  constexpr double kLog2E = 0x1.71547652b82fep0;
  return exponent + log_mantissa * kLog2E;
}

// 2^y, relative error below 4e-16; 0 or infinity where it is beyond float64.
GRADCLIP_INLINE double exp2_of(double y) {
  if (y < -1080.0) return 0.0;
  if (y > 1030.0) return infinity();
  int whole = static_cast<int>(y + (y < 0.0 ? -0.5 : 0.5));
  constexpr double kLn2 = 0x1.62e42fefa39efp-1;
  const double z = (y - whole) * kLn2;  // |z| < 0.347
  constexpr double kInverseFactorials[] = {1.0,
                                           1.0,
                                           1.0 / 2,
                                           1.0 / 6,
                                           1.0 / 24,
                                           1.0 / 120,
                                           1.0 / 720,
                                           1.0 / 5040,
                                           1.0 / 40320,
                                           1.0 / 362880,
                                           1.0 / 3628800,
                                           1.0 / 39916800,
                                           1.0 / 479001600,
                                           1.0 / 6227020800,
                                           1.0 / 87178291200};
  double series = kInverseFactorials[14];
  for (int k = 13; k >= 0; --k) series = series * z + kInverseFactorials[k];
  double scaled = series;
  if (whole > 1000) {
    scaled *= 0x1p1000;
    whole -= 1000;
  } else if (whole < -1000) {
    scaled *= 0x1p-1000;
    whole += 1000;
  }
  return scaled * power_of_two(whole);
}

// x^p of x >= 0 (may be infinite or NaN) and p > 0.
GRADCLIP_INLINE double power(double x, double p) {
  if (!is_finite(x) || x == 0.0 || p == 1.0) return x;
  if (x == 1.0) return 1.0;
  const bool subnormal = x < 0x1p-1022;
  const double log2_x = subnormal ? log2_of(x * 0x1p54) - 54.0 : log2_of(x);
  return exp2_of(p * log2_x);
}

// |re + i im| without overflow or underflow; NaN if either part is NaN, else infinite if one is.
GRADCLIP_INLINE double modulus(double re, double im) {
  const double a = re < 0.0 ? -re : re, b = im < 0.0 ? -im : im;
  if (is_nan(a) || is_nan(b)) return quiet_nan();
  const double large = a > b ? a : b, small = a > b ? b : a;
  if (large == 0.0 || !is_finite(large)) return large;
  // A power of two near 1/large: exact, and the squares are near 1.
  const int biased = static_cast<int>(bit_copy<std::uint64_t>(large) >> 52);
  const int exponent = biased < 24 ? -1000 : biased > 2023 ? 1000 : biased - 1023;
  const double x = large * power_of_two(-exponent), y = small * power_of_two(-exponent);
  return std::sqrt(x * x + y * y) * power_of_two(exponent);
}

}  // namespace gradclip
