// Walk over the memory of a chunk: where it lies if it is dense, else tile by tile through a buffer.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "core/plan.hpp"
#include "core/reduction_order.hpp"
#include "core/span.hpp"

namespace gradclip::cpu {

// Runs are often single elements: a copy of known size is a load and a store.
inline void copy_run(std::byte* to, const std::byte* from, std::int64_t bytes) {
  switch (bytes) {
    case 2: std::memcpy(to, from, 2); return;
    case 4: std::memcpy(to, from, 4); return;
    case 8: std::memcpy(to, from, 8); return;
    default: std::memcpy(to, from, static_cast<std::size_t>(bytes)); return;
  }
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
    std::byte* at = buffer;
    for_each_run(span, first / itemsize, bytes / itemsize,
                 [&](const std::byte* run, std::int64_t length) {
                   copy_run(at, run, length);
                   at += length;
                 });
    if (!visit(buffer, static_cast<std::size_t>(bytes))) continue;
    at = buffer;
    for_each_run(span, first / itemsize, bytes / itemsize,
                 [&](std::byte* run, std::int64_t length) {
                   copy_run(run, at, length);
                   at += length;
                 });
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
