// Pairs: a second array of the same shape that is read beside a gradient. docs/reduction-order.md has the order.
#pragma once

#include "core/dtype.hpp"
#include "core/element.hpp"
#include "core/exact_sum.hpp"
#include "core/platform.hpp"

namespace gradclip {

// Of x and y, an element of each: z is measured, and coefficient * z is written, or y + coefficient * z.
struct PairFormula {
  double factor = 0.0,
         sign_factor = 0.0;    // z = (x + factor * y) + sign_factor * sign(y), without terms by 0
  bool is_difference = false;  // z = x - y, an update of y

  static constexpr PairFormula difference() { return {-1.0, 0.0, true}; }
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

// What the penalty of a second array is made of.
struct PairSums {
  ExactSum squares, magnitudes;

  void add(const PairSums& other) {
    squares.add(other.squares);
    magnitudes.add(other.magnitudes);
  }
};

}  // namespace gradclip
