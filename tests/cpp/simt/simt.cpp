#include "simt.hpp"

#include <algorithm>
#include <exception>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "fiber.hpp"

namespace simt {
namespace {

enum class State { ready, at_barrier, at_exchange, done };

struct Block;
struct Warp {
  unsigned alive = 0, arrived = 0, mask = 0, generation = 0;
  Place place{};
  Slot slots[2][32];  // two: a quick lane may begin the next exchange before a slow one has read
};
struct Thread {
  unsigned index = 0;
  Block* block = nullptr;
  Warp* warp = nullptr;
  State state = State::ready;
  Place place{};
  Fiber* fiber = nullptr;
};
struct Block {
  unsigned index = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<std::uint64_t> shared;  // exactly what was asked for: a sanitizer sees its end
  unsigned alive = 0, arrived = 0;
  int votes = 0, votes_before = 0;
  Place place{};
};

struct Grid {
  dim3 grid, block;
  const std::function<void()>* body = nullptr;
  std::exception_ptr error;
};

Grid* grid = nullptr;
Thread* current = nullptr;
std::vector<std::unique_ptr<Fiber>> spare_fibers;
std::mt19937 random_engine;  // NOLINT(bugprone-random-generator-seed): seeded by every launch

std::string text(Place place) { return std::string(place.file) + ":" + std::to_string(place.line); }
std::string text(const Thread& thread) {
  return "block " + std::to_string(thread.block->index) + ", thread " +
         std::to_string(thread.index);
}
[[noreturn]] void fail(const std::string& what) { throw Error(text(*current) + ": " + what); }
bool same(Place a, Place b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

void thread_body() {
  try {
    (*grid->body)();
  } catch (...) {
    if (!grid->error) grid->error = std::current_exception();
  }
  current->state = State::done;
}

void wait_in(State state) {
  current->state = state;
  Fiber::leave(false);
}

void make_ready(Block& block, unsigned first, unsigned count, State state) {
  for (unsigned t = first; t < first + count; ++t)
    if (block.threads[t].state == state) block.threads[t].state = State::ready;
}

std::unique_ptr<Block> make_block(unsigned index, unsigned threads, std::size_t shared_bytes) {
  auto block = std::make_unique<Block>();
  block->index = index;
  block->alive = threads;
  block->threads.resize(threads);
  block->warps.resize(threads / 32);
  block->shared.assign((shared_bytes + 7) / 8, 0xcdcdcdcdcdcdcdcdu);
  for (unsigned t = 0; t < threads; ++t) {
    Thread& thread = block->threads[t];
    thread.index = t;
    thread.block = block.get();
    thread.warp = &block->warps[t / 32];
    thread.warp->alive |= 1u << t % 32;
  }
  return block;
}

void end_thread(Thread& thread) {
  thread.warp->alive &= ~(1u << thread.index % 32);
  Block& block = *thread.block;
  --block.alive;
  spare_fibers.emplace_back(thread.fiber);
  thread.fiber = nullptr;
  if (block.arrived != 0 && !grid->error)
    grid->error = std::make_exception_ptr(
        Error(text(thread) + ": ends while others wait at " + text(block.place)));
}

void run_thread(Thread& thread) {
  current = &thread;
  if (!thread.fiber) {
    if (spare_fibers.empty()) spare_fibers.push_back(std::make_unique<Fiber>());
    thread.fiber = spare_fibers.back().release();
    spare_fibers.pop_back();
    thread.fiber->start(thread_body);
  }
  thread.fiber->resume();
  current = nullptr;
  if (thread.state == State::done) end_thread(thread);
}

void run_blocks(std::vector<std::unique_ptr<Block>>& blocks) {
  std::vector<Thread*> order;
  for (const auto& block : blocks)
    for (Thread& thread : block->threads) order.push_back(&thread);
  for (;;) {
    if (schedule().seed != 0) std::shuffle(order.begin(), order.end(), random_engine);
    bool any_ran = false;
    for (Thread* const thread : order) {
      if (thread->state != State::ready) continue;
      any_ran = true;
      run_thread(*thread);
      if (grid->error) return;
    }
    order.erase(std::remove_if(order.begin(), order.end(),
                               [](const Thread* t) { return t->state == State::done; }),
                order.end());
    if (order.empty()) return;
    if (any_ran) continue;
    std::string message = "deadlock:";
    for (std::size_t k = 0; k < order.size() && k < 4; ++k)
      message += "\n  " + text(*order[k]) + " waits at " + text(order[k]->place);
    grid->error = std::make_exception_ptr(Error(message));
    return;
  }
}

}  // namespace

Schedule& schedule() {
  static Schedule value;
  return value;
}
Counters& counters() {
  static Counters value;
  return value;
}

dim3 thread_index() { return dim3(current->index); }
dim3 block_index() { return dim3(current->block->index); }
dim3 block_size() { return grid->block; }
dim3 grid_size() { return grid->grid; }
void* dynamic_shared() { return current->block->shared.data(); }
unsigned lane() { return current->index % 32; }

int block_barrier(int vote, Place place) {
  Block& block = *current->block;
  current->place = place;
  if (block.arrived != 0 && !same(block.place, place))
    fail("is at the barrier " + text(place) + " while others wait at " + text(block.place));
  if (block.alive != block.threads.size())
    fail("is at the barrier " + text(place) + ", but some thread of the block has ended");
  block.place = place;
  block.votes += vote != 0;
  if (++block.arrived == block.alive) {
    block.arrived = 0;
    block.votes_before = block.votes;
    block.votes = 0;
    make_ready(block, 0, block.alive, State::at_barrier);
  } else {
    wait_in(State::at_barrier);
  }
  return block.votes_before;
}

const Slot* warp_exchange(unsigned mask, Slot mine, Place place) {
  Warp& warp = *current->warp;
  current->place = place;
  const unsigned me = 1u << lane();
  if (!(mask & me)) fail("is not in the mask of " + text(place));
  if (mask & ~warp.alive) fail("names a lane that has ended, at " + text(place));
  if (warp.arrived != 0 && (warp.mask != mask || !same(warp.place, place)))
    fail("is at " + text(place) + " while lanes of its warp wait at " + text(warp.place));
  warp.mask = mask;
  warp.place = place;
  const unsigned generation = warp.generation;
  Slot* const slots = warp.slots[generation % 2];
  slots[lane()] = mine;
  warp.arrived |= me;
  if (warp.arrived == mask) {
    warp.arrived = 0;
    ++warp.generation;
    make_ready(*current->block, current->index / 32 * 32, 32, State::at_exchange);
  } else {
    wait_in(State::at_exchange);
  }
  return slots;
}

unsigned ballot(unsigned mask, bool vote, Place place) {
  const Slot* const all = warp_exchange(mask, Slot{vote}, place);
  unsigned votes = 0;
  for (unsigned l = 0; l < 32; ++l)
    if (mask >> l & 1u) votes |= static_cast<unsigned>(all[l].bits != 0) << l;
  return votes;
}

void run_grid(dim3 grid_dim, dim3 block_dim, std::size_t shared_bytes,
              const std::function<void()>& body) {
  if (block_dim.x == 0 || block_dim.x % 32 != 0 || block_dim.x > 1024 || grid_dim.x == 0)
    throw Error("launch: expected a grid and blocks of 32 to 1024 threads");
  static std::mutex one_grid_at_a_time;
  const std::scoped_lock lock(one_grid_at_a_time);
  ++counters().launches;
  counters().blocks_of_last_launch = grid_dim.x;
  Grid here{grid_dim, block_dim, &body, nullptr};
  grid = &here;
  random_engine.seed(schedule().seed);
  std::vector<unsigned> order(grid_dim.x);
  for (unsigned b = 0; b < grid_dim.x; ++b) order[b] = b;
  if (schedule().seed != 0) std::shuffle(order.begin(), order.end(), random_engine);
  for (std::size_t first = 0; first < order.size() && !here.error;
       first += schedule().blocks_at_once) {
    std::vector<std::unique_ptr<Block>> blocks;
    for (std::size_t b = first; b < order.size() && b < first + schedule().blocks_at_once; ++b)
      blocks.push_back(make_block(order[b], block_dim.x, shared_bytes));
    run_blocks(blocks);
    for (const auto& block : blocks)
      for (Thread& thread : block->threads)
        if (thread.fiber) spare_fibers.emplace_back(thread.fiber);
  }
  grid = nullptr;
  if (here.error) std::rethrow_exception(here.error);
}

}  // namespace simt
