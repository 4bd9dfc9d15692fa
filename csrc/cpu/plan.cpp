#include "cpu/plan.hpp"

#include <algorithm>
#include <stdexcept>

#include "core/reduction_order.hpp"

namespace gradclip::cpu {
namespace {

// Small enough that threads end together and a chunk's tiles stay in L2 between reading and
// writing; large enough that taking a task (one atomic increment) costs nothing.
constexpr std::int64_t kTasksWanted = 64;
constexpr std::int64_t kSmallestTask = 4 * static_cast<std::int64_t>(order::kTileBytes);
constexpr std::int64_t kLargestTask = kTilesPerChunk * static_cast<std::int64_t>(order::kTileBytes);

}  // namespace

ChunkPlan make_plan(std::span<const std::int64_t> tensor_bytes,
                    std::span<const std::int64_t> rows) {
  if (tensor_bytes.size() >= kWhole)
    throw std::length_error("grads: expected fewer than 2^32 - 1 gradients, got more");
  ChunkPlan plan;
  for (const std::int64_t bytes : tensor_bytes)
    if (__builtin_add_overflow(plan.total_bytes, bytes, &plan.total_bytes))
      throw std::length_error("grads: expected at most 2^63 bytes together, got more");
  const auto tile = static_cast<std::int64_t>(order::kTileBytes);
  const std::int64_t task_bytes =
      std::clamp(plan.total_bytes / kTasksWanted, kSmallestTask, kLargestTask) / tile * tile;

  // Chunks of rows are more than half of a task, on an average.
  const std::int64_t most_chunks = plan.total_bytes / task_bytes * (rows.empty() ? 1 : 2);
  if (most_chunks > kWhole - static_cast<std::int64_t>(tensor_bytes.size()))
    throw std::length_error("grads: expected fewer than 2^32 - 1 chunks of 1 MB, got more");
  plan.chunks.reserve(tensor_bytes.size() +
                      static_cast<std::size_t>(plan.total_bytes / task_bytes));
  plan.task_begin.push_back(0);
  std::int64_t in_task = 0;
  for (std::size_t i = 0; i < tensor_bytes.size(); ++i) {
    const std::int64_t bytes = tensor_bytes[i];
    const std::int64_t row_bytes = rows.empty() || bytes == 0 ? bytes : bytes / rows[i];
    // As many rows as fit, or a part of the row that `first` is in.
    const bool is_whole = row_bytes <= task_bytes;
    const std::int64_t rows_bytes =
        row_bytes == bytes || !is_whole ? bytes : task_bytes / row_bytes * row_bytes;
    for (std::int64_t first = 0, length = 0; first < bytes; first += length) {
      length = is_whole ? std::min(bytes - first, rows_bytes)
                        : std::min(row_bytes - first % row_bytes, task_bytes);
      const std::uint32_t partial = is_whole ? kWhole : plan.partials++;
      plan.chunks.push_back({first, length, static_cast<std::uint32_t>(i), partial});
      in_task += length;
      if (in_task >= task_bytes) {
        plan.task_begin.push_back(static_cast<std::uint32_t>(plan.chunks.size()));
        in_task = 0;
      }
    }
  }
  if (plan.task_begin.back() != plan.chunks.size())
    plan.task_begin.push_back(static_cast<std::uint32_t>(plan.chunks.size()));
  return plan;
}

}  // namespace gradclip::cpu
