// Walk over the memory of a chunk: where it lies if it is dense, else tile by tile through a buffer. The
// twin of cuda/memory.cuh, which loads each element where it lies.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>

#include "core/reduction_order.hpp"
#include "core/span.hpp"
#include "cpu/plan.hpp"

namespace gradclip::cpu {

// Copy elements from one stride to another.
inline void copy_elements(std::byte* to, std::int64_t to_stride, const std::byte* from,
                          std::int64_t from_stride, std::int64_t count, std::int64_t itemsize) {
  if (to_stride == itemsize && from_stride == itemsize) {
    std::memcpy(to, from, static_cast<std::size_t>(count * itemsize));
    return;
  }
  const auto copy = [=](auto size) {
    for (std::int64_t i = 0; i < count; ++i)
      std::memcpy(to + i * to_stride, from + i * from_stride, static_cast<std::size_t>(size));
  };
  // A size that the compiler knows is one load and one store.
  switch (itemsize) {
    case 2: return copy(std::integral_constant<std::int64_t, 2>{});
    case 4: return copy(std::integral_constant<std::int64_t, 4>{});
    case 8: return copy(std::integral_constant<std::int64_t, 8>{});
    case 16: return copy(std::integral_constant<std::int64_t, 16>{});
    default: return copy(itemsize);
  }
}

// The halves of two vectors, their elements taken in turn.
template <class Vector, std::size_t... I>
inline void interleave(const Vector& a, const Vector& b, Vector* to, std::index_sequence<I...>) {
  constexpr std::size_t kSide = sizeof...(I);
  to[0] = __builtin_shufflevector(a, b, (I / 2 + I % 2 * kSide)...);
  to[1] = __builtin_shufflevector(a, b, (I / 2 + I % 2 * kSide + kSide / 2)...);
}

// A square of elements, each of its rows a vector of 16 bytes: its transpose.
template <class Element>
inline void transpose_square(const std::byte* from, std::int64_t from_row, std::byte* to,
                             std::int64_t to_row) {
  constexpr std::size_t kSide = 16 / sizeof(Element);
  typedef Element Vector __attribute__((vector_size(16)));
  Vector rows[kSide], next[kSide];
  for (std::size_t r = 0; r < kSide; ++r)
    std::memcpy(&rows[r], from + static_cast<std::int64_t>(r) * from_row, 16);
  for (std::size_t step = 1; step < kSide; step *= 2) {
    for (std::size_t r = 0; r < kSide / 2; ++r)
      interleave(rows[r], rows[r + kSide / 2], next + 2 * r, std::make_index_sequence<kSide>());
    std::copy(next, next + kSide, rows);
  }
  for (std::size_t r = 0; r < kSide; ++r)
    std::memcpy(to + static_cast<std::int64_t>(r) * to_row, &rows[r], 16);
}

// Element (r, c) of `rows` times `columns` goes from r * from_row + c * from_column to r * to_row + c * to_column.
inline void transpose(const std::byte* from, std::int64_t from_row, std::int64_t from_column,
                      std::int64_t rows, std::byte* to, std::int64_t to_row, std::int64_t to_column,
                      std::int64_t columns, std::int64_t itemsize) {
  const auto move = [=]<class Element>(Element) {
    constexpr auto kSize = static_cast<std::int64_t>(sizeof(Element));
    constexpr std::int64_t kSide = 16 / kSize;
    const bool has_squares = kSide > 1 && from_column == kSize && to_row == kSize;
    for (std::int64_t r = 0; r < rows; r += kSide) {
      const std::int64_t height = std::min(kSide, rows - r);
      for (std::int64_t c = 0; c < columns; c += kSide) {
        const std::int64_t width = std::min(kSide, columns - c);
        const std::byte* const here = from + r * from_row + c * from_column;
        std::byte* const there = to + r * to_row + c * to_column;
        if constexpr (kSide > 1) {
          if (has_squares && height == kSide && width == kSide) {
            transpose_square<Element>(here, from_row, there, to_column);
            continue;
          }
        }
        for (std::int64_t j = 0; j < width; ++j)
          for (std::int64_t i = 0; i < height; ++i)
            std::memcpy(there + i * to_row + j * to_column, here + i * from_row + j * from_column,
                        kSize);
      }
    }
  };
  switch (itemsize) {
    case 2: return move(std::uint16_t{});
    case 4: return move(std::uint32_t{});
    case 8: return move(std::uint64_t{});
    default: return move(__uint128_t{});
  }
}

// Elements [first, first + count) of a span: where they lie if it is dense, else copied to `buffer`.
inline const std::byte* gathered(const Span& span, std::int64_t first, std::int64_t count,
                                 std::byte* buffer) {
  const std::int64_t itemsize = span.itemsize();
  if (!span.layout) return span.data + first * itemsize;
  std::byte* at = buffer;
  for_each_run(span, first, count, [&](const std::byte* run, std::int64_t n, std::int64_t stride) {
    copy_elements(at, itemsize, run, stride, n, itemsize);
    at += n * itemsize;
  });
  return buffer;
}
// And back, to where they lie.
inline void scatter(const Span& span, std::int64_t first, std::int64_t count,
                    const std::byte* buffer) {
  const std::int64_t itemsize = span.itemsize();
  for_each_run(span, first, count, [&](std::byte* run, std::int64_t n, std::int64_t stride) {
    copy_elements(run, stride, buffer, itemsize, n, itemsize);
    buffer += n * itemsize;
  });
}

// visit(data, bytes) for every piece of at most `longest` bytes (a tile, where it is not dense), in
// order. Where it returns true, it has changed the piece.
template <class Visit>
void visit_pieces(const Span& span, const Chunk& chunk, std::int64_t longest, Visit visit) {
  const std::int64_t end = chunk.first_byte + chunk.bytes;
  if (!span.layout) {
    for (std::int64_t first = chunk.first_byte; first < end; first += longest)
      visit(span.data + first, static_cast<std::size_t>(std::min(end - first, longest)));
    return;
  }
  alignas(order::kBlockBytes) std::byte buffer[order::kTileBytes];
  constexpr auto kTile = static_cast<std::int64_t>(order::kTileBytes);
  for (std::int64_t first = chunk.first_byte; first < end; first += kTile) {
    const std::int64_t bytes = std::min(end - first, kTile), itemsize = span.itemsize();
    gathered(span, first / itemsize, bytes / itemsize, buffer);
    if (visit(buffer, static_cast<std::size_t>(bytes)))
      scatter(span, first / itemsize, bytes / itemsize, buffer);
  }
}

// Read every tile: visit(tile, bytes).
template <class Visit>
void for_each_tile(const Span& span, const Chunk& chunk, Visit visit) {
  visit_pieces(span, chunk, static_cast<std::int64_t>(order::kTileBytes),
               [&](const std::byte* tile, std::size_t bytes) {
                 visit(tile, bytes);
                 return false;
               });
}

// Change tiles: visit(tile, bytes) returns whether it did.
template <class Visit>
void change_each_tile(const Span& span, const Chunk& chunk, Visit visit) {
  visit_pieces(span, chunk, static_cast<std::int64_t>(order::kTileBytes), visit);
}

// Change every piece, however long.
template <class Visit>
void change_each_piece(const Span& span, const Chunk& chunk, Visit visit) {
  visit_pieces(span, chunk, chunk.bytes, visit);
}

}  // namespace gradclip::cpu
