// docs/reduction-order.md a second time: one number after the other, and written from that page
// alone. Slow, and easy to compare with it.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <type_traits>
#include <vector>

#include "exact.hpp"
#include "support.hpp"

namespace gradclip::test {

enum class Terms { squares, magnitudes };

// Steps 1 to 3 for the elements of one tile of T, in arithmetic of type Work.
template <class Work, class T>
double model_tile_in(const std::vector<double>& elements, Terms terms) {
  constexpr std::size_t kLanes = sizeof(T) == 8 ? 8 : 16, kBlocks = 8;
  constexpr std::size_t kPerTerm = sizeof(T) == 2 ? 2 : 1;
  const auto part = [&](std::size_t i) -> Work {
    if (i >= elements.size()) return 0;
    const auto x = static_cast<Work>(elements[i]);
    return terms == Terms::squares ? x * x : std::fabs(x);
  };
  const auto term = [&](std::size_t i) -> Work {
    return kPerTerm == 2 ? part(2 * i) + part(2 * i + 1) : part(i);
  };
  std::vector<double> accumulators(kLanes);
  const std::size_t per_row = kBlocks * kLanes;
  for (std::size_t row = 0; row * per_row * kPerTerm < elements.size(); ++row) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      Work b[kBlocks];
      for (std::size_t k = 0; k < kBlocks; ++k) b[k] = term(row * per_row + k * kLanes + lane);
      const Work sum = ((b[0] + b[1]) + (b[2] + b[3])) + ((b[4] + b[5]) + (b[6] + b[7]));
      accumulators[lane] += static_cast<double>(sum);
    }
  }
  for (std::size_t half = kLanes / 2; half > 0; half /= 2)
    for (std::size_t i = 0; i < half; ++i) accumulators[i] += accumulators[i + half];
  return accumulators[0];
}

template <class T>
WideValue model_tile(std::span<const T> tile, Terms terms) {
  constexpr bool kFloat64 = sizeof(T) == 8;
  std::vector<double> x;
  double largest = 0.0;
  bool has_nan = false;
  for (const T& element : tile) {
    x.push_back(to_double(element));
    has_nan = has_nan || std::isnan(x.back());
    largest = std::max(largest, std::fabs(x.back()));
  }
  if (has_nan) return {NAN, 0};
  if (largest == 0.0 || std::isinf(largest)) return {largest, 0};
  const double s = model_tile_in<std::conditional_t<kFloat64, double, float>, T>(x, terms);
  if (std::isfinite(s) && s >= (kFloat64 ? 0x1p-900 : 0x1p-100)) return {s, 0};
  if (!kFloat64) return {model_tile_in<double, T>(x, terms), 0};
  const int k = std::clamp(std::ilogb(largest), -1000, 1000);
  for (double& element : x) element = std::ldexp(element, -k);
  return {model_tile_in<double, T>(x, terms), terms == Terms::squares ? 2 * k : k};
}

// Steps 1 to 4.
template <class T>
WideValue model_sum(std::span<const T> tensor, Terms terms) {
  constexpr std::size_t kTile = 16384 / sizeof(T);
  std::vector<WideValue> tiles;
  for (std::size_t first = 0; first < tensor.size(); first += kTile)
    tiles.push_back(
        model_tile(tensor.subspan(first, std::min(kTile, tensor.size() - first)), terms));
  return add_in_bins(tiles);
}

}  // namespace gradclip::test
