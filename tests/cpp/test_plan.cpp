// cpu/plan.hpp: every byte of every tensor once, in whole tiles, in tasks of bounded size.
#include <algorithm>
#include <vector>

#include "core/reduction_order.hpp"
#include "cpu/plan.hpp"
#include "support.hpp"

using namespace gradclip;
using namespace gradclip::test;

namespace {

constexpr auto kTile = static_cast<std::int64_t>(order::kTileBytes);
// As in plan.cpp: what a task may hold, and how many there should be.
constexpr std::int64_t kSmallest = 4 * kTile, kLargest = 64 * kTile, kTasks = 64;

void check_plan(const std::vector<std::int64_t>& sizes) {
  const cpu::ChunkPlan plan = cpu::make_plan(sizes);
  std::int64_t total = 0, longest_chunk = 0;
  std::vector<std::int64_t> covered(sizes.size());
  std::vector<int> chunks_of(sizes.size());
  std::uint32_t partials = 0, last_tensor = 0;
  for (const cpu::Chunk& chunk : plan.chunks) {
    REQUIRE(chunk.tensor < sizes.size());
    CHECK(chunk.tensor >= last_tensor);
    last_tensor = chunk.tensor;
    CHECK(chunk.first_byte == covered[chunk.tensor]);  // no gap, no overlap
    CHECK(chunk.first_byte % kTile == 0);
    CHECK(chunk.bytes > 0);
    covered[chunk.tensor] += chunk.bytes;
    ++chunks_of[chunk.tensor];
    longest_chunk = std::max(longest_chunk, chunk.bytes);
    if (chunk.partial != cpu::kWhole) CHECK(chunk.partial == partials++);
  }
  CHECK(covered == sizes);
  CHECK(plan.partials == partials);
  for (const cpu::Chunk& chunk : plan.chunks)
    CHECK((chunk.partial == cpu::kWhole) == (chunks_of[chunk.tensor] == 1));
  for (const std::int64_t size : sizes) total += size;
  CHECK(plan.total_bytes == total);
  CHECK(longest_chunk <= kLargest);

  // Tasks are all chunks in order; none is empty, none much larger than the others.
  CHECK(plan.task_begin.front() == 0);
  CHECK(plan.task_begin.back() == plan.chunks.size());
  const std::int64_t wanted = std::clamp(total / kTasks, kSmallest, kLargest);
  for (std::size_t task = 0; task < plan.tasks(); ++task) {
    CHECK(plan.task_begin[task] < plan.task_begin[task + 1]);
    std::int64_t bytes = 0;
    for (std::size_t c = plan.task_begin[task]; c < plan.task_begin[task + 1]; ++c)
      bytes += plan.chunks[c].bytes;
    CHECK(bytes < 2 * wanted);
    if (task + 1 < plan.tasks()) CHECK(bytes > wanted - kTile);
  }
}

}  // namespace

TEST_CASE("no tensors, empty tensors") {
  check_plan({});
  check_plan({0});
  check_plan({0, 0, 4, 0});
  CHECK(cpu::make_plan({}).tasks() == 0);
}

TEST_CASE("sizes around a tile, the smallest and the largest task") {
  for (const std::int64_t around :
       {kTile, kSmallest, kSmallest * kTasks, kLargest, kLargest * kTasks})
    for (const std::int64_t by :
         {-kTile, std::int64_t{-2}, std::int64_t{0}, std::int64_t{2}, kTile})
      check_plan({std::max<std::int64_t>(2, around + by)});
}

TEST_CASE("random lists of tensors") {
  Random random(1);
  for (int trial = 0; trial < 300; ++trial) {
    std::vector<std::int64_t> sizes(static_cast<std::size_t>(random.between(1, 60)));
    for (std::int64_t& size : sizes)
      size = random.between(0, std::int64_t{1} << random.between(1, 26));
    check_plan(sizes);
  }
}

TEST_CASE("thousands of small tensors share tasks") {
  const std::vector<std::int64_t> sizes(20000, 400);
  check_plan(sizes);
  CHECK(cpu::make_plan(sizes).tasks() <= 2 * kTasks);
}

TEST_CASE("a plan needs no memory of the size of the tensors") {
  const std::int64_t huge = std::int64_t{1} << 40;
  CHECK(cpu::make_plan(std::vector{huge}).tasks() == static_cast<std::size_t>(huge / kLargest));
}

TEST_CASE("chunks of rows are whole rows, or parts of one that begin at its tiles") {
  Random random(2);
  for (int trial = 0; trial < 300; ++trial) {
    const auto tensors = static_cast<std::size_t>(random.between(1, 20));
    std::vector<std::int64_t> sizes(tensors), rows(tensors);
    std::int64_t total = 0, parts = 0;
    for (std::size_t i = 0; i < tensors; ++i) {
      const std::int64_t row_bytes = random.between(0, std::int64_t{1} << random.between(1, 23));
      rows[i] = random.between(0, 40);
      sizes[i] = rows[i] * row_bytes;
      total += sizes[i];
    }
    const cpu::ChunkPlan plan = cpu::make_plan(sizes, rows);
    const std::int64_t task = std::clamp(total / kTasks, kSmallest, kLargest) / kTile * kTile;
    std::vector<std::int64_t> covered(tensors);
    for (const cpu::Chunk& chunk : plan.chunks) {
      CHECK(chunk.first_byte == covered[chunk.tensor]);
      covered[chunk.tensor] += chunk.bytes;
      CHECK(chunk.bytes > 0);
      CHECK(chunk.bytes <= task);
      const std::int64_t row_bytes = sizes[chunk.tensor] / rows[chunk.tensor];
      const std::int64_t in_row = chunk.first_byte % row_bytes;
      if (chunk.partial == cpu::kWhole) {
        CHECK(in_row == 0);
        CHECK(chunk.bytes % row_bytes == 0);
      } else {
        CHECK(chunk.partial == parts++);
        CHECK(row_bytes > task);
        CHECK(in_row % kTile == 0);
        CHECK(in_row + chunk.bytes <= row_bytes);
      }
    }
    CHECK(covered == sizes);
    CHECK(plan.partials == parts);
  }
}
