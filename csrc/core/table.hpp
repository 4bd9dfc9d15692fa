// Vectors whose memory is kept for the next call of the same thread.
//
// A list of 20 000 gradients needs 2 MB of tables. Given back to the system and asked for anew they
// cost 320 page faults a call, half of its time.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <new>
#include <utility>
#include <vector>

namespace gradclip {

// What a thread has given back: a few blocks, of a size for which malloc would ask the system.
class SpareBlocks {
 public:
  // Sizes are powers of two: what is given back serves whatever needs about as much. A thread keeps
  // at most 12 blocks of 4 MB, which hold the tables of some 100 000 gradients.
  static constexpr std::size_t kSmallest = std::size_t{32} << 10, kLargest = std::size_t{4} << 20;

  SpareBlocks() = default;
  SpareBlocks(const SpareBlocks&) = delete;
  SpareBlocks& operator=(const SpareBlocks&) = delete;
  ~SpareBlocks() {
    for (const Block& block : blocks_) ::operator delete(block.memory);
  }

  void* take(std::size_t bytes) {
    for (Block& block : blocks_)
      if (block.memory && block.bytes == bytes) return std::exchange(block.memory, nullptr);
    return ::operator new(bytes);
  }
  void give_back(void* memory, std::size_t bytes) {
    // In the place of an empty block, or of the one given back longest ago.
    Block* place = &blocks_[next_++ % blocks_.size()];
    for (Block& block : blocks_)
      if (!block.memory) place = &block;
    ::operator delete(place->memory);
    *place = {memory, bytes};
  }

  static SpareBlocks& of_this_thread() {
    thread_local SpareBlocks spare;
    return spare;
  }

 private:
  struct Block {
    void* memory = nullptr;
    std::size_t bytes = 0;
  };
  std::array<Block, 12> blocks_;  // as many tables as a call has
  std::size_t next_ = 0;
};

template <class T>
struct TableAllocator {
  using value_type = T;

  TableAllocator() = default;
  template <class U>
  TableAllocator(const TableAllocator<U>&) {}

  static bool is_kept(std::size_t bytes) {
    return bytes >= SpareBlocks::kSmallest && bytes <= SpareBlocks::kLargest;
  }
  T* allocate(std::size_t n) {
    const std::size_t bytes = n * sizeof(T);
    return static_cast<T*>(is_kept(bytes) ? SpareBlocks::of_this_thread().take(std::bit_ceil(bytes))
                                          : ::operator new(bytes));
  }
  void deallocate(T* memory, std::size_t n) {
    const std::size_t bytes = n * sizeof(T);
    if (is_kept(bytes))
      SpareBlocks::of_this_thread().give_back(memory, std::bit_ceil(bytes));
    else
      ::operator delete(memory);
  }
  bool operator==(const TableAllocator&) const { return true; }
};

template <class T>
using Table = std::vector<T, TableAllocator<T>>;

}  // namespace gradclip
