// Kernels on the CPU: one fiber for each thread of a grid, with barriers, warp exchanges and shared
// memory, in an order that a seed chooses. What CUDA leaves undefined is an error that names the place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>

struct dim3 {
  unsigned x, y = 1, z = 1;
  constexpr explicit dim3(unsigned n = 1) : x(n) {}
};

namespace simt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// In what order blocks and threads run: seed 0 is the natural one.
struct Schedule {
  unsigned seed = 0;
  unsigned blocks_at_once = 1;
};
Schedule& schedule();

// Since the process began.
struct Counters {
  std::size_t launches = 0, allocations = 0, copies = 0, waits = 0, bytes_copied = 0;
  std::size_t loads = 0;  // through the read-only cache
  unsigned blocks_of_last_launch = 0;
};
Counters& counters();

// --- Of the thread that runs ------------------------------------------------------------------------

struct Place {
  const char* file;
  int line;
};
dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();
void* dynamic_shared();

// Wait for all threads of the block; returns how many gave a `vote` that is not 0.
int block_barrier(int vote, Place place);
// Wait for the lanes of `mask`, then visit(lane, value) what each of them brought.
struct Slot {
  std::uint64_t bits;
};
const Slot* warp_exchange(unsigned mask, Slot mine, Place place);
unsigned lane();

template <class T>
T shuffle(unsigned mask, T value, unsigned from, Place place) {
  static_assert(sizeof(T) <= sizeof(Slot));
  Slot mine{};
  std::memcpy(&mine, &value, sizeof(T));
  const Slot* const all = warp_exchange(mask, mine, place);
  T result;
  std::memcpy(&result, &all[from % 32], sizeof(T));
  return result;
}
unsigned ballot(unsigned mask, bool vote, Place place);

// --- Launches -----------------------------------------------------------------------------------------

void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& body);

template <class Arguments>
void launch(void (*kernel)(Arguments), dim3 grid, dim3 block, std::size_t shared_bytes,
            const Arguments& arguments) {
  run_grid(grid, block, shared_bytes, [&] { kernel(arguments); });
}

}  // namespace simt
