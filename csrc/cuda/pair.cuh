// Pairs: each number is made as it is loaded, of what lies in two arrays. The twin of cpu/pair.hpp, which makes
// tiles in a buffer.
#pragma once

#include "core/pair.hpp"
#include "cuda/memory.cuh"

namespace gradclip::cuda {

// One of the two arrays, by its real numbers.
struct Operand {
  std::byte* data;
  const Axis* axes;
  int axis_count;
  DType dtype;

  template <class T>
  __device__ __forceinline__ typename FloatBits<T>::Word* address(std::int64_t number) const {
    constexpr auto kSize = static_cast<std::int64_t>(sizeof(T));
    const std::int64_t at =
        axis_count == 0
            ? number * kSize
            : strided_offset(axes, axis_count, kSize << is_complex(dtype), number * kSize);
    return reinterpret_cast<typename FloatBits<T>::Word*>(data + at);
  }
  __device__ __forceinline__ double at(std::int64_t number) const {
    return visit_real_type(dtype, [&](auto type) {
      using T = decltype(type);
      return to_double(bit_copy<T>(*address<T>(number)));
    });
  }
};

// What is made of a pair, as if it lay in memory: offsets are in bytes of that. Or the second array alone.
struct PairMemory {
  static constexpr bool kIsWide = false;
  static constexpr int kRowsInFlight = 2;
  Operand x, y;
  double factor, sign_factor;
  bool complex, is_second;

  __device__ __forceinline__ double number(std::int64_t number) const {
    const double second = y.at(number);
    return is_second ? second : made_of(x.at(number), second, factor, sign_factor);
  }
  __device__ __forceinline__ uint4 load_part(std::int64_t offset, int bytes) const {
    return make_vector<double>([&](int k) -> std::uint64_t {
      return 8 * k < bytes ? bit_copy<std::uint64_t>(number(offset / 8 + k)) : 0;
    });
  }
  __device__ __forceinline__ uint4 load(std::int64_t offset) const { return load_part(offset, 16); }
  __device__ __forceinline__ PairMemory second() const {
    PairMemory alone = *this;
    alone.is_second = true;
    return alone;
  }
};
__device__ __forceinline__ double element_at(const PairMemory& memory, std::int64_t offset) {
  return memory.number(offset / 8);
}

__device__ __forceinline__ PairMemory pair_memory(const TensorEntry& entry,
                                                  const TableView& table) {
  const PairEntry& pair = table.pairs[entry.first_axis];
  const auto row =
      static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(entry.data) - kRowZero);
  return {{pair.x + row * pair.x_stride, table.axes + pair.x_axis, pair.x_axes, pair.x_type},
          {pair.y + row * pair.y_stride, table.axes + pair.y_axis, pair.y_axes, pair.y_type},
          pair.formula.factor,
          pair.formula.sign_factor,
          is_complex(entry.dtype),
          false};
}

// Where the numbers of an entry come from: visit(memory, type), with the widest loads, or one by one.
struct OfGradients {
  template <class Visit>
  static __device__ __forceinline__ void with_memory(const TensorEntry& entry,
                                                     const TableView& table, Visit visit) {
    cuda::with_memory(entry, table, visit);
  }
  template <class Visit>
  static __device__ __forceinline__ void with_elements(const TensorEntry& entry,
                                                       const TableView& table, Visit visit) {
    visit_real_type(entry.dtype,
                    [&](auto type) { visit(element_memory<decltype(type)>(entry, table), type); });
  }
};
struct OfPairs {
  template <class Visit>
  static __device__ __forceinline__ void with_memory(const TensorEntry& entry,
                                                     const TableView& table, Visit visit) {
    visit(pair_memory(entry, table), double{});
  }
  template <class Visit>
  static __device__ __forceinline__ void with_elements(const TensorEntry& entry,
                                                       const TableView& table, Visit visit) {
    visit(pair_memory(entry, table), double{});
  }
};

}  // namespace gradclip::cuda
