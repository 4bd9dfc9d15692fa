// The sum of one tile by one warp: steps 1 to 3 of docs/reduction-order.md. The twin of sum_tile in
// cpu/kernels.inc.hpp: a warp has the lanes of a row, where a CPU has registers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "core/exact_sum.hpp"
#include "core/reduction_order.hpp"
#include "cuda/memory.cuh"
#include "cuda/warp.cuh"

namespace gradclip::cuda {

#if defined(__CUDA_ARCH__)
inline constexpr Tuning kTuning = tuning_for(__CUDA_ARCH__);
#else
inline constexpr Tuning kTuning = tuning_for(900);
#endif

enum class Sum { squares, magnitudes };

__device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
__device__ __forceinline__ double magnitude(double x) { return fabs(x); }

template <Sum kSum, class Work>
__device__ __forceinline__ Work term(Work x) {
  return kSum == Sum::squares ? x * x : magnitude(x);
}

// The two 16-bit elements of a 32-bit word, lower address first.
template <class Half>
__device__ __forceinline__ float low_half(unsigned word) {
  return to_float(Half{static_cast<std::uint16_t>(word & 0xffffu)});
}
template <class Half>
__device__ __forceinline__ float high_half(unsigned word) {
  return to_float(Half{static_cast<std::uint16_t>(word >> 16)});
}
__device__ __forceinline__ double join_words(unsigned low, unsigned high) {
  return bit_copy<double>(static_cast<std::uint64_t>(high) << 32 | low);
}

// Step 1, the terms of 16 bytes; `scale` is for float64 alone.
template <Sum kSum, class Work, class T>
__device__ __forceinline__ auto terms_of(uint4 v, double scale, T) {
  if constexpr (sizeof(T) == 8) {
    return Terms2{term<kSum>(join_words(v.x, v.y) * scale),
                  term<kSum>(join_words(v.z, v.w) * scale)};
  } else if constexpr (sizeof(T) == 4) {
    const auto one = [](unsigned word) {
      return term<kSum>(static_cast<Work>(bit_copy<float>(word)));
    };
    return Terms4<Work>{one(v.x), one(v.y), one(v.z), one(v.w)};
  } else {
    const auto two = [](unsigned word) {
      return term<kSum>(static_cast<Work>(low_half<T>(word))) +
             term<kSum>(static_cast<Work>(high_half<T>(word)));
    };
    return Terms4<Work>{two(v.x), two(v.y), two(v.z), two(v.w)};
  }
}

// What is left of a tile, `kRows` at a time: whole rows, zeros where there is none, which change nothing, and
// as the last one perhaps a part. Called, and with half as many as in the loop that is hot: else that would
// spill registers.
template <int kRows, class Memory, class Rows>
__device__ __noinline__ Rows last_rows(Memory memory, std::int64_t at, int left, Rows taken) {
  constexpr int kRow = order::kRowBytes;
#pragma unroll 1
  for (; left > 0; left -= kRows * kRow, at += kRows * kRow) {
    uint4 rows[kRows];
#pragma unroll
    for (int r = 0; r < kRows - 1; ++r)
      rows[r] = left >= (r + 1) * kRow ? memory.load(at + r * kRow) : make_uint4(0, 0, 0, 0);
    const int before = left < (kRows - 1) * kRow ? left / kRow * kRow : (kRows - 1) * kRow;
    rows[kRows - 1] = memory.load_part(at + before, left - before - 16 * lane_id());
#pragma unroll
    for (int r = 0; r < kRows; ++r) taken.add(rows[r]);
  }
  return taken;
}

// The rows of a tile, in order, by the 16 bytes that this thread has of each, added to `taken`. `kRows` rows
// are asked for before the first of them is used.
template <int kRows, class Memory, class Rows>
__device__ __forceinline__ Rows add_rows(const Memory& memory, std::int64_t first, int bytes,
                                         Rows taken) {
  constexpr int kRow = order::kRowBytes;
  std::int64_t at = first + 16 * lane_id();
  int left = bytes;
#pragma unroll 1
  for (; left >= kRows * kRow; left -= kRows * kRow, at += kRows * kRow) {
    uint4 rows[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) rows[r] = memory.load(at + r * kRow);
#pragma unroll
    for (int r = 0; r < kRows; ++r) taken.add(rows[r]);
  }
  return left > 0 ? last_rows<(kRows + 1) / 2>(memory, at, left, taken) : taken;
}

// The bits of a vector that a zero of either sign does not have.
template <class T>
__device__ __forceinline__ unsigned nonzero_bits(uint4 v) {
  if constexpr (sizeof(T) == 2) return (v.x | v.y | v.z | v.w) & 0x7fff7fffu;
  if constexpr (sizeof(T) == 4) return (v.x | v.y | v.z | v.w) & 0x7fffffffu;
  return v.x | v.z | ((v.y | v.w) & 0x7fffffffu);
}

// The terms of rows: this thread's accumulator, and whether an element is not 0 where that does not show in
// the sum: squares can be too small.
template <Sum kSum, class Work, class T>
struct SumOfRows {
  static constexpr bool kCanVanish = kSum == Sum::squares && !std::is_same_v<T, Float16>;
  double scale;
  double sum = 0.0;
  unsigned seen = 0;

  __device__ __forceinline__ void add(uint4 row) {
    sum += fold_row(terms_of<kSum, Work>(row, scale, T{}));
    if constexpr (kCanVanish) seen |= nonzero_bits<T>(row);
  }
};

// The sum of a tile, and whether that is 0 because all elements are.
struct TileSum {
  double sum;
  bool all_zero;
};
template <Sum kSum, class Work, int kRows, class T, class Memory>
__device__ __forceinline__ TileSum sum_terms(const Memory& memory, std::int64_t first, int bytes,
                                             double scale, T) {
  const auto rows = add_rows<kRows>(memory, first, bytes, SumOfRows<kSum, Work, T>{scale});
  const double sum = fold_accumulators<sizeof(T) == 8 ? 8 : 16>(rows.sum);
  return {sum, sum == 0.0 && !__any_sync(kFullWarp, rows.seen != 0)};
}

// The largest magnitude of the elements of a vector, as a bit pattern.
template <class T>
__device__ __forceinline__ typename FloatBits<T>::Word largest_of(uint4 v) {
  using Word = typename FloatBits<T>::Word;
  constexpr Word kMagnitude = static_cast<Word>(~FloatBits<T>::sign);
  const auto larger_of = [](Word a, Word b) { return a > b ? a : b; };
  const auto of_word = [&](unsigned word) -> Word {
    if constexpr (sizeof(T) == 2)
      return larger_of(static_cast<Word>(word & kMagnitude),
                       static_cast<Word>(word >> 16 & kMagnitude));
    else
      return static_cast<Word>(word & kMagnitude);
  };
  if constexpr (sizeof(T) == 8) {
    const auto bits = [](unsigned low, unsigned high) {
      return (static_cast<Word>(high) << 32 | low) & kMagnitude;
    };
    return larger_of(bits(v.x, v.y), bits(v.z, v.w));
  } else {
    return larger_of(larger_of(of_word(v.x), of_word(v.y)), larger_of(of_word(v.z), of_word(v.w)));
  }
}

template <class T>
struct LargestOfRows {
  typename FloatBits<T>::Word largest = 0;

  __device__ __forceinline__ void add(uint4 row) {
    const auto here = largest_of<T>(row);
    largest = here > largest ? here : largest;
  }
};

// The largest magnitude of a tile as a pattern of T; the same in every thread of the warp.
template <int kRows, class T, class Memory>
__device__ __forceinline__ std::uint64_t largest_of_tile(const Memory& memory, std::int64_t first,
                                                         int bytes, T) {
  const auto rows = add_rows<kRows>(memory, first, bytes, LargestOfRows<T>{});
  if constexpr (sizeof(T) == 8)
    return largest_in_warp(static_cast<unsigned long long>(rows.largest));
  else
    return largest_in_warp(static_cast<unsigned>(rows.largest));
}

// A tile whose sum cannot be trusted and that is not all zero; one row at a time, for it is rare.
template <Sum kSum, class T, class Memory>
__device__ __noinline__ WideValue sum_tile_again(Memory memory, std::int64_t first, int bytes,
                                                 T type) {
  const std::uint64_t largest_bits = largest_of_tile<1>(memory, first, bytes, type);
  if (largest_bits > FloatBits<T>::infinity) return {quiet_nan(), 0};
  if (largest_bits == FloatBits<T>::infinity) return {infinity(), 0};
  if constexpr (sizeof(T) == 8) {
    const int k = order::scale_exponent(largest_bits);
    const double sum = sum_terms<kSum, double, 1>(memory, first, bytes, power_of_two(-k), type).sum;
    return {sum, kSum == Sum::squares ? 2 * k : k};
  } else {
    return {sum_terms<kSum, double, 1>(memory, first, bytes, 1.0, type).sum, 0};
  }
}

template <class Memory>
constexpr int rows_in_flight() {
  if constexpr (requires { Memory::kRowsInFlight; })
    return Memory::kRowsInFlight;
  else
    return Memory::kIsWide ? kTuning.rows_in_flight : 1;
}

// The sum of a tile, the same in every thread of the warp.
template <Sum kSum, class T, class Memory>
__device__ __forceinline__ WideValue sum_tile(const Memory& memory, std::int64_t first, int bytes,
                                              T type) {
  using Work = std::conditional_t<sizeof(T) == 8, double, float>;
  const auto [sum, all_zero] =
      sum_terms<kSum, Work, rows_in_flight<Memory>()>(memory, first, bytes, 1.0, type);
  if (all_zero || order::can_be_trusted(sum, sizeof(T) == 8)) return {sum, 0};
  return sum_tile_again<kSum>(memory, first, bytes, type);
}

}  // namespace gradclip::cuda
