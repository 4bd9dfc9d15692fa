// From the sums of tiles to the sums of tensors (or rows, which are tensors here): through the warps of a block,
// then through blocks (through shares, rather: a block may have several).
//
// Only a tensor that a warp does not have whole comes here. Each warp leaves what it has of its first
// and its last tensor in two slots; the block joins neighbours; what is still not whole goes to global
// memory, and the block that brings the last missing tiles of a tensor adds them up. No order matters.
#pragma once

#include "cuda/arguments.hpp"
#include "cuda/walk.cuh"

namespace gradclip::cuda {

inline constexpr int kSlots = 2 * kWarps;
inline constexpr std::uint32_t kNoTensor = 0xffffffffu;

struct Piece {
  std::uint32_t tensor;  // kNoTensor: the slot is empty
  TileRange tiles;
};

template <class Accumulator>
struct CombineShared {  // raw memory: what is read has been assigned before
  CombineShared() = delete;
  Accumulator running[kWarps];  // of the tensor that a warp is at
  Accumulator pieces[kSlots];
  Accumulator totals[32];  // over the tensors that are done: of every warp, of every slot
  union {
    Accumulator threads[kThreads];  // of every thread, for what threads add up together
    ExactSum group_sums[kThreads];  // the same memory, for the last block
  };
  Piece piece_of[kSlots];
  Ways ways;
  std::uint32_t to_merge[2];  // tensors of which this share brought the last tiles
  std::uint32_t share;        // which this block is at
  bool is_last_block;
};
static_assert(kWarps + kSlots <= 32);

// Additions, never inlined: one copy of their code is enough. Accumulators are passed by reference and lie in
// shared or global memory; in registers they would have to be stored first.
template <class Accumulator>
__device__ __noinline__ void add_to(Accumulator& sum, const Accumulator& part) {
  sum.add(part);
}
__device__ __noinline__ void add_to(ExactSum& sum, double value, int exponent) {
  sum.add(value, exponent);
}
// A part that another block wrote in this launch.
template <class Accumulator>
__device__ __noinline__ void add_fresh(Accumulator& sum, const Accumulated* from) {
  Accumulator part;
  load_fresh(from, part);
  sum.add(part);
}
__device__ __noinline__ WideValue rounded(const ExactSum& sum) { return sum.rounded(); }

// Add up elements 0 to count - 1, count being a power of two, into element 0.
template <class Accumulator>
__device__ __forceinline__ void fold_in_block(Accumulator* elements, int count) {
  for (int half = count / 2; half > 0; half /= 2) {
    __syncthreads();
    const int t = static_cast<int>(threadIdx.x);
    if (t < half) add_to(elements[t], elements[t + half]);
  }
  __syncthreads();
}

template <class Accumulator>
__device__ __forceinline__ void prepare(CombineShared<Accumulator>& shared) {
  const int t = static_cast<int>(threadIdx.x);
  if (t < kSlots) shared.piece_of[t].tensor = kNoTensor;
  if (t < 32) shared.totals[t] = Accumulator{};
  if (t < 2) shared.to_merge[t] = kNoTensor;
  if (t == 0) shared.share = blockIdx.x;
  __syncthreads();
}

// To the next share that is kept back; false if there is none.
template <class Accumulator>
__device__ __noinline__ bool take_share(CombineShared<Accumulator>& shared, std::int64_t cost,
                                        const Scratch& scratch) {
  const Shares shares(cost, gridDim.x);
  if (shares.kept_back == 0) return false;
  const int t = static_cast<int>(threadIdx.x);
  __syncthreads();
  if (t < kSlots) shared.piece_of[t].tensor = kNoTensor;
  if (t < 2) shared.to_merge[t] = kNoTensor;
  if (t == 0) shared.share = gridDim.x + atomicAdd(scratch.shares_taken, 1u);
  __syncthreads();
  return shared.share < shares.count();
}

// The piece of a tensor that this warp has, for the block to join. By one thread.
template <class Accumulator>
__device__ __forceinline__ void leave_piece(CombineShared<Accumulator>& shared,
                                            std::uint32_t tensor, const TileRange& tiles) {
  const int slot = 2 * warp_id() + (tiles.begin == 0);
  shared.pieces[slot] = shared.running[warp_id()];
  shared.piece_of[slot] = {tensor, tiles};
}

// Join the pieces of all warps. finish(tensor, accumulator, total) is called, by one thread, with each
// tensor that is whole now, and adds it to `total`.
template <class Accumulator, class Entries, class Finish>
__device__ __forceinline__ void combine(CombineShared<Accumulator>& shared, const TableView& table,
                                        Entries entries, const Scratch& scratch, Finish finish) {
  const int t = static_cast<int>(threadIdx.x);
  __syncthreads();
  if (t < kSlots && shared.piece_of[t].tensor != kNoTensor) {
    const std::uint32_t tensor = shared.piece_of[t].tensor;
    TileRange tiles = shared.piece_of[t].tiles;
    bool is_first = true;
    for (int s = t - 1; s >= 0; --s) is_first = is_first && shared.piece_of[s].tensor != tensor;
    if (is_first) {
      for (int s = t + 1; s < kSlots; ++s) {
        if (shared.piece_of[s].tensor != tensor) continue;
        add_to(shared.pieces[t], shared.pieces[s]);
        tiles.end = shared.piece_of[s].tiles.end;
      }
      if (tiles.whole()) {
        finish(tensor, shared.pieces[t], shared.totals[kWarps + t]);
      } else {
        const int place = tiles.begin == 0;
        static_assert(sizeof(Accumulator) <= sizeof(Accumulated));
        memcpy(&scratch.partials[2 * shared.share + place], &shared.pieces[t], sizeof(Accumulator));
        __threadfence();
        const std::uint32_t brought = tiles.end - tiles.begin;
        const std::uint32_t before = atomicAdd(&scratch.tiles_done[tensor], brought);
        __threadfence();  // what the others left before their atomics is seen by this block after its barrier
        if (before + brought == tiles.all) shared.to_merge[place] = tensor;
      }
    }
  }
  __syncthreads();
  for (int m = 0; m < 2; ++m) {
    const std::uint32_t tensor = shared.to_merge[m];
    if (tensor == kNoTensor) continue;
    const TensorEntry& entry = entry_of_part(table, entries, tensor);
    const Shares shares(table.cost, gridDim.x);
    const std::int64_t last_tile = entry.first_cost + (tiles_of(entry.bytes) - 1) * kTileCost;
    const std::int64_t first = shares.at(entry.first_cost), last = shares.at(last_tile);
    shared.threads[t] = Accumulator{};
    for (std::int64_t s = first + t; s <= last; s += kThreads)
      add_fresh(shared.threads[t], &scratch.partials[2 * s + (s == first)]);
    fold_in_block(shared.threads, kThreads);
    if (t == 0) {
      scratch.tiles_done[tensor] = 0;
      finish(tensor, shared.threads[0], shared.totals[0]);
    }
    __syncthreads();
  }
}

// Leave this block's total. True in all threads of the block that is the last to do so: it then has
// the total over all blocks in shared.threads[0].
template <class Accumulator>
__device__ __forceinline__ bool is_last_block(CombineShared<Accumulator>& shared,
                                              const Scratch& scratch) {
  const int t = static_cast<int>(threadIdx.x);
  fold_in_block(shared.totals, 32);
  if (t == 0) {
    memcpy(&scratch.block_totals[blockIdx.x], &shared.totals[0], sizeof(Accumulator));
    __threadfence();
    shared.is_last_block = atomicAdd(scratch.blocks_done, 1u) == gridDim.x - 1;
    __threadfence();  // as above
  }
  __syncthreads();
  if (!shared.is_last_block) return false;
  if (t == 0) *scratch.blocks_done = *scratch.shares_taken = 0;
  shared.threads[t] = Accumulator{};
  for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads) {
    add_fresh(shared.threads[t], &scratch.block_totals[b]);
  }
  fold_in_block(shared.threads, kThreads);
  return true;
}

}  // namespace gradclip::cuda
