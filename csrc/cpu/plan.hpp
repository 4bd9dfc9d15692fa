// The chunk table of a list of sizes: who works on what. It knows nothing of pointers, and because tile
// sums are added exactly, it cannot change a result. The twin of cuda/plan.hpp, which has no table.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/table.hpp"

namespace gradclip::cpu {

// A run of whole tiles of one tensor (the last tile may be short), or of its rows.
struct Chunk {
  std::int64_t first_byte;
  std::int64_t bytes;
  std::uint32_t tensor;
  std::uint32_t partial;  // where a part of a tensor, or row, leaves its sum; kWhole: it is no part
};
inline constexpr std::uint32_t kWhole = 0xffffffffu;
inline constexpr std::int64_t kTilesPerChunk = 64;  // at most

struct ChunkPlan {
  Table<Chunk> chunks;  // tensor by tensor, in order
  // Work for one thread at a time: task t is chunks [task_begin[t], task_begin[t + 1]).
  Table<std::uint32_t> task_begin;
  std::uint32_t partials = 0;
  std::int64_t total_bytes = 0;

  std::size_t tasks() const { return task_begin.size() - 1; }
};

// `tensor_bytes[i]`: the bytes of tensor i; tensors of 0 bytes have no chunk. With `rows`, the number of rows of
// each: a chunk is whole rows, or a part of one, which then is what leaves a partial sum.
ChunkPlan make_plan(std::span<const std::int64_t> tensor_bytes,
                    std::span<const std::int64_t> rows = {});

}  // namespace gradclip::cpu
