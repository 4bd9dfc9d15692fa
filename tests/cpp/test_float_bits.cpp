// core/float_bits.hpp against arithmetic in float64, where every step is exact.
#include <cmath>
#include <limits>

#include "support.hpp"

using namespace gradclip;
using namespace gradclip::test;

namespace {

// A 16-bit format: 1 + fraction bits of precision, and the exponent of its smallest normal number.
template <class Half>
struct Format;
template <>
struct Format<Float16> {
  static constexpr int fraction = 10, lowest = -14;
  static Float16 round(float x) { return to_float16(x); }
};
template <>
struct Format<BFloat16> {
  static constexpr int fraction = 7, lowest = -126;
  static BFloat16 round(float x) { return to_bfloat16(x); }
};

template <class Half>
double value_of(std::uint16_t bits) {
  using F = Format<Half>;
  const int biased = (bits & 0x7fff) >> F::fraction, fraction = bits & ((1 << F::fraction) - 1);
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if ((bits & 0x7fff) >= FloatBits<Half>::infinity) return fraction ? NAN : sign * INFINITY;
  if (biased == 0) return sign * std::ldexp(fraction, F::lowest - F::fraction);
  return sign * std::ldexp((1 << F::fraction) + fraction, F::lowest - F::fraction + biased - 1);
}

// x to the nearest number of the format, to even, by float64's own rounding to an integer.
template <class Half>
double nearest(float x) {
  using F = Format<Half>;
  if (x == 0.0f || !std::isfinite(x)) return x;
  const int unit = std::max(std::ilogb(x), F::lowest) - F::fraction;
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(x, -unit)), unit);
  const double largest = value_of<Half>(FloatBits<Half>::infinity - 1);
  return std::fabs(rounded) > largest ? std::copysign(INFINITY, rounded) : rounded;
}

bool same_value(double a, double b) {
  return a == b ? std::signbit(a) == std::signbit(b) : std::isnan(a) && std::isnan(b);
}

template <class Half>
void check_rounding(float x) {
  const double got = value_of<Half>(Format<Half>::round(x).bits), want = nearest<Half>(x);
  if (!same_value(got, want)) {
    CAPTURE(x);
    CAPTURE(got);
    CAPTURE(want);
    FAIL_CHECK("rounded to the wrong number");
  }
}

}  // namespace

TEST_CASE_TEMPLATE("all 65536 patterns convert exactly and back", Half, Float16, BFloat16) {
  for (std::uint32_t pattern = 0; pattern < 0x10000; ++pattern) {
    const auto bits = static_cast<std::uint16_t>(pattern);
    CAPTURE(bits);
    const float wide = to_float(Half{bits});
    const bool same = same_value(wide, value_of<Half>(bits)) &&
                      same_value(to_double(Half{bits}), value_of<Half>(bits));
    if (!same) FAIL_CHECK("not the value of the pattern");
    // A NaN keeps its sign and payload, and becomes quiet.
    constexpr std::uint16_t kQuiet = 1 << (Format<Half>::fraction - 1);
    const std::uint16_t back = std::isnan(wide) ? bits | kQuiet : bits;
    if (Format<Half>::round(wide).bits != back) FAIL_CHECK("not the same pattern again");
  }
}

TEST_CASE_TEMPLATE("rounding at, below and above every number and every tie", Half, Float16,
                   BFloat16) {
  for (std::uint32_t pattern = 0; pattern < FloatBits<Half>::infinity; ++pattern) {
    const double here = value_of<Half>(static_cast<std::uint16_t>(pattern));
    const double next = here + std::ldexp(1.0, std::max(std::ilogb(here), Format<Half>::lowest) -
                                                   Format<Half>::fraction);
    for (const double value : {here, (here + next) / 2}) {
      const auto x = static_cast<float>(value);
      for (const float y : {std::nextafter(x, -INFINITY), x, std::nextafter(x, INFINITY)}) {
        check_rounding<Half>(y);
        check_rounding<Half>(-y);
      }
    }
  }
}

TEST_CASE_TEMPLATE("rounding of random float32 patterns and of the extremes", Half, Float16,
                   BFloat16) {
  using Limits = std::numeric_limits<float>;
  for (const float x : {Limits::max(), Limits::min(), Limits::denorm_min(), Limits::infinity(),
                        Limits::quiet_NaN(), 65504.0f, 65519.996f, 65520.0f, 0x1p-24f, 0x1p-25f}) {
    check_rounding<Half>(x);
    check_rounding<Half>(-x);
  }
  Random random(1);
  for (int i = 0; i < 200000; ++i)
    check_rounding<Half>(bit_copy<float>(static_cast<std::uint32_t>(random.bits())));
}

TEST_CASE_TEMPLATE("patterns without their sign are ordered as magnitudes", T, GRADCLIP_ALL_TYPES) {
  const auto pattern = [](double x) { return bit_copy<WordOf<T>>(element<T>(x)) & kMagnitude<T>; };
  double below = 0.0;
  for (const double x : {0x1p-24, 0x1p-14, 0.5, 1.0, 1.5, 65504.0, double(INFINITY)}) {
    CHECK(pattern(below) < pattern(x));
    CHECK(pattern(x) == pattern(-x));
    below = x;
  }
  CHECK(pattern(INFINITY) == FloatBits<T>::infinity);
  CHECK(pattern(NAN) > FloatBits<T>::infinity);
  CHECK(pattern(-0.0) == 0);
}

TEST_CASE("constants and classes of float64") {
  for (int exponent = -1022; exponent <= 1023; ++exponent)
    if (power_of_two(exponent) != std::ldexp(1.0, exponent)) FAIL_CHECK(exponent);
  CHECK(std::isnan(quiet_nan()));
  CHECK(infinity() == INFINITY);
  for (const double x : {0.0, -1.0, 0x1p-1074, std::numeric_limits<double>::max()}) {
    CHECK(is_finite(x));
    CHECK_FALSE(is_nan(x));
  }
  for (const double x : {double(INFINITY), -double(INFINITY), double(NAN)}) {
    CHECK_FALSE(is_finite(x));
    CHECK(is_nan(x) == std::isnan(x));
  }
}
