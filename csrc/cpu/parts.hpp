// What has a sum of its own, by chunks of a plan: tensors, or their rows. CUDA has no twin of it: there a warp
// finds its rows as it walks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/rows.hpp"
#include "core/span.hpp"
#include "cpu/pair.hpp"
#include "cpu/plan.hpp"

namespace gradclip::cpu {

// visit(part, span, piece) for what a chunk holds of each part; the piece counts from the part's first byte.
struct TensorParts {
  std::span<const Span> spans;

  std::size_t count() const { return spans.size(); }
  std::size_t tensors() const { return spans.size(); }
  DType dtype(std::size_t tensor) const { return spans[tensor].dtype; }
  // Of a chunk that holds only a piece of it.
  std::size_t part_of(const Chunk& chunk) const { return chunk.tensor; }
  template <class Visit>
  void visit(const Chunk& chunk, Visit visit) const {
    visit(std::size_t{chunk.tensor}, spans[chunk.tensor], chunk);
  }
};

// Row r of gradient i is part number first[i] + r. Rows: RowSpan, PairRows.
template <class Rows>
struct RowParts {
  std::span<const Rows> gradients;
  std::span<const std::size_t> first;
  std::size_t parts;

  template <class Table>
  explicit RowParts(const Table& table)
      : gradients(table.gradients), first(table.first), parts(table.first.back()) {}
  template <class Table>
  RowParts(const Table& table, std::span<const std::size_t> first_part, std::size_t count)
      : gradients(table.gradients), first(first_part), parts(count) {}

  std::size_t count() const { return parts; }
  std::size_t tensors() const { return gradients.size(); }
  DType dtype(std::size_t tensor) const { return gradients[tensor].dtype; }
  std::size_t part_of(const Chunk& chunk) const {
    return first[chunk.tensor] +
           static_cast<std::size_t>(chunk.first_byte / gradients[chunk.tensor].row_bytes());
  }
  template <class Visit>
  void visit(const Chunk& chunk, Visit visit) const {
    const Rows& rows = gradients[chunk.tensor];
    const std::int64_t row_bytes = rows.row_bytes();
    std::int64_t row = chunk.first_byte / row_bytes;
    std::size_t part = first[chunk.tensor] + static_cast<std::size_t>(row);
    if (chunk.partial != kWhole) {
      visit(part, rows[row],
            Chunk{chunk.first_byte - row * row_bytes, chunk.bytes, chunk.tensor, chunk.partial});
      return;
    }
    const Chunk whole{0, row_bytes, chunk.tensor, kWhole};
    for (std::int64_t left = chunk.bytes; left > 0; left -= row_bytes)
      visit(part++, rows[row++], whole);
  }
};

RowParts(const RowTable&) -> RowParts<RowSpan>;
RowParts(const RowTable&, std::span<const std::size_t>, std::size_t) -> RowParts<RowSpan>;
RowParts(const PairTable&) -> RowParts<PairRows>;
RowParts(const PairTable&, std::span<const std::size_t>, std::size_t) -> RowParts<PairRows>;

// A plan whose chunks are whole rows, or parts of one.
template <class Table_>
ChunkPlan make_row_plan(const Table_& rows) {
  Table<std::int64_t> bytes, counts;
  for (std::size_t i = 0; i < rows.gradients.size(); ++i) {
    counts.push_back(static_cast<std::int64_t>(rows.first[i + 1] - rows.first[i]));
    bytes.push_back(counts.back() * rows.gradients[i].row_bytes());
  }
  return make_plan(bytes, counts);
}
inline ChunkPlan make_plan(const RowTable& rows) { return make_row_plan(rows); }
inline ChunkPlan make_plan(const PairTable& pairs) { return make_row_plan(pairs); }

}  // namespace gradclip::cpu
