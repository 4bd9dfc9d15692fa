// core/exact_sum.hpp against fixed-point arithmetic of 12800 bits.
#include <algorithm>
#include <cmath>
#include <vector>

#include "exact.hpp"
#include "support.hpp"

using namespace gradclip;
using namespace gradclip::test;

namespace {

WideValue sum_of(std::span<const WideValue> numbers) {
  ExactSum sum;
  for (const WideValue& x : numbers) sum.add(x);
  return sum.rounded();
}

WideValue exact_sum_of(std::span<const WideValue> numbers) {
  FixedPoint sum;
  for (const WideValue& x : numbers) sum.add(x);
  return sum.rounded();
}

// Numbers with leading bits from 2^low to 2^high; exponents apart where `wide`.
std::vector<WideValue> random_numbers(Random& random, std::int64_t count, int low, int high,
                                      bool wide = false) {
  std::vector<WideValue> numbers;
  for (std::int64_t i = 0; i < count; ++i) {
    const int apart = wide ? static_cast<int>(random.between(-1800, 1800)) : 0;
    numbers.push_back({random_magnitude(random, low, high), apart});
  }
  return numbers;
}

void check_same(WideValue got, WideValue want) {
  CAPTURE(got.value);
  CAPTURE(got.exponent);
  CAPTURE(want.value);
  CAPTURE(want.exponent);
  CHECK(same_number(got, want));
}

}  // namespace

TEST_CASE("numbers of similar size are added exactly and rounded once") {
  // 97 bits below the largest leading bit survive whatever the grid: 53 of a mantissa, 44 between.
  Random random(1);
  for (int trial = 0; trial < 300; ++trial) {
    const int low = static_cast<int>(random.between(-1022, 970));
    const auto numbers = random_numbers(random, random.between(1, 200), low, low + 43);
    check_same(sum_of(numbers), exact_sum_of(numbers));
  }
}

TEST_CASE("numbers of any size are cut at the bins that the document describes") {
  Random random(2);
  for (int trial = 0; trial < 300; ++trial) {
    const bool wide = trial % 2 == 0;
    const auto numbers = random_numbers(random, random.between(1, 60), -1022, 1023, wide);
    check_same(sum_of(numbers), add_in_bins(numbers));
  }
}

TEST_CASE("the order of additions and how they are spread over partial sums do not matter") {
  Random random(4);
  for (int trial = 0; trial < 200; ++trial) {
    auto numbers = random_numbers(random, random.between(1, 200), -300, 300, trial % 2 == 0);
    const WideValue forward = sum_of(numbers);
    random.shuffle(numbers);
    check_same(sum_of(numbers), forward);

    std::vector<ExactSum> partials(static_cast<std::size_t>(random.between(1, 8)));
    for (const WideValue& x : numbers) partials[random.bits() % partials.size()].add(x);
    random.shuffle(partials);
    ExactSum merged;
    for (const ExactSum& partial : partials) merged.add(partial);
    check_same(merged.rounded(), forward);
  }
}

TEST_CASE("rounding is to nearest, ties to even, and sees the last of the kept bits") {
  const double ulp = 0x1p-52, half = 0x1p-53;
  const auto rounded = [](std::vector<WideValue> numbers) { return sum_of(numbers); };
  check_same(rounded({{1.0, 0}, {half, 0}}), {1.0, 0});
  check_same(rounded({{1.0 + ulp, 0}, {half, 0}}), {1.0 + 2 * ulp, 0});
  check_same(rounded({{1.0, 0}, {half, 0}, {0x1p-90, 0}}), {1.0 + ulp, 0});
  check_same(rounded({{1.0, 0}, {0x1.fffffffffffffp-54, 0}, {0x1p-107, 0}}), {1.0, 0});
  // A carry out of the mantissa.
  check_same(rounded({{0x1.fffffffffffffp0, 0}, {half, 0}}), {2.0, 0});
  // The same at every place of the grid, where the kept bits end elsewhere.
  for (int place = -70; place <= 70; ++place) {
    CAPTURE(place);
    check_same(rounded({{1.0, place}, {half, place}, {0x1p-96, place}}), {1.0 + ulp, place});
    check_same(rounded({{1.0 + ulp, place}, {half, place}}), {1.0 + 2 * ulp, place});
  }
}

TEST_CASE("subnormal numbers") {
  Random random(5);
  std::vector<WideValue> numbers;
  for (int i = 0; i < 1000; ++i)
    numbers.push_back({bit_copy<double>(random.bits() >> random.between(12, 63)), 0});
  check_same(sum_of(numbers), exact_sum_of(numbers));
  check_same(sum_of(std::vector<WideValue>{{0x1p-1074, -1000}}), {1.0, -2074});
}

TEST_CASE("a million of the largest pieces do not overflow a bin") {
  // All bits of the mantissa set, at a place where the top piece is as large as it can be.
  const int additions = 1 << 20;
  for (const int place : {30, 31, 32}) {
    const double x = std::ldexp(0x1.fffffffffffffp0, place);
    ExactSum sum;
    for (int i = 0; i < additions; ++i) sum.add(x);
    check_same(sum.rounded(), {x, 20});
    // Each merge doubles it, up to the 2^32 additions that are promised.
    for (int doubling = 0; doubling < 12; ++doubling) sum.add(ExactSum(sum));
    check_same(sum.rounded(), {x, 32});
  }
}

TEST_CASE("infinity and NaN are kept, whatever comes before, after, or in another partial sum") {
  const auto with = [](double a, double b) {
    ExactSum left, right;
    left.add(1.0);
    left.add(a);
    right.add(b);
    right.add(2.0);
    left.add(right);
    return left.rounded().value;
  };
  CHECK(with(INFINITY, 0.0) == INFINITY);
  CHECK(with(0.0, INFINITY) == INFINITY);
  CHECK(with(INFINITY, INFINITY) == INFINITY);
  CHECK(std::isnan(with(NAN, 0.0)));
  CHECK(std::isnan(with(0.0, -NAN)));
  CHECK(std::isnan(with(INFINITY, NAN)));
  CHECK(std::isnan(with(NAN, INFINITY)));
}

TEST_CASE("an empty sum, and one of zeros, is zero") {
  ExactSum sum;
  CHECK(sum.rounded().value == 0.0);
  sum.add(0.0);
  sum.add(ExactSum());
  CHECK(sum.rounded().value == 0.0);
  sum.add(3.0);
  sum.add(ExactSum());
  check_same(sum.rounded(), {3.0, 0});
}

TEST_CASE("processes that add words have the sum of one that adds everything") {
  Random random(7);
  for (int trial = 0; trial < 300; ++trial) {
    const bool wide = trial % 2 == 0;
    const WordGrid& grid = wide ? kWideGrid : kNarrowGrid;
    auto numbers =
        random_numbers(random, random.between(0, 60), wide ? -1022 : -298, wide ? 1023 : 269);
    if (wide)
      for (WideValue& x : numbers) x.exponent = static_cast<int>(random.between(-1100, 1030));
    const WideValue expected = sum_of(numbers);
    if (trial % 5 == 1) numbers.push_back({trial % 10 == 1 ? INFINITY : NAN, 0});
    std::vector<ExactSum> processes(static_cast<std::size_t>(random.between(1, 8)));
    for (const WideValue& x : numbers) processes[random.bits() % processes.size()].add(x);
    std::vector<std::int64_t> words(grid.words());
    for (const ExactSum& process : processes) {
      std::vector<std::int64_t> own(grid.words());
      process.store(grid, own.data());
      for (std::size_t w = 0; w < own.size(); ++w) words[w] += own[w];
    }
    const WideValue sum = ExactSum::load(grid, words.data()).rounded();
    if (trial % 5 == 1)
      CHECK(!std::isfinite(sum.value));
    else
      check_same(sum, expected);
  }
}

TEST_CASE("narrow rounds once, also to subnormal numbers") {
  Random random(6);
  for (int exponent = -2400; exponent <= 1200; ++exponent) {
    for (int trial = 0; trial < 20; ++trial) {
      const double value = 1.0 + random.unit();
      CAPTURE(value);
      CAPTURE(exponent);
      CHECK(narrow({value, exponent}) == std::ldexp(value, exponent));
    }
  }
  // Ties between subnormal numbers, and a value above half of the smallest one.
  CHECK(narrow({1.5, -1074}) == 0x1p-1073);
  CHECK(narrow({1.0, -1075}) == 0.0);
  CHECK(narrow({0x1.0000000000001p0, -1075}) == 0x1p-1074);
  CHECK(narrow({0.0, 5000}) == 0.0);
  CHECK(narrow({INFINITY, 0}) == INFINITY);
}
