// From sums to norms: what the sum of a tensor is in each order, and how tensors make a group.
#pragma once

#include <cmath>
#include <cstddef>
#include <span>

#include "core/exact_sum.hpp"
#include "core/power.hpp"
#include "core/table.hpp"

namespace gradclip {

struct NormOrder {
  enum Kind { two, one, infinity, other };
  Kind kind = two;
  double p = 2.0;  // of `other`
};

// Whether a sum is taken the slow way: of terms divided by the largest magnitude, which a pass of its own
// finds, in float64.
GRADCLIP_INLINE bool needs_unit(const NormOrder& order, bool is_complex) {
  return order.kind == NormOrder::other || (order.kind == NormOrder::one && is_complex);
}

// The sum of one tensor or group. Its meaning by order:
//   two, one   sum of squares or magnitudes: value * 2^exponent
//   infinity   the largest magnitude: value
//   other      sum of p-th powers: value * unit^p, unit being the largest magnitude
struct NormSum {
  double value = 0.0;
  int exponent = 0;
  double unit = 0.0;
};

// The larger magnitude; NaN if either is NaN.
GRADCLIP_INLINE double larger(double a, double b) { return is_nan(a) || a > b ? a : b; }

// The norm divided by `scale`: it may be within float64 where the norm itself is not.
GRADCLIP_INLINE double norm_of(const NormOrder& order, const NormSum& sum, double scale = 1.0) {
  switch (order.kind) {
    case NormOrder::two: {
      if (sum.exponent == 0) return std::sqrt(sum.value) / scale;
      // The square root of an even power of two is exact.
      const bool odd = sum.exponent & 1;
      const double root = std::sqrt(odd ? sum.value * 2.0 : sum.value);
      return narrow({root / scale, (sum.exponent - odd) / 2});
    }
    case NormOrder::one: return narrow({sum.value / scale, sum.exponent});
    case NormOrder::infinity: return sum.value / scale;
    case NormOrder::other: return power(sum.value, 1.0 / order.p) * sum.unit / scale;
  }
  return quiet_nan();
}

// value * unit as the sum of a tensor; the exponent apart, for it may be beyond float64.
GRADCLIP_INLINE NormSum magnitude_sum(double value, double unit) {
  if (unit == 0.0 || !is_finite(unit)) return {value * unit, 0, 0.0};
  const bool subnormal = unit < 0x1p-1022;
  const auto bits = bit_copy<std::uint64_t>(subnormal ? unit * 0x1p54 : unit);
  const int exponent = static_cast<int>(bits >> 52) - 1022 - (subnormal ? 54 : 0);
  const double mantissa = bit_copy<double>((bits & 0xfffffffffffffu) | 0x3fe0000000000000u);
  return {value * mantissa, exponent, 0.0};
}

// The sum of each group of tensors; `labels[i]` is the group of tensor i, empty for one group.
inline Table<NormSum> group_sums(const NormOrder& order, std::span<const NormSum> tensors,
                                 std::span<const std::size_t> labels, std::size_t groups) {
  Table<NormSum> result(groups);
  const auto group_of = [&](std::size_t i) { return labels.empty() ? 0 : labels[i]; };
  if (order.kind == NormOrder::infinity) {
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      NormSum& group = result[group_of(i)];
      group.value = larger(tensors[i].value, group.value);
    }
    return result;
  }
  Table<ExactSum> sums(groups);
  if (order.kind == NormOrder::other) {
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      NormSum& group = result[group_of(i)];
      group.unit = larger(tensors[i].unit, group.unit);
    }
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const double unit = result[group_of(i)].unit;
      if (unit == 0.0) continue;
      const double ratio = is_finite(unit) ? tensors[i].unit / unit : 1.0;
      sums[group_of(i)].add(tensors[i].value * power(ratio, order.p));
    }
  } else {
    for (std::size_t i = 0; i < tensors.size(); ++i)
      sums[group_of(i)].add({tensors[i].value, tensors[i].exponent});
  }
  for (std::size_t g = 0; g < groups; ++g) {
    const WideValue sum = sums[g].rounded();
    if (order.kind == NormOrder::other)
      result[g].value = narrow(sum);
    else
      result[g] = {sum.value, sum.exponent, 0.0};
  }
  return result;
}

// How far below the true norm a norm may lie, relative: the bounds of docs/reduction-order.md and more, with
// room for what is rounded in a decision.
inline double norm_error_bound(const NormOrder& order, bool all_float64) {
  const bool in_float64 =
      all_float64 || order.kind == NormOrder::infinity || order.kind == NormOrder::other;
  const double root = order.kind == NormOrder::other && order.p < 1.0 ? order.p : 1.0;
  const bool is_slow = order.kind == NormOrder::other || order.kind == NormOrder::one;
  return (!in_float64 ? 0x1p-22 : is_slow ? 1e-13 / root : 1e-14) + 0x1p-50;
}

// For adding over processes: the sum as one float64, 0 or infinite where it is beyond; and back.
GRADCLIP_INLINE double to_plain(const NormOrder& order, const NormSum& sum) {
  if (order.kind == NormOrder::infinity) return sum.value;
  if (order.kind == NormOrder::other) return sum.value * power(sum.unit, order.p);
  return narrow({sum.value, sum.exponent});
}
GRADCLIP_INLINE NormSum from_plain(double sum) { return {sum, 0, 1.0}; }

}  // namespace gradclip
