// core/table.hpp: memory that a thread gives back is used again, and by nobody twice.
#include <algorithm>
#include <thread>
#include <vector>

#include "core/table.hpp"
#include "support.hpp"

using namespace gradclip;
using namespace gradclip::test;

namespace {

// In elements of `int`: the smallest and the largest tables that are kept.
constexpr std::size_t kSmallest = SpareBlocks::kSmallest / sizeof(int);
constexpr std::size_t kLargest = SpareBlocks::kLargest / sizeof(int);

const int* address_of_new(std::size_t size) { return Table<int>(size).data(); }

}  // namespace

TEST_CASE("a table takes the memory that the last one of its size gave back") {
  for (const std::size_t size : {kSmallest, kSmallest + 1, 100 * kSmallest, kLargest}) {
    const int* const first = address_of_new(size);
    CHECK(address_of_new(size) == first);
  }
}

TEST_CASE("tables of any sizes that live at once do not share memory, and begin with zeros") {
  Random random(1);
  std::vector<Table<int>> tables;
  for (int step = 0; step < 2000; ++step) {
    if (tables.size() < 20 && random.bits() % 2) {
      const auto size = static_cast<std::size_t>(random.between(1, 4 * kSmallest));
      tables.emplace_back(size);
      CHECK(std::ranges::all_of(tables.back(), [](int x) { return x == 0; }));
      std::ranges::fill(tables.back(), step);
    } else if (!tables.empty()) {
      std::swap(tables[random.bits() % tables.size()], tables.back());
      const Table<int>& last = tables.back();
      CHECK(std::ranges::all_of(last, [&](int x) { return x == last[0]; }));
      tables.pop_back();
    }
  }
}

TEST_CASE("a table may end in another thread than it began in, and a thread may end before it") {
  for (int trial = 0; trial < 20; ++trial) {
    Table<int> here(2 * kSmallest, 1), from_there;
    std::thread([&, there = std::move(here)]() mutable {
      CHECK(there[0] == 1);
      from_there = Table<int>(2 * kSmallest, 2);
      there = {};
    }).join();
    CHECK(from_there[0] == 2);
  }
}
