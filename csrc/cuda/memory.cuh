// Loads of 16 bytes of a tensor, counted from its first element: at once where the memory is dense
// and aligned, else element by element. The twin of cpu/memory.hpp, which copies tiles to a buffer.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/float_bits.hpp"
#include "cuda/plan.hpp"
#include "cuda/runtime.hpp"

namespace gradclip::cuda {

// 16 bytes from elements: word_at(k) gives the bits of element k.
template <class T, class WordAt>
__device__ __forceinline__ uint4 make_vector(WordAt word_at) {
  if constexpr (sizeof(T) == 8) {
    const std::uint64_t a = word_at(0), b = word_at(1);
    return make_uint4(static_cast<unsigned>(a), static_cast<unsigned>(a >> 32),
                      static_cast<unsigned>(b), static_cast<unsigned>(b >> 32));
  } else if constexpr (sizeof(T) == 4) {
    return make_uint4(word_at(0), word_at(1), word_at(2), word_at(3));
  } else {
    const auto pair = [&](int k) {
      return static_cast<unsigned>(word_at(k)) | static_cast<unsigned>(word_at(k + 1)) << 16;
    };
    return make_uint4(pair(0), pair(2), pair(4), pair(6));
  }
}

// Dense memory that begins at a multiple of 16 bytes. `kIsWritten`: by the same kernel, which the read-only
// path of __ldg must not see: the compiler may move such a load behind the writing.
template <class T, bool kIsWritten = false>
struct AlignedMemory {
  static constexpr bool kIsWide = true;
  using Word = typename FloatBits<T>::Word;
  const std::byte* data;

  template <class Wide>
  __device__ __forceinline__ Wide read(std::int64_t offset) const {
    const auto* const at = reinterpret_cast<const Wide*>(data + offset);
    if constexpr (kIsWritten)
      return __ldcg(at);
    else
      return __ldg(at);
  }
  __device__ __forceinline__ uint4 load(std::int64_t offset) const { return read<uint4>(offset); }
  // The elements of so many bytes, which can be none; the rest is +0.
  __device__ __forceinline__ uint4 load_part(std::int64_t offset, int bytes) const {
    if (bytes >= 16) return load(offset);
    return make_vector<T>([&](int k) -> Word {
      const int at = k * static_cast<int>(sizeof(T));
      return at < bytes ? read<Word>(offset + at) : Word{0};
    });
  }
};

// From bytes counted in the elements of a tensor to bytes counted in its memory. Called: inlined, its
// divisions made nine tenths of every kernel.
__device__ __noinline__ std::int64_t strided_offset(const Axis* axes, int count,
                                                    std::int64_t itemsize, std::int64_t offset) {
  std::int64_t index = offset / itemsize;
  std::int64_t at = offset % itemsize;
  for (int a = count - 1; a >= 0; --a) {
    at += index % axes[a].size * axes[a].stride;
    index /= axes[a].size;
  }
  return at;
}

// Any other memory. Elements are real: a complex one is two.
template <class T>
struct ElementMemory {
  static constexpr bool kIsWide = false;
  using Word = typename FloatBits<T>::Word;
  std::byte* data;
  const Axis* axes;
  int axis_count;
  bool complex;

  __device__ __forceinline__ Word* address(std::int64_t offset) const {
    const std::int64_t at =
        axis_count == 0 ? offset
                        : strided_offset(axes, axis_count,
                                         static_cast<std::int64_t>(sizeof(T)) << complex, offset);
    return reinterpret_cast<Word*>(data + at);
  }
  __device__ __forceinline__ uint4 load_part(std::int64_t offset, int bytes) const {
    return make_vector<T>([&](int k) -> Word {
      const int at = k * static_cast<int>(sizeof(T));
      return at < bytes ? *address(offset + at) : Word{0};
    });
  }
  __device__ __forceinline__ uint4 load(std::int64_t offset) const { return load_part(offset, 16); }
};

template <class T>
__device__ __forceinline__ ElementMemory<T> element_memory(const TensorEntry& entry,
                                                           const TableView& table) {
  return {entry.data, table.axes + entry.first_axis, entry.axes, is_complex(entry.dtype)};
}

__device__ __forceinline__ bool is_aligned(const TensorEntry& entry) {
  return entry.axes == 0 && reinterpret_cast<std::uintptr_t>(entry.data) % 16 == 0;
}

// visit(memory) with the widest loads that the tensor allows.
template <class Visit>
__device__ __forceinline__ void with_memory(const TensorEntry& entry, const TableView& table,
                                            Visit visit) {
  visit_real_type(entry.dtype, [&](auto type) {
    using T = decltype(type);
    if (is_aligned(entry))
      visit(AlignedMemory<T>{entry.data}, type);
    else
      visit(element_memory<T>(entry, table), type);
  });
}

}  // namespace gradclip::cuda
