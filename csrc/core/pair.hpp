// Pairs: a second array of the same shape that is read beside a gradient. docs/reduction-order.md has the order.
#pragma once

#include "core/dtype.hpp"
#include "core/element.hpp"
#include "core/exact_sum.hpp"
#include "core/platform.hpp"
#include "core/rows.hpp"

namespace gradclip {

// Of x and y, an element of each: z is measured, and coefficient * z is written, or y + coefficient * z.
struct PairFormula {
  // z = (x + factor * y) + sign_factor * sign(y), without terms by 0.
  double factor = 0.0, sign_factor = 0.0;
  bool is_difference = false;  // z = x - y, an update of y
  double l2 = 0.0, l1 = 0.0;   // of the penalty of y

  static constexpr PairFormula difference() { return {-1.0, 0.0, true, 0.0, 0.0}; }
};

// z is float64 or complex128, whatever x and y are.
constexpr DType wide_type(DType dtype) {
  return is_complex(dtype) ? DType::complex128 : DType::float64;
}

GRADCLIP_INLINE double plus_scaled(double x, double y, double factor) { return x + factor * y; }
GRADCLIP_INLINE double plus_sign(double x, double y, double factor) {
  return x + (y > 0.0 ? factor : y < 0.0 ? -factor : y);  // 0, or NaN
}

// --- From float64 to what an array holds ---------------------------------------------------------------

GRADCLIP_INLINE void round_from(double x, double& to) { to = x; }
template <class T>
GRADCLIP_INLINE void round_from(double x, T& to) {
  round_to(static_cast<float>(x), to);
}

// The number of which `factor` times is written.
GRADCLIP_INLINE double made_of(double x, double y, double factor, double sign_factor) {
  if (factor != 0.0) x = plus_scaled(x, y, factor);
  if (sign_factor != 0.0) x = plus_sign(x, y, sign_factor);
  return x;
}

// y + step, no further from y than the step is.
template <class T>
GRADCLIP_INLINE T moved_down(double y, double step) {
  T result;
  round_from(y + step, result);
  const double reached = to_double(result), moved = reached - y;
  const double length = step < 0.0 ? -step : step, size = moved < 0.0 ? -moved : moved;
  // A difference that is rounded keeps the order, so that what is shorter is so exactly.
  if (size == 0.0 || size < length || !is_finite(step) || is_nan(reached)) return result;
  using Word = typename FloatBits<T>::Word;
  Word bits = bit_copy<Word>(result);
  const bool up = moved < 0.0;
  if (reached == 0.0)
    bits = static_cast<Word>(up ? 1 : FloatBits<T>::sign | 1);
  else
    bits = static_cast<Word>(up == (reached > 0.0) ? bits + 1 : bits - 1);
  return bit_copy<T>(bits);
}

// What is written where z is made of a pair: factor * z, or beside y. `down`: what is written, or its distance from
// y, is not above the exact product in magnitude.
template <class T>
GRADCLIP_INLINE T written_of(const PairFormula& formula, double z, double y, double factor,
                             bool down) {
  if (factor != 1.0) z = down ? scaled_down(z, factor_below(factor)) : z * factor;
  if (formula.is_difference && down) return moved_down<T>(y, z);
  T result;
  if (down)
    truncate_from(z, result);
  else
    round_from(formula.is_difference ? z + y : z, result);
  return result;
}

// What the penalty of a second array is made of; each only if its factor is not 0.
struct PairSums {
  ExactSum squares, magnitudes;

  GRADCLIP_INLINE void add(const PairSums& other) {
    squares.add(other.squares);
    magnitudes.add(other.magnitudes);
  }
};
// l2 / 2 * the squares + l1 * the magnitudes.
GRADCLIP_INLINE double penalty_of(WideValue squares, WideValue magnitudes, double l2, double l1) {
  const double of_squares = l2 == 0.0 ? 0.0 : narrow({0.5 * l2 * squares.value, squares.exponent});
  return of_squares + (l1 == 0.0 ? 0.0 : narrow({l1 * magnitudes.value, magnitudes.exponent}));
}

// A gradient and its second array, both in the order in which the gradient lies in memory; where rows are parts, a
// row of each. `dtype` is that of what is made of them.
struct PairSpan {
  Span x, y;
  PairFormula formula;
  DType dtype;
  PairSums* sums = nullptr;  // of y, where somebody asks for them

  std::int64_t itemsize() const { return static_cast<std::int64_t>(size_of(dtype)); }
};

// All rows of a gradient; or, where rows are no parts, the whole of it as one.
struct PairRows {
  RowSpan x, y;
  PairFormula formula;
  DType dtype;

  PairSpan operator[](std::int64_t row) const { return {x[row], y[row], formula, dtype}; }
  std::int64_t row_bytes() const { return x.numel * static_cast<std::int64_t>(size_of(dtype)); }
};

// Part r of gradient i is number first[i] + r.
struct PairTable {
  PairFormula formula;  // of all
  Table<PairRows> gradients;
  Table<std::size_t> first = {0};
  std::list<StridedLayout> layouts;  // that rows point to; addresses must stay

  void add(const PairRows& rows) {
    gradients.push_back(rows);
    first.push_back(first.back() + static_cast<std::size_t>(rows.x.count));
  }
};

}  // namespace gradclip
