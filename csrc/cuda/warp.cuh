// What the 32 threads of a warp do together.
#pragma once

#include <cstdint>

#include "core/float_bits.hpp"
#include "cuda/runtime.hpp"

namespace gradclip::cuda {

// What is rare, or done once for a tile or a tensor, is called and not inlined (__noinline__): so the
// hot loops keep their registers, and nvcc needs seconds instead of minutes for each architecture.

inline constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x / 32); }

// Steps 2 and 3 of docs/reduction-order.md. Thread t holds the terms of block t / 4 of a row: 4 of its
// 16 lanes, or 2 of 8. The tree over blocks is xor 4, 8, 16; each halving gives away what the partner
// will keep, so that at the end every thread holds one lane (both halves of the warp the same).
template <class Work>
struct Terms4 {
  Work a, b, c, d;
};
struct Terms2 {
  double a, b;
};

template <class Work>
__device__ __forceinline__ double fold_row(Terms4<Work> x) {
  const bool second_half = lane_id() & 4, second = lane_id() & 8;
  Work keep_a = second_half ? x.c : x.a, keep_b = second_half ? x.d : x.b;
  const Work give_a = second_half ? x.a : x.c, give_b = second_half ? x.b : x.d;
  keep_a += __shfl_xor_sync(kFullWarp, give_a, 4);
  keep_b += __shfl_xor_sync(kFullWarp, give_b, 4);
  Work keep = second ? keep_b : keep_a;
  const Work give = second ? keep_a : keep_b;
  keep += __shfl_xor_sync(kFullWarp, give, 8);
  keep += __shfl_xor_sync(kFullWarp, keep, 16);
  return static_cast<double>(keep);
}
__device__ __forceinline__ double fold_row(Terms2 x) {
  const bool second = lane_id() & 4;
  double keep = second ? x.b : x.a;
  const double give = second ? x.a : x.b;
  keep += __shfl_xor_sync(kFullWarp, give, 4);
  keep += __shfl_xor_sync(kFullWarp, keep, 8);
  keep += __shfl_xor_sync(kFullWarp, keep, 16);
  return keep;
}

// The accumulators, halved until one is left: lane i + 8 first, which is thread bit 1, then i + 4
// (bit 0), i + 2 (bit 2), i + 1 (bit 3). Of eight: i + 4 (bit 1), i + 2 (bit 0), i + 1 (bit 2).
template <int kLanes>
__device__ __forceinline__ double fold_accumulators(double sum) {
  sum += __shfl_xor_sync(kFullWarp, sum, 2);
  sum += __shfl_xor_sync(kFullWarp, sum, 1);
  sum += __shfl_xor_sync(kFullWarp, sum, 4);
  if constexpr (kLanes == 16) sum += __shfl_xor_sync(kFullWarp, sum, 8);
  return sum;
}

template <class Word>
__device__ __forceinline__ Word largest_in_warp(Word x) {
  for (int step = 16; step > 0; step /= 2) {
    const Word other = __shfl_xor_sync(kFullWarp, x, step);
    x = other > x ? other : x;
  }
  return x;
}

}  // namespace gradclip::cuda
