// The walk of one warp over its share of the work.
#pragma once

#include <cstdint>

#include "cuda/arguments.hpp"
#include "cuda/warp.cuh"

namespace gradclip::cuda {

// The last tensor that begins at or before `cost`. In memory a search with 32 probes at a time, since each
// waits; an argument lies in constant memory, which serves a warp one address after the other.
__device__ __forceinline__ std::uint32_t find_tensor(const TableView& table,
                                                     const TensorEntry* entries,
                                                     std::int64_t cost) {
  std::uint32_t low = 0, count = table.tensors;
  while (table.is_in_argument && count > 1) {
    const std::uint32_t half = count / 2;
    const bool before = entries[low + half].first_cost <= cost;
    low += before ? half : 0;
    count = before ? count - half : half;
  }
  while (count > 1) {
    const std::uint32_t step = (count + 31) / 32;
    const std::uint32_t ahead = static_cast<std::uint32_t>(lane_id()) * step;
    const bool before = ahead < count && entries[low + ahead].first_cost <= cost;
    const auto last = static_cast<std::uint32_t>(__popc(__ballot_sync(kFullWarp, before)) - 1);
    low += last * step;
    count = count - last * step < step ? count - last * step : step;
  }
  return low;
}

__device__ __forceinline__ CostRange range_of_this_warp(const TableView& table) {
  return cost_range(table.cost, static_cast<std::int64_t>(blockIdx.x) * kWarps + warp_id(),
                    static_cast<std::int64_t>(gridDim.x) * kWarps);
}

// The same in shared memory, read again for each tensor: hot loops have no register to spare for it.
struct Ranges {
  CostRange of_warp[kWarps];

  __device__ __forceinline__ const CostRange& of_this_warp(const TableView& table) {
    CostRange& range = of_warp[warp_id()];
    if (lane_id() == 0) range = range_of_this_warp(table);
    __syncwarp();
    return range;
  }
};

// visit(index, entry, tiles) for every tensor of which a warp has tiles, in order.
template <class Visit>
__device__ __forceinline__ void walk(const TableView& table, const TensorEntry* entries,
                                     const CostRange& range, Visit visit) {
  if (range.begin >= range.end) return;
  for (std::uint32_t i = find_tensor(table, entries, range.begin); i < table.tensors; ++i) {
    const TensorEntry& entry = entries[i];
    if (entry.first_cost >= range.end) break;
    const TileRange tiles = tile_range(entry, range);
    if (!tiles.empty()) visit(i, entry, tiles);
  }
}

// The same from the last tensor to the first.
template <class Visit>
__device__ __forceinline__ void walk_backward(const TableView& table, const TensorEntry* entries,
                                              const CostRange& range, Visit visit) {
  if (range.begin >= range.end) return;
  for (std::uint32_t i = find_tensor(table, entries, range.end - 1) + 1; i-- > 0;) {
    const TensorEntry& entry = entries[i];
    const TileRange tiles = tile_range(entry, range);
    if (!tiles.empty()) visit(i, entry, tiles);
    if (entry.first_cost <= range.begin) break;
  }
}

// The bytes of tile `index` of a tensor.
struct TileBytes {
  std::int64_t first;
  int bytes;
};
__device__ __forceinline__ TileBytes bytes_of_tile(const TensorEntry& entry, std::uint32_t index) {
  constexpr auto kTile = static_cast<std::int64_t>(order::kTileBytes);
  const std::int64_t first = index * kTile;
  const std::int64_t left = entry.bytes - first;
  return {first, static_cast<int>(left < kTile ? left : kTile)};
}

// Objects of global memory that other blocks wrote in this launch: past this multiprocessor's cache.
template <class T>
__device__ __forceinline__ void load_fresh(const void* from, T& to) {
  static_assert(sizeof(T) % 8 == 0);
  unsigned long long words[sizeof(T) / 8];
  for (std::size_t i = 0; i < sizeof(T) / 8; ++i)
    words[i] = __ldcg(static_cast<const unsigned long long*>(from) + i);
  memcpy(&to, words, sizeof(T));
}

}  // namespace gradclip::cuda
