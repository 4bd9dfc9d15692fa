// The kernels that write: scale and zero, value clip. Element by element, so that no order matters:
// memory is taken from a multiple of 16 bytes on, with single elements before and after. The twin of
// cpu/change.cpp, which clips by value in two passes.
#pragma once

#include "core/element.hpp"
#include "cuda/measure.cuh"

namespace gradclip::cuda {

// The elements of a vector changed one by one: change(x) returns what is to stand there.
template <class T, class Change>
__device__ __forceinline__ uint4 change_vector(uint4 v, Change change) {
  if constexpr (sizeof(T) == 8) {
    const auto a = bit_copy<std::uint64_t>(change(join_words(v.x, v.y)));
    const auto b = bit_copy<std::uint64_t>(change(join_words(v.z, v.w)));
    return make_uint4(static_cast<unsigned>(a), static_cast<unsigned>(a >> 32),
                      static_cast<unsigned>(b), static_cast<unsigned>(b >> 32));
  } else if constexpr (sizeof(T) == 4) {
    const auto one = [&](unsigned word) {
      return bit_copy<unsigned>(change(bit_copy<float>(word)));
    };
    return make_uint4(one(v.x), one(v.y), one(v.z), one(v.w));
  } else {
    const auto two = [&](unsigned word) {
      const T low = change(T{static_cast<std::uint16_t>(word & 0xffffu)});
      const T high = change(T{static_cast<std::uint16_t>(word >> 16)});
      return static_cast<unsigned>(low.bits) | static_cast<unsigned>(high.bits) << 16;
    };
    return make_uint4(two(v.x), two(v.y), two(v.z), two(v.w));
  }
}

template <class T, class Change>
__device__ __forceinline__ void change_element(typename FloatBits<T>::Word* at, Change change) {
  const T x = change(bit_copy<T>(*at));
  *at = bit_copy<typename FloatBits<T>::Word>(x);
}

// Change bytes [first, end) of a tensor; from the end to the beginning if kChangesBackward: the norms went
// forward, so the end is still in the cache. __ldcg and __stcg say that it is global memory, which the
// compiler does not see where the address comes out of a table.
template <class T, int kVectors, class Change>
__device__ __forceinline__ void change_dense(std::byte* first, std::byte* end, Change change) {
  using Word = typename FloatBits<T>::Word;
  const auto up = [](std::byte* p) {
    return p + (16 - reinterpret_cast<std::uintptr_t>(p) % 16) % 16;
  };
  std::byte* const body = up(first) < end ? up(first) : end;
  std::byte* const body_end = body + (end - body) / 16 * 16;
  const auto by_element = [&](std::byte* from, std::byte* to) {
    auto* const at = reinterpret_cast<Word*>(from) + lane_id();
    if (reinterpret_cast<std::byte*>(at) < to) change_element<T>(at, change);
  };
  by_element(body_end, end);  // at most 15 bytes: 7 elements
  constexpr std::ptrdiff_t kStep = kVectors * 32 * 16;
  std::byte* const whole = body + (body_end - body) % kStep;
  std::byte* at = kChangesBackward ? body_end : whole;
  while (at != (kChangesBackward ? whole : body_end)) {
    if constexpr (kChangesBackward) at -= kStep;
    uint4 v[kVectors];
    auto* const mine = reinterpret_cast<uint4*>(at) + lane_id();
#pragma unroll
    for (int k = 0; k < kVectors; ++k) v[k] = __ldcg(mine + 32 * k);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) __stcg(mine + 32 * k, change_vector<T>(v[k], change));
    if constexpr (!kChangesBackward) at += kStep;
  }
  auto* const mine = reinterpret_cast<uint4*>(body) + lane_id();
  const auto is_there = [&](int k) { return mine + 32 * k < reinterpret_cast<uint4*>(whole); };
  uint4 v[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k)
    v[k] = is_there(k) ? __ldcg(mine + 32 * k) : make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int k = 0; k < kVectors; ++k)
    if (is_there(k)) __stcg(mine + 32 * k, change_vector<T>(v[k], change));
  by_element(first, body);
}

template <class T, class Change>
__device__ __forceinline__ void change_elements(const ElementMemory<T>& memory, std::int64_t first,
                                                std::int64_t end, Change change) {
  constexpr auto kSize = static_cast<std::int64_t>(sizeof(T));
  for (std::int64_t at = first + kSize * lane_id(); at < end; at += 32 * kSize)
    change_element<T>(memory.address(at), change);
}

// Change tiles of a tensor. change(x) for every real element.
template <class T, int kVectors = kTuning.vectors_in_flight, class Change>
__device__ __forceinline__ void change_tiles(const TensorEntry& entry, const TableView& table,
                                             const TileRange& tiles, Change change) {
  const std::int64_t first = tiles.first_byte(), end = tiles.end_byte(entry.bytes);
  if (entry.axes == 0)
    change_dense<T, kVectors>(entry.data + first, entry.data + end, change);
  else
    change_elements(element_memory<T>(entry, table), first, end, change);
}

__device__ __forceinline__ void scale_tiles(const TensorEntry& entry, const TableView& table,
                                            const TileRange& tiles, double factor) {
  visit_real_type(entry.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 8) {
      change_tiles<T>(entry, table, tiles, [=](double x) { return x * factor; });
    } else if (fits_float(factor)) {
      const auto narrow_factor = static_cast<float>(factor);
      change_tiles<T>(entry, table, tiles, [=](T x) {
        round_to(to_float(x) * narrow_factor, x);
        return x;
      });
    } else {
      change_tiles<T>(entry, table, tiles, [=](T x) {
        round_to(static_cast<float>(to_double(x) * factor), x);
        return x;
      });
    }
  });
}

// The same, but that no element is above the exact product in magnitude. Called, and with one vector in flight:
// it has ten times the instructions, and compiling them takes as long.
__device__ __noinline__ void scale_tiles_down(const TensorEntry& entry, const TableView& table,
                                              const TileRange& tiles, double factor) {
  visit_real_type(entry.dtype, [&](auto type) {
    using T = decltype(type);
    const double wide_factor = factor_below(factor);
    if constexpr (sizeof(T) < 8) {
      if (fits_float(factor) && !(factor > 1.0)) {  // by more, products may be too large
        const float narrow_factor = float_factor_below(factor);
        change_tiles<T, 1>(entry, table, tiles, [=](T x) { return scaled_down(x, narrow_factor); });
        return;
      }
    }
    change_tiles<T, 1>(entry, table, tiles, [=](T x) { return scaled_down(x, wide_factor); });
  });
}

template <class Entries>
__device__ __forceinline__ void change(const ChangeArguments& arguments, Entries entries) {
  auto action = static_cast<Action>(arguments.flags ? arguments.flags->action
                                                    : static_cast<std::uint8_t>(Action::scale));
  if (action == Action::nothing) return;
  const TableView& table = arguments.table;
  Ways& ways = shared_memory<Ways>();
  const auto visit = [&](std::uint32_t, std::uint32_t part, const TensorEntry& entry,
                         const TileRange& tiles) {
    double factor = arguments.factor;
    if (arguments.factors) {
      factor = arguments.factors[part];
    } else if (arguments.flags) {
      const std::uint32_t group = arguments.are_samples ? ways.cursor().row : table.group_of(part);
      factor = arguments.coefficients[group] / arguments.grad_scale;
    }
    if (action == Action::zero || (arguments.factors && sets_to_zero(factor))) {
      visit_real_type(entry.dtype, [&](auto type) {
        using T = decltype(type);
        change_tiles<T>(entry, table, tiles, [](T) { return T{}; });
      });
      return;
    }
    if (factor == 1.0) return;
    if (arguments.rounds_down)
      scale_tiles_down(entry, table, tiles, factor);
    else
      scale_tiles(entry, table, tiles, factor);
  };
  walk<kChangesBackward>(table, entries, ways, visit);
}

// Of pairs, element by element.
template <class Entries>
__device__ __forceinline__ void change_pairs(const ChangeArguments& arguments, Entries entries) {
  const auto action = static_cast<Action>(arguments.flags->action);
  if (action == Action::nothing) return;
  const TableView& table = arguments.table;
  Ways& ways = shared_memory<Ways>();
  const auto visit = [&](std::uint32_t, std::uint32_t part, const TensorEntry& entry,
                         const TileRange& tiles) {
    const std::uint32_t group = arguments.are_samples ? ways.cursor().row : table.group_of(part);
    const PairFormula formula = table.pairs[entry.first_axis].formula;
    const double factor = arguments.coefficients[group] / arguments.grad_scale;
    if (action == Action::scale && formula.is_difference && factor == 1.0) return;
    const PairMemory memory = pair_memory(entry, table);
    const std::int64_t first = tiles.first_byte() / 8, end = tiles.end_byte(entry.bytes) / 8;
    visit_real_type(memory.x.dtype, [&](auto type) {
      using T = decltype(type);
      for (std::int64_t at = first + lane_id(); at < end; at += 32) {
        const double y = memory.y.at(at);
        auto* const place = memory.x.template address<T>(at);
        T result;
        if (action == Action::zero) {
          round_from(formula.is_difference ? y : 0.0, result);
        } else {
          const double z =
              made_of(to_double(bit_copy<T>(*place)), y, memory.factor, memory.sign_factor);
          result = written_of<T>(formula, z, y, factor, arguments.rounds_down);
        }
        *place = bit_copy<typename FloatBits<T>::Word>(result);
      }
    });
  };
  walk<kChangesBackward>(table, entries, ways, visit);
}

template <class T>
__device__ __forceinline__ bool is_beyond(T x, typename FloatBits<T>::Word top) {
  using Word = typename FloatBits<T>::Word;
  const Word size = bit_copy<Word>(x) & static_cast<Word>(~FloatBits<T>::sign);
  return size > top && size <= FloatBits<T>::infinity;
}

// --- Clip by value ------------------------------------------------------------------------------------

// One tile: its largest magnitude is taken, and what is beyond the limit is changed.
template <class T>
__device__ __forceinline__ Largest clip_tile(const TensorEntry& entry, const TableView& table,
                                             std::uint32_t index, const ValueLimit& limit) {
  using Word = typename FloatBits<T>::Word;
  const TileBytes tile = bytes_of_tile(entry, index);
  std::uint64_t largest = 0;
  if (is_aligned(entry))
    largest = largest_of_tile<kTuning.rows_in_flight>(AlignedMemory<T, true>{entry.data},
                                                      tile.first, tile.bytes, T{});
  else
    largest = largest_of_tile<1>(element_memory<T>(entry, table), tile.first, tile.bytes, T{});
  const double value = value_of_pattern(entry.dtype, largest);
  int clipped = 0;
  const auto top = static_cast<Word>(limit.pattern(entry.dtype));
  if (largest > top) {
    change_tiles<T>(
        entry, table, {index, index + 1, static_cast<std::uint32_t>(tiles_of(entry.bytes))},
        [&](T x) {
          if (!is_beyond(x, top)) return x;
          clipped = 1;
          return bit_copy<T>(static_cast<Word>((bit_copy<Word>(x) & FloatBits<T>::sign) | top));
        });
    clipped = __any_sync(kFullWarp, clipped);
  }
  return {value, !is_finite(value), clipped != 0};
}

template <class Entries>
__device__ __forceinline__ void clip_by_value(const ValueClipArguments& arguments,
                                              Entries entries) {
  auto& shared = shared_memory<CombineShared<Largest>>();
  const ResultPointers& result = arguments.result;
  const bool last = accumulate(
      shared, arguments.table, entries, arguments.scratch,
      [&](std::uint32_t, const TensorEntry& entry, const TileRange& tiles, Largest& running) {
        visit_real_type(entry.dtype, [&](auto type) {
          for (std::uint32_t tile = tiles.begin; tile < tiles.end; ++tile) {
            const Largest largest =
                clip_tile<decltype(type)>(entry, arguments.table, tile, arguments.limit);
            if (lane_id() == 0) running.add(largest);
          }
        });
      },
      [&](std::uint32_t tensor, const Largest& largest, Largest& total) {
        result.norms[tensor] = largest.value;
        result.nonfinite[tensor] = largest.nonfinite != 0;
        total.add(largest);
      },
      [] {});
  if (!last || threadIdx.x != 0) return;
  *result.total_norm = *result.group_norms = shared.threads[0].value;
  *result.coefficients = 1.0;
  *result.flags = {shared.threads[0].clipped != 0, shared.threads[0].nonfinite != 0, 0, 0};
}

// --- Telling what is not finite -------------------------------------------------------------------------

// counts[2 i] NaN and counts[2 i + 1] infinite elements of tensor i, which begin as 0.
template <class Source, class Entries>
__device__ __forceinline__ void count_nonfinite(const CountArguments& arguments, Entries entries) {
  const TableView& table = arguments.table;
  unsigned long long* const counts = arguments.counts;
  const auto visit = [&](std::uint32_t i, std::uint32_t, const TensorEntry& entry,
                         const TileRange& tiles) {
    const auto itemsize = static_cast<std::int64_t>(size_of(entry.dtype));
    const std::int64_t first = tiles.first_byte() / itemsize;
    const std::int64_t end = tiles.end_byte(entry.bytes) / itemsize;
    Source::with_elements(entry, table, [&](const auto& memory, auto type) {
      using T = decltype(type);
      unsigned nan = 0, infinite = 0;
      for (std::int64_t at = first + lane_id(); at < end; at += 32) {
        const double re = element_at(memory, at * itemsize);
        const double im =
            memory.complex
                ? element_at(memory, at * itemsize + static_cast<std::int64_t>(sizeof(T)))
                : 0.0;
        const bool is_a_nan = is_nan(re) || is_nan(im);
        nan += is_a_nan;
        infinite += !is_a_nan && (!is_finite(re) || !is_finite(im));
      }
      if (nan) atomicAdd(&counts[2 * i], static_cast<unsigned long long>(nan));
      if (infinite) atomicAdd(&counts[2 * i + 1], static_cast<unsigned long long>(infinite));
    });
  };
  walk(table, entries, shared_memory<Ways>(), visit);
}

}  // namespace gradclip::cuda
