// Elements one by one, for what is not worth a kernel; and the largest magnitude, for what is.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/dtype.hpp"
#include "core/element.hpp"
#include "core/float_bits.hpp"
#include "core/norm.hpp"
#include "core/table.hpp"
#include "cpu/parts.hpp"
#include "cpu/plan.hpp"
#include "cpu/workers.hpp"

namespace gradclip::cpu {

template <class T, class Visit>
void visit_magnitudes_of(const std::byte* data, std::size_t bytes, bool complex, double scale,
                         Visit visit) {
  const auto at = [&](std::size_t i) {
    T x;
    std::memcpy(&x, data + i * sizeof(T), sizeof(T));
    return to_double(x) * scale;
  };
  const std::size_t count = bytes / sizeof(T);
  if (complex) {
    for (std::size_t i = 0; i < count; i += 2) visit(modulus(at(i), at(i + 1)));
  } else {
    for (std::size_t i = 0; i < count; ++i) visit(std::fabs(at(i)));
  }
}

// visit(|scale * x|) for every element, in order. `scale` is a power of two.
template <class Visit>
void visit_magnitudes(DType dtype, const std::byte* data, std::size_t bytes, double scale,
                      Visit visit) {
  visit_real_type(dtype, [&](auto type) {
    visit_magnitudes_of<decltype(type)>(data, bytes, is_complex(dtype), scale, visit);
  });
}

// The largest magnitude of every part, from largest_of(chunk, span, piece). Each piece is asked for once.
template <class Parts, class LargestOf>
Table<double> largest_by_part(const Parts& parts, const ChunkPlan& plan, LargestOf largest_of) {
  Table<double> result(parts.count()), partials(plan.partials);
  for_each_chunk(plan, Pass::forward, [&](const Chunk& chunk) {
    parts.visit(chunk, [&](std::size_t part, const auto& span, const Chunk& piece) {
      (chunk.partial == kWhole ? result[part] : partials[chunk.partial]) =
          largest_of(chunk, span, piece);
    });
  });
  for (const Chunk& chunk : plan.chunks) {
    if (chunk.partial == kWhole) continue;
    double& largest = result[parts.part_of(chunk)];
    largest = larger(partials[chunk.partial], largest);
  }
  return result;
}

}  // namespace gradclip::cpu
