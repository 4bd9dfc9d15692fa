// Geometry and tuning: the one place for numbers that change speed and never a result. They are tried out
// by `python -m tools.sweep`.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/reduction_order.hpp"

namespace gradclip::cuda {

struct Tuning {
  int rows_in_flight;  // of a warp: 16 bytes a thread and row, asked for before the first is used
  int vectors_in_flight;  // of a thread that changes memory, 16 bytes each
};

// By compute capability, major * 100 + minor * 10 as in __CUDA_ARCH__.
constexpr Tuning tuning_for(int arch) {
  // High-bandwidth memory (A100, H100, H200, B200) needs about 40 KB in flight for each
  // multiprocessor: 24 warps with 8 rows of 512 bytes are 96 KB. Others need far less.
  const bool high_bandwidth = arch == 800 || arch == 900 || arch == 1000;
  return high_bandwidth ? Tuning{.rows_in_flight = 8, .vectors_in_flight = 4}
                        : Tuning{.rows_in_flight = 4, .vectors_in_flight = 2};
}

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;
// Of each multiprocessor, all resident at once; they leave 80 registers for a thread, with which nothing is
// spilled (with 4 blocks and 64, 120 bytes were).
inline constexpr int kBlocksPerMultiprocessor = 3;
// Of the kernels that need more: value clip and the slow orders.
inline constexpr int kBlocksOfLargeKernels = 2;

// Work is counted in rows; what comes with a tile besides its rows costs as much as some rows more.
inline constexpr std::int64_t kTileEndCost = 8;
static_assert(kTileEndCost > 0, "an empty tensor must cost something, or nobody visits it");
inline constexpr std::int64_t kTileCost =
    static_cast<std::int64_t>(order::kRowsPerTile) + kTileEndCost;
// The least for a block: two tiles. With one tile for each warp a model of 5 MB would keep only a
// third of a large GPU's multiprocessors busy. At least kTileCost, so that no block has nothing.
inline constexpr std::int64_t kLeastCostPerBlock = 2 * kTileCost;

// Multiprocessors are not equally fast, so that blocks with equal work end at different times. Of a list with at least
// so many tiles for each warp, the last part is kept back: blocks that are done take more of it. A warp has a
// tile in about 10 us whatever is done (all of them have so many bytes in flight), which of less work is all the
// difference that there is.
inline constexpr std::int64_t kTilesToKeepBack = 20;
inline constexpr std::int64_t kPartKeptBack = 10;  // one part of so many
inline constexpr std::int64_t kMostKeptBack = 4;   // shares, for each block

// Of kernels over sums alone, at most: with more decisions or sums a block takes several. Work memory of decisions
// grows with it.
inline constexpr std::size_t kMostBlocksOfSums = 512;

// Whether the pass that changes memory begins where the norms ended, of which the cache may hold something.
inline constexpr bool kChangesBackward = true;

// Entries of a table that travels as a kernel argument, in two sizes: the host fills all of an argument, and
// the driver copies it. 32764 bytes are the most that it may have.
inline constexpr std::uint32_t kFewEntries = 96;
inline constexpr std::uint32_t kMostEntries = 960;

}  // namespace gradclip::cuda
