// The kernel of the norms: every tensor, all groups and the coefficients in one launch. The twin of
// cpu/measure.cpp, which leaves groups and coefficients to core/clip.cpp.
#pragma once

#include <type_traits>

#include "core/element.hpp"
#include "core/power.hpp"
#include "cuda/combine.cuh"
#include "cuda/decide.cuh"
#include "cuda/pair.cuh"
#include "cuda/tile.cuh"

namespace gradclip::cuda {

enum class Measure {
  squares,     // the 2-norm
  magnitudes,  // the 1-norm of real tensors
  largest,     // the maximum norm; the first pass of `powers`
  powers       // where a tensor needs_unit(); the second of two passes
};

template <Measure kMeasure>
struct AccumulatorOf {
  using Type = ExactSum;
};
template <>
struct AccumulatorOf<Measure::largest> {
  using Type = Largest;
};

template <class T>
__device__ __forceinline__ double element_at(const ElementMemory<T>& memory, std::int64_t offset) {
  const auto word = *memory.address(offset);
  if constexpr (sizeof(T) == 2)
    return to_double(T{word});
  else
    return bit_copy<T>(word);
}

// The magnitude of scale * x, x being element `index`.
template <class T, class Memory>
__device__ __forceinline__ double magnitude_at(const Memory& memory, std::int64_t index,
                                               double scale) {
  constexpr auto kSize = static_cast<std::int64_t>(sizeof(T));
  if (!memory.complex) return fabs(element_at(memory, index * kSize) * scale);
  return modulus(element_at(memory, 2 * index * kSize) * scale,
                 element_at(memory, (2 * index + 1) * kSize) * scale);
}

template <class Source>
__device__ __noinline__ Largest largest_of_tile(const TensorEntry& entry, const TableView& table,
                                                TileBytes tile) {
  Largest result;
  if (is_complex(entry.dtype)) {
    Source::with_elements(entry, table, [&](const auto& memory, auto type) {
      using T = decltype(type);
      if constexpr (sizeof(T) >= 4) {
        constexpr auto kSize = static_cast<std::int64_t>(2 * sizeof(T));
        const std::int64_t end = (tile.first + tile.bytes) / kSize;
        double value = 0.0;
        int nonfinite = 0;
        for (std::int64_t i = tile.first / kSize + lane_id(); i < end; i += 32) {
          value = larger(magnitude_at<T>(memory, i, 1.0), value);
          nonfinite |= !is_finite(element_at(memory, i * kSize)) ||
                       !is_finite(element_at(memory, i * kSize + kSize / 2));
        }
        for (int step = 16; step > 0; step /= 2)
          value = larger(__shfl_xor_sync(kFullWarp, value, step), value);
        result = {value, __ballot_sync(kFullWarp, nonfinite) != 0, 0};
      }
    });
    return result;
  }
  Source::with_memory(entry, table, [&](const auto& memory, auto type) {
    const double value = value_of_pattern(
        entry.dtype, largest_of_tile<rows_in_flight<std::remove_cvref_t<decltype(memory)>>()>(
                         memory, tile.first, tile.bytes, type));
    result = {value, !is_finite(value), 0};
  });
  return result;
}

template <Sum kSum, class Source>
__device__ __forceinline__ WideValue sum_tile(const TensorEntry& entry, const TableView& table,
                                              TileBytes tile) {
  WideValue sum;
  Source::with_memory(entry, table, [&](const auto& memory, auto type) {
    sum = sum_tile<kSum>(memory, tile.first, tile.bytes, type);
  });
  return sum;
}

// Terms (|x| / unit)^p of a tile, each thread a run of order::kTermsPerRun, added to `mine`.
template <class Source>
__device__ __noinline__ void add_powers_of_tile(const TensorEntry& entry, const TableView& table,
                                                TileBytes tile, double unit, double p,
                                                ExactSum& mine) {
  constexpr auto kRun = static_cast<std::int64_t>(order::kTermsPerRun);
  const double scale = order::power_scale(unit);
  const auto itemsize = static_cast<std::int64_t>(size_of(entry.dtype));
  const std::int64_t end = (tile.first + tile.bytes) / itemsize;
  Source::with_elements(entry, table, [&](const auto& memory, auto type) {
    using T = decltype(type);
    for (std::int64_t at = tile.first / itemsize + kRun * lane_id(); at < end; at += 32 * kRun) {
      double run = 0.0;
      for (std::int64_t i = at; i < end && i < at + kRun; ++i)
        run += power_call(magnitude_at<T>(memory, i, scale) / (unit * scale), p);
      add_to(mine, run, 0);
    }
  });
}

// Write one tensor's norm and flag, or the norm of a row that is a group, and add its sum to the total; or nothing
// but its sum. One thread.
template <Measure kMeasure, class Accumulator>
__device__ __noinline__ void finish_tensor(const MeasureArguments& arguments, std::uint32_t tensor,
                                           NormSum sum, bool nonfinite, Accumulator& total) {
  if (arguments.words) {
    store_sum(sum, arguments.words + tensor * kSumWords);
    return;
  }
  arguments.scratch.sums[tensor] = sum;
  if (arguments.table.rows) {
    if (arguments.grouping == Groups::row) write_group(arguments, tensor, sum);
    if constexpr (kMeasure == Measure::largest)
      arguments.scratch.units[tensor] = {0.0, nonfinite, 0};
  } else {
    arguments.result.norms[tensor] = norm_call(arguments.order, sum, arguments.grad_scale);
    arguments.result.nonfinite[tensor] = nonfinite;
  }
  if constexpr (kMeasure == Measure::largest)
    total.add(Largest{sum.value, nonfinite, 0});
  else
    add_to(total, sum.value, sum.exponent);
}

template <Measure kMeasure, class Accumulator>
__device__ __noinline__ void finish_tensor(const MeasureArguments& arguments, std::uint32_t tensor,
                                           const Accumulator& sum, Accumulator& total) {
  if constexpr (kMeasure == Measure::largest) {
    if (arguments.units_pass)
      arguments.scratch.units[tensor] = sum;
    else
      finish_tensor<kMeasure>(arguments, tensor, NormSum{sum.value, 0, 0.0}, sum.nonfinite != 0,
                              total);
  } else {
    const WideValue value = rounded(sum);
    NormSum norm_sum{value.value, value.exponent, 0.0};
    bool nonfinite = !is_finite(value.value);
    if constexpr (kMeasure == Measure::powers) {
      const TableView& table = arguments.table;
      const DType dtype = table.entries[tensor_of(table, tensor)].dtype;
      if (needs_unit(arguments.order, is_complex(dtype))) {
        const Largest unit = arguments.scratch.units[tensor];
        const double sum_of_terms = is_finite(unit.value) ? narrow(value) : 1.0;
        nonfinite = unit.nonfinite != 0;
        norm_sum = {sum_of_terms, 0, unit.value};
        if (arguments.order.kind == NormOrder::one)
          norm_sum = magnitude_sum(sum_of_terms, unit.value);
      }
    }
    finish_tensor<kMeasure>(arguments, tensor, norm_sum, nonfinite, total);
  }
}

// One tile, added to what this warp has of its tensor.
template <class Source, Measure kMeasure, class Accumulator>
__device__ __forceinline__ void add_tile(const MeasureArguments& arguments, std::uint32_t tensor,
                                         const TensorEntry& entry, TileBytes tile,
                                         Accumulator& running, Accumulator& mine) {
  const TableView& table = arguments.table;
  if constexpr (kMeasure == Measure::largest) {
    if (arguments.units_pass && !needs_unit(arguments.order, is_complex(entry.dtype))) return;
    const Largest largest = largest_of_tile<Source>(entry, table, tile);
    if (lane_id() == 0) running.add(largest);
  } else if constexpr (kMeasure == Measure::powers) {
    if (needs_unit(arguments.order, is_complex(entry.dtype))) {
      const double unit = arguments.scratch.units[tensor].value;
      if (unit != 0.0 && is_finite(unit))
        add_powers_of_tile<Source>(entry, table, tile, unit, arguments.order.p, mine);
    } else {
      const WideValue sum = sum_tile<Sum::magnitudes, Source>(entry, table, tile);
      if (lane_id() == 0) add_to(running, sum.value, sum.exponent);
    }
  } else {
    constexpr Sum kSum = kMeasure == Measure::squares ? Sum::squares : Sum::magnitudes;
    const WideValue sum = sum_tile<kSum, Source>(entry, table, tile);
    if (lane_id() == 0) add_to(running, sum.value, sum.exponent);
  }
}

// The walk of a block over its tensors, or rows: add_tiles(tensor, entry, tiles, running) adds a warp's tiles of
// a tensor to `running`, which lane 0 writes; finish(tensor, accumulator, total) by one thread for every
// tensor; end() by all when the block has no more. True as is_last_block().
template <class Accumulator, class Entries, class AddTiles, class Finish, class End>
__device__ __forceinline__ bool accumulate(CombineShared<Accumulator>& shared,
                                           const TableView& table, Entries entries,
                                           const Scratch& scratch, AddTiles add_tiles,
                                           Finish finish, End end) {
  prepare(shared);
  Accumulator& running = shared.running[warp_id()];
  // By reference to shared memory: a register less in the hot loops.
  const auto visit = [&](std::uint32_t, const std::uint32_t& i, const TensorEntry& entry,
                         const TileRange& tiles) {
    __syncwarp();
    if (lane_id() == 0) running = Accumulator{};
    __syncwarp();
    add_tiles(i, entry, tiles, running);
    __syncwarp();
    if (lane_id() != 0) return;
    if (tiles.whole())
      finish(i, running, shared.totals[warp_id()]);
    else
      leave_piece(shared, i, tiles);
  };
  do {
    if (lane_id() == 0)
      shared.ways.range() = Shares(table.cost, gridDim.x).range(shared.share, warp_id());
    __syncwarp();
    walk_range(table, entries, shared.ways, visit);
    combine(shared, table, entries, scratch, finish);
  } while (take_share(shared, table.cost, scratch));
  end();
  return is_last_block(shared, scratch);
}

// What a measurement of pairs has in shared memory besides: the sums of the second arrays, of each warp.
template <class Accumulator>
struct PairShared {
  PairShared() = delete;
  CombineShared<Accumulator> combined;
  PairSums sums[kWarps];
};

// The second arrays' part of a tile.
__device__ __forceinline__ void add_second(const TensorEntry& entry, const TableView& table,
                                           TileBytes tile, PairSums& sums) {
  const PairMemory second = pair_memory(entry, table).second();
  const PairFormula& formula = table.pairs[entry.first_axis].formula;
  if (formula.l2 != 0.0) {
    const WideValue sum = sum_tile<Sum::squares>(second, tile.first, tile.bytes, double{});
    if (lane_id() == 0) add_to(sums.squares, sum.value, sum.exponent);
  }
  if (formula.l1 != 0.0) {
    const WideValue sum = sum_tile<Sum::magnitudes>(second, tile.first, tile.bytes, double{});
    if (lane_id() == 0) add_to(sums.magnitudes, sum.value, sum.exponent);
  }
}
// Leave this block's sums, for the last one.
__device__ __noinline__ void leave_second(PairSums (&sums)[kWarps], const Scratch& scratch) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kWarps; ++warp) {
    add_to(sums[0].squares, sums[warp].squares);
    add_to(sums[0].magnitudes, sums[warp].magnitudes);
  }
  memcpy(&scratch.pair_totals[blockIdx.x], &sums[0], sizeof(sums[0]));
}
// The last block: the penalty. `sums` has an element for every thread.
__device__ __noinline__ void write_penalty(const MeasureArguments& arguments, ExactSum* sums) {
  const PairSums* const totals = arguments.scratch.pair_totals;
  const auto add_up = [&](std::size_t place) {
    ExactSum& mine = sums[threadIdx.x];
    mine = ExactSum{};
    for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads) {
      ExactSum part;
      load_fresh(reinterpret_cast<const std::byte*>(totals + b) + place, part);
      add_to(mine, part);
    }
    fold_in_block(sums, kThreads);
    const WideValue sum = rounded(sums[0]);
    __syncthreads();
    return sum;
  };
  const WideValue squares = add_up(offsetof(PairSums, squares));
  const WideValue magnitudes = add_up(offsetof(PairSums, magnitudes));
  if (threadIdx.x != 0) return;
  const TableView& table = arguments.table;
  const PairFormula formula = table.tensors == 0 ? PairFormula{} : table.pairs[0].formula;
  *arguments.result.penalty = penalty_of(squares, magnitudes, formula.l2, formula.l1);
}

template <Measure kMeasure, class Source, class Entries, class Shared>
__device__ __forceinline__ void measure(const MeasureArguments& arguments, Entries entries,
                                        Shared& all_shared) {
  using Accumulator = typename AccumulatorOf<kMeasure>::Type;
  constexpr bool kPairs = std::is_same_v<Source, OfPairs>;
  auto& shared = [&]() -> CombineShared<Accumulator>& {
    if constexpr (kPairs)
      return all_shared.combined;
    else
      return all_shared;
  }();
  if constexpr (kPairs) {
    if (lane_id() == 0) all_shared.sums[warp_id()] = PairSums{};
    __syncwarp();
  }
  const bool last = accumulate(
      shared, arguments.table, entries, arguments.scratch,
      [&](const std::uint32_t& i, const TensorEntry& entry, const TileRange& tiles,
          Accumulator& running) {
        // Of powers each thread adds up its own; then lane 0 takes those of all.
        Accumulator& mine = shared.threads[threadIdx.x];
        if constexpr (kMeasure == Measure::powers) mine = Accumulator{};
        for (std::uint32_t tile = tiles.begin; tile < tiles.end; ++tile) {
          add_tile<Source, kMeasure>(arguments, i, entry, bytes_of_tile(entry, tile), running,
                                     mine);
          if constexpr (kPairs)
            add_second(entry, arguments.table, bytes_of_tile(entry, tile),
                       all_shared.sums[warp_id()]);
        }
        if constexpr (kMeasure == Measure::powers) {
          __syncwarp();
          if (lane_id() == 0)
            for (unsigned t = 0; t < 32; ++t) add_to(running, shared.threads[threadIdx.x + t]);
        }
      },
      [&](std::uint32_t tensor, const Accumulator& sum, Accumulator& total) {
        finish_tensor<kMeasure>(arguments, tensor, sum, total);
      },
      [&] {
        if constexpr (kPairs) leave_second(all_shared.sums, arguments.scratch);
      });
  if (!last || arguments.words) return;
  NormSum total;
  if constexpr (kMeasure == Measure::largest) {
    if (arguments.units_pass) return;
    total = {shared.threads[0].value, 0, 0.0};
  } else {
    const WideValue sum = rounded(shared.threads[0]);
    total = {sum.value, sum.exponent, 0.0};
  }
  __syncthreads();
  static_assert(sizeof(ExactSum) * kThreads <= sizeof(shared.group_sums));
  if constexpr (kPairs) write_penalty(arguments, shared.group_sums);
  finish_measurement(arguments, total, shared.group_sums);
}

}  // namespace gradclip::cuda
