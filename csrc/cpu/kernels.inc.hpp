// The kernels, compiled once per instruction set (kernels_*.cpp): the same operations in the same
// order, in wider or narrower registers. The sum of a tile is the twin of cuda/tile.cuh.
#pragma once

#include <type_traits>

#include "core/element.hpp"
#include "core/pair.hpp"
#include "core/reduction_order.hpp"
#include "cpu/kernels.hpp"
#include "cpu/simd.hpp"

namespace gradclip::cpu {
namespace {

using order::kBlockBytes;
using order::kRowBytes;

// Ask the cache for the row a page ahead: the processor's own prefetchers stop where a page ends.
// Beyond the end of a tensor that is a page in vain.
constexpr std::size_t kPage = 4096;
GRADCLIP_INLINE void prefetch_next_page(const std::byte* row) {
  for (std::size_t at = 0; at < kRowBytes; at += kBlockBytes) __builtin_prefetch(row + kPage + at);
}

// Call change(block) for every whole block. Returns the bytes behind which an incomplete one begins.
template <class Change>
GRADCLIP_INLINE std::size_t change_blocks(std::byte* data, std::size_t bytes, Change change) {
  std::size_t at = 0;
  for (; at + kRowBytes <= bytes; at += kRowBytes) {
    prefetch_next_page(data + at);
    for (std::size_t block = 0; block < kRowBytes; block += kBlockBytes) change(data + at + block);
  }
  for (; at + kBlockBytes <= bytes; at += kBlockBytes) change(data + at);
  return at;
}

enum class Sum { squares, magnitudes };

template <Sum kSum, class V>
GRADCLIP_INLINE V term(const V& x) {
  if constexpr (kSum == Sum::squares)
    return x * x;
  else
    return magnitude(x);
}

// --- Step 1: the terms of a block of 64 bytes -----------------------------------------------------

template <Sum kSum>
GRADCLIP_INLINE Floats terms(const std::byte* block, float) {
  return term<kSum>(load<Floats>(block));
}
template <Sum kSum>
GRADCLIP_INLINE Doubles terms(const std::byte* block, double) {
  return term<kSum>(load<Doubles>(block));
}
template <Sum kSum, class Half>
GRADCLIP_INLINE Floats terms(const std::byte* block, Half) {
  const FloatPair pair = split(load<Words>(block), Half{});
  return term<kSum>(pair.low) + term<kSum>(pair.high);
}

// The same in float64, for tiles done again.
template <Sum kSum>
GRADCLIP_INLINE DoublePair wide_terms(const Floats& x) {
  const DoublePair wide = widen(x);
  return {term<kSum>(wide.low), term<kSum>(wide.high)};
}
template <Sum kSum>
GRADCLIP_INLINE DoublePair wide_terms(const std::byte* block, float) {
  return wide_terms<kSum>(load<Floats>(block));
}
template <Sum kSum, class Half>
GRADCLIP_INLINE DoublePair wide_terms(const std::byte* block, Half) {
  const FloatPair pair = split(load<Words>(block), Half{});
  return wide_terms<kSum>(pair.low) + wide_terms<kSum>(pair.high);
}

// --- Steps 2 and 3: rows and the tile ---------------------------------------------------------------

GRADCLIP_INLINE DoublePair to_lanes(const Floats& row) { return widen(row); }
GRADCLIP_INLINE DoublePair to_lanes(const DoublePair& row) { return row; }
GRADCLIP_INLINE Doubles to_lanes(const Doubles& row) { return row; }

template <class BlockTerms>
GRADCLIP_INLINE auto row_lanes(const std::byte* row, BlockTerms block_terms) {
  prefetch_next_page(row);
  return to_lanes(order::fold_row(
      [&](int b) __attribute__((always_inline)) { return block_terms(row + b * kBlockBytes); }));
}
// The last row of a tensor, of fewer bytes: missing elements count as +0, and so do their terms.
template <class BlockTerms>
GRADCLIP_INLINE auto short_row_lanes(const std::byte* row, std::size_t bytes,
                                     BlockTerms block_terms) {
  using Terms = decltype(block_terms(row));
  return to_lanes(order::fold_row([&](int b) __attribute__((always_inline)) -> Terms {
    const std::size_t from = static_cast<std::size_t>(b) * kBlockBytes;
    if (from >= bytes) return Terms{};
    if (from + kBlockBytes <= bytes) return block_terms(row + from);
    std::byte block[kBlockBytes] = {};
    __builtin_memcpy(block, row + from, bytes - from);
    return block_terms(block);
  }));
}

template <class BlockTerms>
GRADCLIP_INLINE double sum_terms(const std::byte* tile, std::size_t bytes, BlockTerms block_terms) {
  decltype(row_lanes(tile, block_terms)) accumulators{};
  const std::size_t whole = bytes / kRowBytes * kRowBytes;
  for (std::size_t at = 0; at < whole; at += kRowBytes)
    accumulators = accumulators + row_lanes(tile + at, block_terms);
  if (whole != bytes)
    accumulators = accumulators + short_row_lanes(tile + whole, bytes - whole, block_terms);
  double lanes[sizeof(accumulators) / sizeof(double)];
  __builtin_memcpy(lanes, &accumulators, sizeof(lanes));
  return order::fold_lanes(lanes);
}

template <class T>
GRADCLIP_INLINE typename FloatBits<T>::Word word_at(const std::byte* data) {
  typename FloatBits<T>::Word word;
  __builtin_memcpy(&word, data, sizeof(word));
  return word;
}

template <class T>
std::uint64_t largest(const std::byte* data, std::size_t bytes) {
  using Word = typename FloatBits<T>::Word;
  constexpr Word kMagnitude = static_cast<Word>(~FloatBits<T>::sign);
  Word result = 0;
  for (std::size_t at = 0; at < bytes; at += sizeof(Word)) {
    const Word word = word_at<T>(data + at) & kMagnitude;
    result = word > result ? word : result;
  }
  return result;
}

// A tile whose sum cannot be trusted: squares may have been lost, or it holds an infinity or a NaN.
template <class T, Sum kSum>
[[gnu::cold, gnu::noinline]] WideValue sum_tile_again(const std::byte* tile, std::size_t bytes) {
  const std::uint64_t largest_bits = largest<T>(tile, bytes);
  if (largest_bits == 0) return {0.0, 0};
  if (largest_bits > FloatBits<T>::infinity) return {quiet_nan(), 0};
  if (largest_bits == FloatBits<T>::infinity) return {infinity(), 0};
  if constexpr (sizeof(T) == sizeof(double)) {
    const int k = order::scale_exponent(largest_bits);
    const Doubles scale = broadcast(power_of_two(-k));
    const double sum = sum_terms(tile, bytes, [&](const std::byte* block) {
      return term<kSum>(load<Doubles>(block) * scale);
    });
    return {sum, kSum == Sum::squares ? 2 * k : k};
  } else {
    return {sum_terms(tile, bytes,
                      [](const std::byte* block)
                          __attribute__((always_inline)) { return wide_terms<kSum>(block, T{}); }),
            0};
  }
}

GRADCLIP_INLINE float to_work(float x) { return x; }
GRADCLIP_INLINE double to_work(double x) { return x; }
template <class Half>
GRADCLIP_INLINE float to_work(Half x) {
  return to_float(x);
}

template <class T, Sum kSum>
WideValue sum_tile(const std::byte* tile, std::size_t bytes) {
  double sum;
  if (bytes == sizeof(T)) {  // a row of a vector: all that is added to its term is 0
    T x;
    __builtin_memcpy(&x, tile, sizeof(T));
    const auto value = to_work(x);
    sum = kSum == Sum::squares ? value * value : value < 0 ? -value : value;
  } else {
    sum = sum_terms(tile, bytes, [](const std::byte* block) __attribute__((always_inline)) {
      return terms<kSum>(block, T{});
    });
  }
  if (order::can_be_trusted(sum, sizeof(T) == sizeof(double))) return {sum, 0};
  return sum_tile_again<T, kSum>(tile, bytes);
}

// --- Element by element -----------------------------------------------------------------------------

template <class T>
bool clamp(std::byte* data, std::size_t bytes, std::uint64_t limit) {
  using Word = typename FloatBits<T>::Word;
  constexpr Word kSign = FloatBits<T>::sign;
  const Word top = static_cast<Word>(limit);
  const auto is_beyond = [=](Word word) {
    const Word size = word & static_cast<Word>(~kSign);
    return size > top && size <= FloatBits<T>::infinity;
  };
  Word any = 0;
  for (std::size_t at = 0; at < bytes; at += sizeof(Word)) any |= is_beyond(word_at<T>(data + at));
  if (!any) return false;
  for (std::size_t at = 0; at < bytes; at += sizeof(Word)) {
    const Word word = word_at<T>(data + at);
    const Word clamped = is_beyond(word) ? static_cast<Word>((word & kSign) | top) : word;
    __builtin_memcpy(data + at, &clamped, sizeof(clamped));
  }
  return true;
}

template <class T>
NonFiniteCounts count_nonfinite(const std::byte* data, std::size_t bytes) {
  using Word = typename FloatBits<T>::Word;
  NonFiniteCounts counts;
  for (std::size_t at = 0; at < bytes; at += sizeof(Word)) {
    const Word size = word_at<T>(data + at) & static_cast<Word>(~FloatBits<T>::sign);
    counts.nan += size > FloatBits<T>::infinity;
    counts.infinity += size == FloatBits<T>::infinity;
  }
  return counts;
}

template <Rounding kRounding>
GRADCLIP_INLINE void scale_block(std::byte* block, float factor, float) {
  const Floats product = load<Floats>(block) * broadcast(factor);
  store(block, kRounding == Rounding::down ? below_if_subnormal(product) : product);
}
template <Rounding kRounding>
GRADCLIP_INLINE void scale_block(std::byte* block, double factor, double) {
  const Doubles product = load<Doubles>(block) * broadcast(factor);
  store(block, kRounding == Rounding::down ? below_if_subnormal(product) : product);
}

// Factor: of the type that products are taken in.
template <Rounding kRounding, class T, class Factor>
GRADCLIP_INLINE T scaled(T x, Factor factor) {
  if constexpr (kRounding == Rounding::down)
    x = scaled_down(x, factor);
  else if constexpr (sizeof(T) == sizeof(double))
    x *= factor;
  else if constexpr (sizeof(Factor) == sizeof(double))
    round_to(static_cast<float>(to_double(x) * factor), x);
  else
    round_to(to_float(x) * factor, x);
  return x;
}

template <class T, Rounding kRounding>
void scale(std::byte* data, std::size_t bytes, double factor) {
  const auto one_by_one = [&](std::size_t at, auto typed_factor) {
    for (; at < bytes; at += sizeof(T)) {
      T x;
      __builtin_memcpy(&x, data + at, sizeof(T));
      x = scaled<kRounding>(x, typed_factor);
      __builtin_memcpy(data + at, &x, sizeof(T));
    }
  };
  const auto by_blocks = [&](auto typed_factor) {
    const std::size_t rest = change_blocks(
        data, bytes, [=](std::byte* block) { scale_block<kRounding>(block, typed_factor, T{}); });
    one_by_one(rest, typed_factor);
  };
  constexpr bool kDown = kRounding == Rounding::down;
  const double wide_factor = kDown ? factor_below(factor) : factor;
  // By a factor above 1, products may be too large.
  const bool needs_wide = sizeof(T) < sizeof(double) && !fits_float(factor);
  if ((kDown && factor > 1.0) || needs_wide)
    one_by_one(0, wide_factor);
  else if constexpr (sizeof(T) == sizeof(double))
    by_blocks(wide_factor);
  else
    by_blocks(kDown ? float_factor_below(factor) : static_cast<float>(factor));
}

// --- Pairs, in float64 --------------------------------------------------------------------------------

template <class T>
void widen(const std::byte* __restrict from, double* __restrict to, std::size_t count) {
  std::size_t i = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, Float16>)
    for (; i + 8 <= count; i += 8) widen_eight(from + i * sizeof(T), to + i);
#endif
  for (; i < count; ++i) {
    T x;
    __builtin_memcpy(&x, from + i * sizeof(T), sizeof(T));
    to[i] = to_double(x);
  }
}

template <class T, Rounding kRounding>
void narrow(const double* __restrict from, std::byte* __restrict to, std::size_t count) {
  std::size_t i = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, Float16> && kRounding == Rounding::nearest)
    for (; i + 8 <= count; i += 8) narrow_eight(from + i, to + i * sizeof(T));
#endif
  for (; i < count; ++i) {
    T x;
    if constexpr (kRounding == Rounding::down)
      truncate_from(from[i], x);
    else
      round_from(from[i], x);
    __builtin_memcpy(to + i * sizeof(T), &x, sizeof(T));
  }
}

template <class T>
void move_down_one_by_one(const double* __restrict from, const double* __restrict steps,
                          std::byte* __restrict to, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    const T x = moved_down<T>(from[i], steps[i]);
    __builtin_memcpy(to + i * sizeof(T), &x, sizeof(T));
  }
}

// moved_down() without its branches, which half of all numbers take: 1.5 ns instead of 20. What lies close to 0 or
// is not finite is left to that. Of float and double; returns how many it moved, all but the last few.
template <class T>
std::size_t move_blocks_down(const double* __restrict from, const double* __restrict steps,
                             std::byte* __restrict to, std::size_t count) {
  constexpr std::size_t kNumbers = 64;
  // Of a normal number of T as float64: its last place, and from where on its neighbours are normal, too.
  constexpr bool kIsWide = sizeof(T) == sizeof(double);
  constexpr std::uint64_t kUnit = kIsWide ? 1 : std::uint64_t{1} << 29;
  constexpr double kLeast = kIsWide ? 0x1p-1021 : 0x1p-125;
  const auto mask = [](bool is) { return is ? ~std::uint64_t{0} : std::uint64_t{0}; };
  std::size_t i = 0;
  for (; i + kNumbers <= count; i += kNumbers) {
    double numbers[kNumbers];
    std::uint64_t left = 0;
    for (std::size_t j = 0; j < kNumbers; ++j) {
      const double y = from[i + j], step = steps[i + j];
      T result;
      round_from(y + step, result);
      const double reached = to_double(result), moved = reached - y;
      const double length = __builtin_fabs(step), size = __builtin_fabs(moved);
      const std::uint64_t is_beyond = mask(!(size < length)) & mask(!(size == 0.0));
      const std::uint64_t shrinks = mask(moved < 0.0) ^ mask(reached > 0.0);
      const std::uint64_t unit = (kUnit ^ shrinks) - shrinks;
      numbers[j] = bit_copy<double>(bit_copy<std::uint64_t>(reached) + (unit & is_beyond));
      const double magnitude = __builtin_fabs(reached);
      left |= is_beyond & ~(mask(magnitude >= kLeast) & mask(magnitude < infinity()));
    }
    if (left != 0) {
      move_down_one_by_one<T>(from + i, steps + i, to + i * sizeof(T), kNumbers);
      continue;
    }
    for (std::size_t j = 0; j < kNumbers; ++j) {
      const T x = static_cast<T>(numbers[j]);
      __builtin_memcpy(to + (i + j) * sizeof(T), &x, sizeof(T));
    }
  }
  return i;
}

template <class T>
void move_down(const double* from, const double* steps, std::byte* to, std::size_t count) {
  std::size_t i = 0;
  if constexpr (std::is_floating_point_v<T>) i = move_blocks_down<T>(from, steps, to, count);
  move_down_one_by_one<T>(from + i, steps + i, to + i * sizeof(T), count - i);
}

// The rows of a tile of float64, 64 numbers each, from terms of 16: terms(at), where at counts numbers. The last
// row may be short: short_terms(at) takes +0 for what is behind the end.
template <class Terms, class ShortTerms>
GRADCLIP_INLINE double sum_wide_terms(std::size_t count, Terms terms, ShortTerms short_terms) {
  constexpr std::size_t kRow = kRowBytes / sizeof(double), kTerms = 16;
  const auto row = [](std::size_t at, const auto& terms_at) {
    const DoublePair t0 = terms_at(at), t1 = terms_at(at + kTerms);
    const Doubles left = (t0.low + t0.high) + (t1.low + t1.high);
    const DoublePair t2 = terms_at(at + 2 * kTerms), t3 = terms_at(at + 3 * kTerms);
    return left + ((t2.low + t2.high) + (t3.low + t3.high));
  };
  Doubles accumulators{};
  std::size_t at = 0;
  for (; at + kRow <= count; at += kRow) accumulators = accumulators + row(at, terms);
  if (at != count) accumulators = accumulators + row(at, short_terms);
  double lanes[sizeof(accumulators) / sizeof(double)];
  __builtin_memcpy(lanes, &accumulators, sizeof(lanes));
  return order::fold_lanes(lanes);
}

// 16 numbers from `at` on, of which there are `count`.
template <class T>
GRADCLIP_INLINE DoublePair load_short(const std::byte* from, std::size_t at, std::size_t count) {
  std::byte padded[16 * sizeof(T)] = {};
  if (at < count) {
    const std::size_t left = count - at < 16 ? count - at : 16;
    __builtin_memcpy(padded, from + at * sizeof(T), left * sizeof(T));
  }
  return load_wide(padded, T{});
}

template <class T, Sum kSum>
double sum_wide(const std::byte* from, std::size_t count) {
  return sum_wide_terms(
      count, [=](std::size_t at) { return term<kSum>(load_wide(from + at * sizeof(T), T{})); },
      [=](std::size_t at) { return term<kSum>(load_short<T>(from, at, count)); });
}

// What is made of 16 numbers of each.
template <bool kSigns>
GRADCLIP_INLINE DoublePair made_of(const DoublePair& x, const DoublePair& y,
                                   const PairFormula& formula) {
  const DoubleRegister factor = DoubleRegister{} + formula.factor;
  DoublePair z = zip([=](DoubleRegister a, DoubleRegister b) { return a + factor * b; }, x, y);
  if constexpr (kSigns) {
    const DoubleRegister sign = DoubleRegister{} + formula.sign_factor, zero{};
    z = zip([=](DoubleRegister a,
                DoubleRegister b) { return a + (b > zero ? sign : (b < zero ? -sign : b)); },
            z, y);
  }
  return z;
}

template <class X, class Y, bool kSigns>
double sum_pair(const std::byte* x, const std::byte* y, std::size_t count,
                const PairFormula& given) {
  const PairFormula formula = given;
  return sum_wide_terms(
      count,
      [=](std::size_t at) {
        const std::byte *x_at = x + at * sizeof(X), *y_at = y + at * sizeof(Y);
        __builtin_prefetch(x_at + kPage);
        __builtin_prefetch(y_at + kPage);
        return term<Sum::squares>(
            made_of<kSigns>(load_wide(x_at, X{}), load_wide(y_at, Y{}), formula));
      },
      [=](std::size_t at) {
        return term<Sum::squares>(
            made_of<kSigns>(load_short<X>(x, at, count), load_short<Y>(y, at, count), formula));
      });
}
template <class X, class Y>
double sum_pair_squares(const std::byte* x, const std::byte* y, std::size_t count,
                        const PairFormula& formula) {
  return formula.sign_factor != 0.0 ? sum_pair<X, Y, true>(x, y, count, formula)
                                    : sum_pair<X, Y, false>(x, y, count, formula);
}

template <class X, class Y>
void write_pair(std::byte* x, const std::byte* y, std::size_t count, const PairFormula& given,
                double given_factor) {
  const PairFormula formula = given;
  const double factor = given_factor;
  // As many at once as rounding is worth a loop of its own: to bfloat16 it takes integers.
  constexpr std::size_t kStep = 16, kBatch = std::is_same_v<X, BFloat16> ? 256 : kStep;
  const auto step = [=](const DoublePair& from, const DoublePair& beside, double* to) {
    DoublePair z = formula.sign_factor != 0.0 ? made_of<true>(from, beside, formula)
                                              : made_of<false>(from, beside, formula);
    const DoubleRegister scale = DoubleRegister{} + factor;
    if (factor != 1.0) z = map([=](DoubleRegister a) { return a * scale; }, z);
    if (formula.is_difference) z = z + beside;
    store(reinterpret_cast<std::byte*>(to), z);
  };
  double numbers[kBatch];
  std::size_t at = 0;
  for (; at + kBatch <= count; at += kBatch) {
    for (std::size_t i = 0; i < kBatch; i += kStep) {
      const std::byte *x_at = x + (at + i) * sizeof(X), *y_at = y + (at + i) * sizeof(Y);
      __builtin_prefetch(x_at + kPage);
      __builtin_prefetch(y_at + kPage);
      step(load_wide(x_at, X{}), load_wide(y_at, Y{}), numbers + i);
    }
    narrow<X, Rounding::nearest>(numbers, x + at * sizeof(X), kBatch);
  }
  for (; at < count; at += kStep) {
    step(load_short<X>(x, at, count), load_short<Y>(y, at, count), numbers);
    narrow<X, Rounding::nearest>(numbers, x + at * sizeof(X),
                                 count - at < kStep ? count - at : kStep);
  }
}

void add_scaled(double* __restrict z, const double* __restrict y, double factor,
                std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) z[i] = plus_scaled(z[i], y[i], factor);
}
void add_signs(double* __restrict z, const double* __restrict y, double factor, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) z[i] = plus_sign(z[i], y[i], factor);
}

// --- The machine's own speed ------------------------------------------------------------------------

std::uint32_t read(const std::byte* data, std::size_t bytes) {
  Words seen[8] = {};
  std::size_t at = 0;
  for (; at + kRowBytes <= bytes; at += kRowBytes) {
    prefetch_next_page(data + at);
    for (std::size_t b = 0; b < 8; ++b)
      seen[b] = seen[b] | load<Words>(data + at + b * kBlockBytes);
  }
  for (; at + kBlockBytes <= bytes; at += kBlockBytes) seen[0] = seen[0] | load<Words>(data + at);
  std::uint32_t all[kBlockBytes / sizeof(std::uint32_t)] = {};
  __builtin_memcpy(all, data + at, bytes - at);
  Words last = load<Words>(reinterpret_cast<const std::byte*>(all));
  for (const Words& words : seen) last = last | words;
  store(reinterpret_cast<std::byte*>(all), last);
  std::uint32_t any = 0;
  for (const std::uint32_t word : all) any |= word;
  return any;
}

void read_write(std::byte* data, std::size_t bytes) {
  // The compiler does not know that nothing changes.
  std::uint32_t zero = 0;
  asm volatile("" : "+r"(zero));
  const auto change = [=](WordRegister x) { return x | zero; };
  const std::size_t rest = change_blocks(
      data, bytes, [=](std::byte* block) { store(block, map(change, load<Words>(block))); });
  for (std::size_t at = rest; at < bytes; ++at) data[at] |= static_cast<std::byte>(zero);
}

template <class T>
constexpr TypeKernels kernels_of() {
  return {sum_tile<T, Sum::squares>,
          sum_tile<T, Sum::magnitudes>,
          largest<T>,
          clamp<T>,
          scale<T, Rounding::nearest>,
          scale<T, Rounding::down>,
          count_nonfinite<T>,
          sum_wide<T, Sum::squares>,
          sum_wide<T, Sum::magnitudes>,
          widen<T>,
          narrow<T, Rounding::nearest>,
          narrow<T, Rounding::down>,
          move_down<T>};
}

constexpr Kernels kernels() {
  Kernels all{{}, {}, add_scaled, add_signs, read, read_write};
  for (std::size_t i = 0; i < kRealTypes; ++i)
    visit_real_type(static_cast<DType>(i), [&](auto x) {
      using X = decltype(x);
      all.of_real_type[i] = kernels_of<X>();
      for (std::size_t k = 0; k < kRealTypes; ++k)
        visit_real_type(static_cast<DType>(k), [&](auto y) {
          using Y = decltype(y);
          all.of_real_types[i][k] = {sum_pair_squares<X, Y>, write_pair<X, Y>};
        });
    });
  return all;
}

}  // namespace
}  // namespace gradclip::cpu
