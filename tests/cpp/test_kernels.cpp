// What changes memory and what is counted: every kernel of every instruction set against one element
// at a time, at every address, with the bytes around untouched.
#include <cmath>
#include <vector>

#include "cpu/elements.hpp"
#include "samples.hpp"

using namespace gradclip;
using namespace gradclip::test;

namespace {

// Longer than any unrolled loop, and the ends of all loops.
template <class T>
std::vector<std::size_t> sizes() {
  constexpr std::size_t kBlock = order::kBlockBytes / sizeof(T);
  return {0, 1, 2, 3, kBlock - 1, kBlock, kBlock + 1, 2 * kBlock - 1, 8 * kBlock, 9 * kBlock + 5};
}

// For every kind of value, size, address and instruction set.
template <class T, class Test>
void sweep(std::uint64_t seed, Test test) {
  Random random(seed);
  for (const Values values : kAllValues) {
    for (const std::size_t size : sizes<T>()) {
      const std::vector<T> before = sample<T>(values, size, random);
      for (std::size_t offset = 0; offset < 64; offset += kOffsetStep) {
        CAPTURE(static_cast<int>(values));
        CAPTURE(size);
        CAPTURE(offset);
        for_each_isa([&](const cpu::Kernels& kernels) {
          Guarded memory(offset, bytes_of(before));
          test(kernels.of(kDTypeOf<T>), before, memory);
          if (!memory.guards_intact()) FAIL_CHECK("wrote outside of its memory");
        });
      }
    }
  }
}

template <class T>
WordOf<T> magnitude_bits(const T& x) {
  return static_cast<WordOf<T>>(bit_copy<WordOf<T>>(x) & kMagnitude<T>);
}

template <class T>
bool is_nan_element(const T& x) {
  return magnitude_bits(x) > FloatBits<T>::infinity;
}

// x * factor as csrc promises it: in float32 for 16 and 32 bits, in float64 where the factor does
// not fit float32; rounded to nearest even.
template <class T>
T scaled(const T& x, double factor) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return x * factor;
  } else {
    const double size = std::fabs(factor);
    const bool fits =
        size == 0.0 || std::isnan(factor) || (size >= 0x1p-126 && size <= 0x1.fffffep127);
    T result;
    round_to(
        fits ? to_float(x) * static_cast<float>(factor) : static_cast<float>(to_double(x) * factor),
        result);
    return result;
  }
}

}  // namespace

TEST_CASE_TEMPLATE("scale", T, GRADCLIP_ALL_TYPES) {
  for (const double factor : {0.5, 1.0 / 3.0, -1.7, 0.0, -0.0, 1e-3, 3e4, 0x1p-126, 0x1.fffffep127,
                              // What float32 cannot hold: too small, subnormal, too large.
                              1e-42, 1e-60, 1e-200, -1e39, 1e300, double(NAN), double(INFINITY)}) {
    CAPTURE(factor);
    sweep<T>(1, [&](const cpu::TypeKernels& type, const std::vector<T>& before, Guarded& memory) {
      type.scale(memory.data(), memory.size(), factor);
      std::vector<T> after(before.size());
      if (!after.empty()) std::memcpy(after.data(), memory.data(), memory.size());
      for (std::size_t i = 0; i < before.size(); ++i) {
        const T want = scaled(before[i], factor);
        // A NaN that comes of this multiplication has the sign of the processor's taste.
        const bool same = bit_copy<WordOf<T>>(after[i]) == bit_copy<WordOf<T>>(want) ||
                          (is_nan_element(after[i]) && is_nan_element(want) &&
                           (std::isnan(factor) || !is_nan_element(before[i])));
        if (same) continue;
        CAPTURE(i);
        CAPTURE(bit_copy<WordOf<T>>(before[i]));
        CAPTURE(bit_copy<WordOf<T>>(after[i]));
        CAPTURE(bit_copy<WordOf<T>>(want));
        FAIL_CHECK("not the product");
        return;
      }
    });
  }
}

TEST_CASE_TEMPLATE("scale down: not above the product, and no kernel differs", T,
                   GRADCLIP_ALL_TYPES) {
  for (const double factor :
       {0.5, 1.0 / 3.0, 1.0, 0.0, 1e-3, 0x1p-126, 1e-42, 1e-60, 1e-200, 1e-310, 3e4, 1e300}) {
    CAPTURE(factor);
    sweep<T>(7, [&](const cpu::TypeKernels& type, const std::vector<T>& before, Guarded& memory) {
      type.scale_down(memory.data(), memory.size(), factor);
      std::vector<T> after(before.size());
      if (!after.empty()) std::memcpy(after.data(), memory.data(), memory.size());
      for (std::size_t i = 0; i < before.size(); ++i) {
        const T& x = before[i];
        const double was = to_double(x), now = to_double(after[i]);
        if (is_nan_element(x) || magnitude_bits(x) == FloatBits<T>::infinity) {
          if (is_nan_element(after[i]) || std::isinf(now)) continue;
        } else {
          // The product is exact in 64 bits of mantissa but for float64.
          const long double product = std::fabs(static_cast<long double>(was) * factor);
          T again;
          if (factor > 1.0 || !fits_float(factor) || sizeof(T) == sizeof(double)) {
            again = scaled_down(x, factor_below(factor));
          } else if constexpr (sizeof(T) != sizeof(double)) {
            again = scaled_down(x, float_factor_below(factor));
          }
          if (std::fabs(now) <= product &&
              bit_copy<WordOf<T>>(after[i]) == bit_copy<WordOf<T>>(again))
            continue;
        }
        CAPTURE(i);
        CAPTURE(bit_copy<WordOf<T>>(x));
        CAPTURE(bit_copy<WordOf<T>>(after[i]));
        FAIL_CHECK("above the product, or another one");
        return;
      }
    });
  }
}

TEST_CASE_TEMPLATE("clamp", T, GRADCLIP_ALL_TYPES) {
  for (const double limit : {0.0, 0.75, 3.0, 1e4, double(INFINITY)}) {
    CAPTURE(limit);
    const auto top = static_cast<WordOf<T>>(pattern_below(kDTypeOf<T>, limit));
    sweep<T>(2, [&](const cpu::TypeKernels& type, const std::vector<T>& before, Guarded& memory) {
      std::vector<T> want = before;
      bool any = false;
      for (T& x : want) {
        if (is_nan_element(x) || magnitude_bits(x) <= top) continue;
        const WordOf<T> sign = bit_copy<WordOf<T>>(x) & FloatBits<T>::sign;
        x = bit_copy<T>(static_cast<WordOf<T>>(sign | top));
        any = true;
      }
      const bool clamped = type.clamp(memory.data(), memory.size(), top);
      if (clamped != any || !memory.holds(bytes_of(want))) FAIL_CHECK("not the clamped values");
    });
  }
}

TEST_CASE_TEMPLATE("largest and count_nonfinite", T, GRADCLIP_ALL_TYPES) {
  sweep<T>(3, [&](const cpu::TypeKernels& type, const std::vector<T>& before, Guarded& memory) {
    WordOf<T> largest = 0;
    std::int64_t nan = 0, infinity = 0;
    for (const T& x : before) {
      largest = std::max(largest, magnitude_bits(x));
      nan += is_nan_element(x);
      infinity += magnitude_bits(x) == FloatBits<T>::infinity;
    }
    const cpu::NonFiniteCounts counts = type.count_nonfinite(memory.data(), memory.size());
    if (type.largest(memory.data(), memory.size()) != largest) FAIL_CHECK("not the largest");
    if (counts.nan != nan || counts.infinity != infinity) FAIL_CHECK("not the counts");
    if (!memory.holds(bytes_of(before))) FAIL_CHECK("wrote");
  });
}

TEST_CASE("the probes read all and change nothing") {
  Random random(4);
  for (const std::size_t size : sizes<float>()) {
    const std::vector<float> before = sample<float>(Values::any_pattern, size, random);
    std::uint32_t all = 0;
    for (const float x : before) all |= bit_copy<std::uint32_t>(x);
    for_each_isa([&](const cpu::Kernels& kernels) {
      Guarded memory(4, bytes_of(before));
      CHECK(kernels.read(memory.data(), memory.size()) == all);
      kernels.read_write(memory.data(), memory.size());
      CHECK(memory.holds(bytes_of(before)));
      CHECK(memory.guards_intact());
    });
  }
}

TEST_CASE_TEMPLATE("pattern_below: the largest number of the type that is not above", T,
                   GRADCLIP_ALL_TYPES) {
  const DType dtype = kDTypeOf<T>;
  const auto value = [&](std::uint64_t bits) { return value_of_pattern(dtype, bits); };
  const auto check = [&](double limit) {
    const std::uint64_t bits = pattern_below(dtype, limit);
    CAPTURE(limit);
    CAPTURE(bits);
    CHECK(value(bits) <= limit);
    if (bits < FloatBits<T>::infinity) CHECK(value(bits + 1) > limit);
  };
  Random random(5);
  for (int i = 0; i < 5000; ++i) {
    const double x = value(bit_copy<WordOf<T>>(random_pattern<T>(random, true)) & kMagnitude<T>);
    if (x == 0.0) continue;
    check(x);
    check(std::nextafter(x, 0.0));
    check(std::nextafter(x, INFINITY));
  }
  for (const double limit :
       {0x1p-1074, 1e-300, 1e-40, 65504.0, 65520.0, 3.4028235e38, 3.5e38, 1e308})
    check(limit);
  CHECK(pattern_below(dtype, INFINITY) == FloatBits<T>::infinity);
}
