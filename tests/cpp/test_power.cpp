// core/power.hpp against long double, within the errors that its comments claim.
#include <cmath>
#include <limits>

#include "core/power.hpp"
#include "support.hpp"

using namespace gradclip;
using namespace gradclip::test;

namespace {

constexpr double kClaimed = 4e-16;
constexpr int kSamples = 50000;

// The relative error of `got`, measured in long double.
double error_of(double got, long double exact) {
  return static_cast<double>(std::fabs((static_cast<long double>(got) - exact) / exact));
}

}  // namespace

TEST_CASE("log2_of") {
  Random random(1);
  double worst = 0.0;
  const auto check = [&](double x) {
    worst = std::max(worst, error_of(log2_of(x), std::log2(static_cast<long double>(x))));
  };
  for (int i = 0; i < kSamples; ++i) {
    check(random_magnitude(random, -1022, 1023));
    check(0.5 + random.unit() * 2);
  }
  // Where the logarithm itself is small, and around the cut at sqrt(2).
  for (int k = 1; k <= 52; ++k) {
    check(1.0 + std::ldexp(1.0, -k));
    check(1.0 - std::ldexp(1.0, -k - 1));
    check(std::sqrt(2.0) * (1.0 + std::ldexp(1.0, -k)));
    check(std::sqrt(2.0) * (1.0 - std::ldexp(1.0, -k)));
  }
  INFO("largest relative error: ", worst);
  CHECK(worst < kClaimed);
  CHECK(log2_of(1.0) == 0.0);
  for (int exponent = -1022; exponent <= 1023; ++exponent)
    CHECK(log2_of(power_of_two(exponent)) == exponent);
}

TEST_CASE("exp2_of") {
  Random random(2);
  double worst = 0.0;
  for (int i = 0; i < kSamples; ++i) {
    for (const double y : {random.unit() * 2044 - 1021, random.unit() * 2 - 1})
      worst = std::max(worst, error_of(exp2_of(y), std::exp2(static_cast<long double>(y))));
  }
  INFO("largest relative error: ", worst);
  CHECK(worst < kClaimed);
  for (int exponent = -1074; exponent <= 1023; ++exponent)
    CHECK(exp2_of(exponent) == std::ldexp(1.0, exponent));
  CHECK(exp2_of(-1080.5) == 0.0);
  CHECK(exp2_of(1024.0) == INFINITY);
  CHECK(exp2_of(-INFINITY) == 0.0);
  CHECK(exp2_of(INFINITY) == INFINITY);
  // Subnormal results are the nearest ones but for the error of the series.
  CHECK(std::fabs(exp2_of(-1060.3) - std::exp2(-1060.3)) <= 0x1p-1074);
}

TEST_CASE("power") {
  Random random(3);
  double worst = 0.0;
  for (int i = 0; i < kSamples; ++i) {
    // As in a norm: (m / M)^p of a ratio up to 1. The error of the logarithm counts |p log2 x| times.
    const double x = random.unit() + 0x1p-54, p = 0.25 + 8 * random.unit();
    const double exponent = std::fabs(p * std::log2(x));
    if (exponent > 1000) continue;
    const long double exact = std::pow(static_cast<long double>(x), static_cast<long double>(p));
    worst = std::max(worst, error_of(power(x, p), exact) / (1.0 + exponent * 0.7));
  }
  INFO("largest relative error: ", worst);
  CHECK(worst < kClaimed + 1.2e-16);  // and the rounding of p * log2(x)
}

TEST_CASE("power at the edges of its range") {
  for (const double p : {0.1, 0.5, 1.0, 2.5, 3.0, 100.0, 1e300}) {
    CHECK(power(0.0, p) == 0.0);
    CHECK(power(1.0, p) == 1.0);
    CHECK(power(INFINITY, p) == INFINITY);
    CHECK(std::isnan(power(NAN, p)));
  }
  CHECK(power(0.9, 1e300) == 0.0);
  CHECK(power(1.1, 1e300) == INFINITY);
  CHECK(power(0x1p-1074, 0.5) == doctest::Approx(0x1p-537).epsilon(1e-12));
  CHECK(power(0x1p-1074, 1.0) == 0x1p-1074);
  CHECK(power(2.0, 10.0) == 1024.0);
}

TEST_CASE("modulus") {
  Random random(4);
  double worst = 0.0;
  const auto check = [&](double re, double im) {
    const long double exact =
        std::hypot(static_cast<long double>(re), static_cast<long double>(im));
    worst = std::max(worst, error_of(modulus(re, im), exact));
  };
  for (int i = 0; i < kSamples; ++i) {
    const double re = random_magnitude(random, -1000, 1020);
    check(re, -re * random.unit());
    check(re * random.unit(), re);
    check(re, random_magnitude(random, -1000, 1020));
  }
  INFO("largest relative error: ", worst);
  CHECK(worst < 3 * 0x1p-53);
  CHECK(modulus(3.0, -4.0) == 5.0);
  CHECK(modulus(0.0, -0.0) == 0.0);
  CHECK(modulus(3 * 0x1p-1074, 4 * 0x1p-1074) == 5 * 0x1p-1074);
  const double largest = std::numeric_limits<double>::max();
  CHECK(modulus(largest, 0.0) == largest);
  CHECK(modulus(largest, largest) == INFINITY);
  CHECK(modulus(-0x1p1023, 0x1p1022) == doctest::Approx(std::hypot(0x1p1023, 0x1p1022)));
}

TEST_CASE("modulus of what is not finite: NaN wins over infinity") {
  CHECK(modulus(INFINITY, 1.0) == INFINITY);
  CHECK(modulus(1.0, -INFINITY) == INFINITY);
  CHECK(std::isnan(modulus(NAN, INFINITY)));
  CHECK(std::isnan(modulus(-INFINITY, NAN)));
  CHECK(std::isnan(modulus(0.0, NAN)));
}
