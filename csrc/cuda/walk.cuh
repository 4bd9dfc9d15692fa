// The walk of one warp over its share of the work: tensors, or their rows.
#pragma once

#include <cstdint>

#include "cuda/arguments.hpp"
#include "cuda/warp.cuh"

namespace gradclip::cuda {

// The last tensor that begins at or before `cost`. In memory a search with 32 probes at a time, since each
// waits; an argument lies in constant memory, which serves a warp one address after the other.
__device__ __forceinline__ std::uint32_t find_tensor(const TableView& table,
                                                     EntriesInArgument entries, std::int64_t cost) {
  std::uint32_t low = 0, count = table.tensors;
  while (count > 1) {
    const std::uint32_t half = count / 2;
    const bool before = entries[low + half].first_cost <= cost;
    low += before ? half : 0;
    count = before ? count - half : half;
  }
  return low;
}
__device__ __forceinline__ std::uint32_t find_tensor(const TableView& table,
                                                     EntriesInMemory entries, std::int64_t cost) {
  std::uint32_t low = 0, count = table.tensors;
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

// The tensor, or the row, that a warp is at, of a list in memory.
struct Cursor {
  TensorEntry part;
  TileRange tiles;
  std::int64_t stride, cost;     // from here to the next row
  std::uint32_t tensor, number;  // of the part
  std::uint32_t row, left;       // in the tensor; how many are left there, this one included
};
// Where the warps of a block are on their ways, in shared memory: hot loops have no register to spare for it.
struct Ways {
  CostRange ranges[kWarps];
  Cursor cursors[kWarps];

  __device__ __forceinline__ CostRange& range() { return ranges[warp_id()]; }
  __device__ __forceinline__ Cursor& cursor() { return cursors[warp_id()]; }
};

// The entry of row `row`.
__device__ __forceinline__ TensorEntry entry_of_row(TensorEntry entry, const RowEntry& rows,
                                                    std::int64_t row) {
  entry.bytes /= rows.count;
  entry.data += row * rows.stride;
  entry.first_cost += row * cost_of(entry.bytes);
  return entry;
}

// To the first part of a tensor that the range reaches, or to the last; one thread. `left` is 0 if there is none.
__device__ __forceinline__ void enter(Cursor& cursor, const CostRange& range,
                                      const TableView& table, bool backward) {
  const TensorEntry entry = table.entries[cursor.tensor];
  cursor.left = 1;
  cursor.part = entry;
  cursor.number = cursor.tensor;
  if (!table.rows) return;
  const RowEntry rows = table.rows[cursor.tensor];
  cursor.left = 0;
  if (rows.count == 0) return;
  const std::int64_t cost = cost_of(entry.bytes / rows.count);
  const std::int64_t begin = range.begin - entry.first_cost;
  const std::int64_t end = (range.end - 1 - entry.first_cost) / cost;
  const std::int64_t first = begin <= 0 ? 0 : begin / cost;
  const std::int64_t last = end < rows.count ? end : std::int64_t{rows.count} - 1;
  cursor.left = static_cast<std::uint32_t>(last - first + 1);
  cursor.row = static_cast<std::uint32_t>(backward ? last : first);
  cursor.number = rows.first + cursor.row;
  cursor.part = entry_of_row(entry, rows, cursor.row);
  cursor.stride = backward ? -rows.stride : rows.stride;
  cursor.cost = backward ? -cost : cost;
}
// To the next part on the way; one thread. `left` is 0 if there is none.
__device__ __forceinline__ void step(Cursor& cursor, const CostRange& range, const TableView& table,
                                     bool backward) {
  const std::uint32_t one = backward ? -1u : 1u;
  if (cursor.left > 1) {
    --cursor.left;
    cursor.row += one;
    cursor.number += one;
    cursor.part.data += cursor.stride;
    cursor.part.first_cost += cursor.cost;
    return;
  }
  do {
    cursor.left = 0;
    const bool is_last =
        backward ? cursor.tensor == 0 || table.entries[cursor.tensor].first_cost <= range.begin
                 : cursor.tensor + 1 >= table.tensors ||
                       table.entries[cursor.tensor + 1].first_cost >= range.end;
    if (is_last) return;
    cursor.tensor += one;
    enter(cursor, range, table, backward);
  } while (cursor.left == 0);
}
__device__ __noinline__ bool next_part(Ways& ways, const TableView& table, bool backward) {
  Cursor& cursor = ways.cursor();
  __syncwarp();
  if (lane_id() == 0) {
    step(cursor, ways.range(), table, backward);
    cursor.tiles = tile_range(cursor.part, ways.range());
  }
  __syncwarp();
  return cursor.left != 0;
}
__device__ __noinline__ bool first_part(Ways& ways, const TableView& table, bool backward) {
  const CostRange range = ways.range();
  if (range.begin >= range.end) return false;
  const std::uint32_t i =
      find_tensor(table, EntriesInMemory{table.entries}, backward ? range.end - 1 : range.begin);
  Cursor& cursor = ways.cursor();
  if (lane_id() == 0) {
    cursor.tensor = i;
    enter(cursor, range, table, backward);
    if (cursor.left == 0) step(cursor, range, table, backward);
    cursor.tiles = tile_range(cursor.part, range);
  }
  __syncwarp();
  return cursor.left != 0;
}

// visit(i, part, entry, tiles) for every part of tensor i of which a warp has tiles in its range of `ways`: in
// order, or from the last to the first.
template <bool kBackward = false, class Visit>
__device__ __forceinline__ void walk_range(const TableView& table, EntriesInMemory, Ways& ways,
                                           Visit visit) {
  if (!first_part(ways, table, kBackward)) return;
  do {
    const Cursor& cursor = ways.cursor();
    if (!cursor.tiles.empty()) visit(cursor.tensor, cursor.number, cursor.part, cursor.tiles);
  } while (next_part(ways, table, kBackward));
}
template <bool kBackward = false, class Visit>
__device__ __forceinline__ void walk_range(const TableView& table, EntriesInArgument entries,
                                           Ways& ways, Visit visit) {
  const CostRange& range = ways.range();
  if (range.begin >= range.end) return;
  std::uint32_t i = find_tensor(table, entries, kBackward ? range.end - 1 : range.begin);
  for (;; kBackward ? --i : ++i) {
    const TileRange tiles = tile_range(entries[i], range);
    if (!tiles.empty()) visit(i, i, entries[i], tiles);
    if (kBackward ? i == 0 || entries[i].first_cost <= range.begin
                  : i + 1 >= table.tensors || entries[i + 1].first_cost >= range.end)
      break;
  }
}

// All of the list, shared out beforehand.
template <bool kBackward = false, class Entries, class Visit>
__device__ __forceinline__ void walk(const TableView& table, Entries entries, Ways& ways,
                                     Visit visit) {
  if (lane_id() == 0)
    ways.range() =
        cost_range(table.cost, static_cast<std::int64_t>(blockIdx.x) * kWarps + warp_id(),
                   static_cast<std::int64_t>(gridDim.x) * kWarps);
  __syncwarp();
  walk_range<kBackward>(table, entries, ways, visit);
}

// The tensor that a part is, or is a row of.
__device__ __forceinline__ std::uint32_t tensor_of(const TableView& table, std::uint32_t part) {
  if (!table.rows) return part;
  std::uint32_t low = 0, count = table.tensors;
  while (count > 1) {
    const std::uint32_t half = count / 2;
    const bool before = table.rows[low + half].first <= part;
    low += before ? half : 0;
    count = before ? count - half : half;
  }
  return low;
}
__device__ __noinline__ TensorEntry entry_of_part(const TableView& table, EntriesInMemory entries,
                                                  std::uint32_t part) {
  if (!table.rows) return entries[part];
  const std::uint32_t i = tensor_of(table, part);
  return entry_of_row(entries[i], table.rows[i], part - table.rows[i].first);
}
__device__ __forceinline__ const TensorEntry& entry_of_part(const TableView&,
                                                            EntriesInArgument entries,
                                                            std::uint32_t part) {
  return entries[part];
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
