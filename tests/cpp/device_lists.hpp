// Lists of tensors for both engines, and the machines that the emulator shows.
#pragma once

#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "core/element.hpp"
#include "core/reduction_order.hpp"
#include "cpu/engine.hpp"
#include "simt/cuda_runtime.h"

namespace gradclip {

inline constexpr DType kTypes[] = {DType::float16, DType::bfloat16,  DType::float32,
                                   DType::float64, DType::complex64, DType::complex128};

// A tensor in memory of its own, at any offset from a multiple of 64 bytes.
struct Tensor {
  std::vector<std::uint64_t> memory;
  Span span;

  Tensor(DType dtype, std::int64_t numel, std::size_t offset = 0)
      : memory(static_cast<std::size_t>(numel) * size_of(dtype) / 8 + 20) {
    auto at = reinterpret_cast<std::uintptr_t>(memory.data());
    at = (at + 63) / 64 * 64 + offset * size_of(real_of(dtype));
    span.data = reinterpret_cast<std::byte*>(at);
    span.numel = numel;
    span.dtype = dtype;
  }
  void set(std::int64_t i, double x) const {
    std::byte* const at = span.data + i * static_cast<std::int64_t>(size_of(real_of(span.dtype)));
    const auto put = [&](auto value) { std::memcpy(at, &value, sizeof(value)); };
    switch (real_of(span.dtype)) {
      case DType::float16: return put(to_float16(static_cast<float>(x)));
      case DType::bfloat16: return put(to_bfloat16(static_cast<float>(x)));
      case DType::float32: return put(static_cast<float>(x));
      default: return put(x);
    }
  }
  void fill(unsigned seed, double scale) const {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    for (std::int64_t i = 0; i < span.numel * (is_complex(span.dtype) ? 2 : 1); ++i)
      set(i, scale * normal(random));
  }
};

using List = std::vector<Tensor>;

inline std::vector<Span> spans_of(const List& list) {
  std::vector<Span> spans;
  for (const Tensor& tensor : list) spans.push_back(tensor.span);
  return spans;
}
inline cpu::ChunkPlan plan_of(const std::vector<Span>& spans) {
  std::vector<std::int64_t> bytes;
  for (const Span& span : spans) bytes.push_back(span.nbytes());
  return cpu::make_plan(bytes);
}
inline std::vector<std::vector<std::uint64_t>> bytes_of(const List& list) {
  std::vector<std::vector<std::uint64_t>> bytes;
  for (const Tensor& tensor : list) bytes.push_back(tensor.memory);
  return bytes;
}
inline void restore(List& list, const std::vector<std::vector<std::uint64_t>>& bytes) {
  for (std::size_t i = 0; i < list.size(); ++i)
    std::memcpy(list[i].memory.data(), bytes[i].data(), 8 * bytes[i].size());
}

inline std::uint64_t bits(double x) {
  return is_nan(x) ? ~std::uint64_t{0} : bit_copy<std::uint64_t>(x);
}

// --- Machines ---------------------------------------------------------------------------------------

struct Settings {
  int multiprocessors;
  simt::Schedule schedule;
};
inline void set(const Settings& settings) {
  simt::machine().multiprocessors = settings.multiprocessors;
  simt::schedule() = settings.schedule;
}
inline constexpr Settings kSettings[] = {{1, {0, 1}}, {3, {1, 1}}, {4, {2, 3}}, {9, {3, 5}}};

inline std::int64_t elements_of_tile(DType dtype) {
  return static_cast<std::int64_t>(order::kTileBytes / size_of(dtype));
}

}  // namespace gradclip
