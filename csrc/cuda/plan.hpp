// What the kernels know of a list of gradients, and how its work is shared out.
//
// The work of a tensor is its tiles, one after the other; a tile costs its rows and a little more.
// Warp w of W takes the tiles that begin at costs [total * w / W, total * (w + 1) / W): no table of
// chunks, only the cost at which every tensor begins. Of a long list the last tenth is shared out to those who
// are done. Tile sums are added exactly, so none of this can change a result. The twin of cpu/plan.hpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.hpp"
#include "core/pair.hpp"
#include "core/platform.hpp"
#include "core/span.hpp"
#include "cuda/tuning.hpp"

namespace gradclip::cuda {

using Axis = StridedLayout::Axis;

struct TensorEntry {
  std::byte* data;
  std::int64_t bytes;
  std::int64_t first_cost;   // the cost of all tensors before it
  std::uint32_t first_axis;  // of a tensor that is not dense
  std::uint16_t axes;        // 0 where it is dense
  DType dtype;
};
static_assert(sizeof(TensorEntry) == 32);

// A gradient whose rows have groups. Each is a tensor to the kernels, with an entry that a warp makes when it
// comes to it; the gradient's own has data and axes of row 0, and the bytes of all rows.
struct RowEntry {
  std::int64_t stride;         // in bytes, of either sign
  std::uint32_t count, first;  // row r is part number first + r
};

// A gradient and its second array, whose TensorEntry is of what is made of them: float64 or complex128. Its
// first_axis is the number of this entry, and its data the number of a row above kRowZero: both arrays have rows.
struct PairEntry {
  std::byte *x, *y;                 // of row 0
  std::int64_t x_stride, y_stride;  // in bytes, to the next row
  std::uint32_t x_axis, y_axis;     // the first one
  std::uint16_t x_axes, y_axes;     // 0 where it is dense
  DType x_type, y_type;
  PairFormula formula;
};
inline constexpr std::uintptr_t kRowZero = 4096;  // no null pointer, to which nothing may be added

// Tensors of no bytes have one tile, of no rows: so every tensor is met by exactly one walk.
GRADCLIP_INLINE std::int64_t tiles_of(std::int64_t bytes) {
  constexpr auto kTile = static_cast<std::int64_t>(order::kTileBytes);
  return bytes == 0 ? 1 : (bytes + kTile - 1) / kTile;
}
GRADCLIP_INLINE std::int64_t cost_of(std::int64_t bytes) {
  constexpr auto kRow = static_cast<std::int64_t>(order::kRowBytes);
  return (bytes + kRow - 1) / kRow + tiles_of(bytes) * kTileEndCost;
}

// All of a list but its entries, where those lie in the kernel argument.
struct TableView {
  const TensorEntry* entries;  // in memory
  const Axis* axes;
  const RowEntry* rows;    // of every tensor; null where tensors have groups
  const PairEntry* pairs;  // of every tensor; null where gradients are alone
  // Of groups by label, else null: the label of every tensor; the tensors of group g are
  // members[group_begin[g]] to members[group_begin[g + 1] - 1].
  const std::uint32_t* labels;
  const std::uint32_t* members;
  const std::uint32_t* group_begin;
  std::uint32_t tensors;
  std::uint32_t groups;
  std::int64_t cost;
  bool is_in_argument;  // the entries

  GRADCLIP_INLINE std::uint32_t group_of(std::uint32_t part) const {
    return groups == 1 ? 0 : labels ? labels[part] : part;
  }
};

// Which tiles of which tensors a warp takes.
struct CostRange {
  std::int64_t begin, end;
};
GRADCLIP_INLINE std::int64_t first_cost_of_warp(std::int64_t total, std::int64_t warp,
                                                std::int64_t warps) {
  // total * warp / warps without overflow.
  return total / warps * warp + total % warps * warp / warps;
}
GRADCLIP_INLINE CostRange cost_range(std::int64_t total, std::int64_t warp, std::int64_t warps) {
  return {first_cost_of_warp(total, warp, warps), first_cost_of_warp(total, warp + 1, warps)};
}
// The warp whose range holds `cost`.
GRADCLIP_INLINE std::int64_t warp_at(std::int64_t total, std::int64_t cost, std::int64_t warps) {
  auto warp = static_cast<std::int64_t>(static_cast<double>(cost) / static_cast<double>(total) *
                                        static_cast<double>(warps));
  if (warp >= warps) warp = warps - 1;
  while (warp > 0 && first_cost_of_warp(total, warp, warps) > cost) --warp;
  while (first_cost_of_warp(total, warp + 1, warps) <= cost) ++warp;
  return warp;
}

// How the cost of a list is cut into shares, each for the warps of a block: one for every block, and of a long list
// those that are kept back, each for the block that comes first.
struct Shares {
  std::int64_t own, rest;  // cost of the shares of the blocks, of those kept back
  std::int64_t blocks, kept_back;

  GRADCLIP_INLINE Shares(std::int64_t cost, std::int64_t block_count)
      : own(cost), rest(0), blocks(block_count), kept_back(0) {
    constexpr std::int64_t kLeast = kWarps * kTileCost;  // a tile for each warp
    if (cost / blocks < kTilesToKeepBack * kLeast) return;
    rest = cost / kPartKeptBack;
    own = cost - rest;
    kept_back = rest / kLeast;
    if (kept_back > kMostKeptBack * blocks) kept_back = kMostKeptBack * blocks;
  }
  GRADCLIP_INLINE std::int64_t count() const { return blocks + kept_back; }
  GRADCLIP_INLINE CostRange range(std::int64_t share, std::int64_t warp) const {
    if (share < blocks) return cost_range(own, share * kWarps + warp, blocks * kWarps);
    const CostRange range = cost_range(rest, (share - blocks) * kWarps + warp, kept_back * kWarps);
    return {own + range.begin, own + range.end};
  }
  // The share that has `cost`.
  GRADCLIP_INLINE std::int64_t at(std::int64_t cost) const {
    return cost < own ? warp_at(own, cost, blocks * kWarps) / kWarps
                      : blocks + warp_at(rest, cost - own, kept_back * kWarps) / kWarps;
  }
};

// Tiles [begin, end) of a tensor, all of `all`. No tensor has 2^32 of them.
struct TileRange {
  std::uint32_t begin, end, all;
  GRADCLIP_INLINE bool empty() const { return begin >= end; }
  GRADCLIP_INLINE bool whole() const { return begin == 0 && end == all; }
  // In bytes of the tensor.
  GRADCLIP_INLINE std::int64_t first_byte() const {
    return static_cast<std::int64_t>(begin) * static_cast<std::int64_t>(order::kTileBytes);
  }
  GRADCLIP_INLINE std::int64_t end_byte(std::int64_t bytes) const {
    return end == all
               ? bytes
               : static_cast<std::int64_t>(end) * static_cast<std::int64_t>(order::kTileBytes);
  }
};
// The first tile that begins at or after `cost`; `all` if there is none.
GRADCLIP_INLINE std::uint32_t first_tile_at(std::int64_t cost, std::int64_t all) {
  const std::int64_t tile = cost <= 0 ? 0 : (cost + kTileCost - 1) / kTileCost;
  return static_cast<std::uint32_t>(tile < all ? tile : all);
}
GRADCLIP_INLINE TileRange tile_range(const TensorEntry& entry, CostRange range) {
  const std::int64_t all = tiles_of(entry.bytes);
  return {first_tile_at(range.begin - entry.first_cost, all),
          first_tile_at(range.end - entry.first_cost, all), static_cast<std::uint32_t>(all)};
}

}  // namespace gradclip::cuda
