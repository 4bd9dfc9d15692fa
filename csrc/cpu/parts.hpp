// What has a sum of its own, by chunks of a plan: tensors, or their rows. CUDA has no twin of it: there a warp
// finds its rows as it walks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>
#include <vector>

#include "core/rows.hpp"
#include "core/span.hpp"
#include "cpu/memory.hpp"
#include "cpu/pair.hpp"
#include "cpu/plan.hpp"

namespace gradclip::cpu {

// Rows between whose elements those of others lie, moved together: a cache line holds elements of each. In the panel
// every row is dense.
class Panel {
 public:
  explicit Panel(const RowSpan& rows)
      : rows_(rows),
        pitch_(rows.row_bytes() + kLine),
        most_(std::clamp(kMostBytes / pitch_, std::int64_t{1}, kLine / rows[0].itemsize())),
        memory_(static_cast<std::size_t>(most_ * pitch_)) {}

  // How many rows from this one on.
  std::int64_t gather(std::int64_t row, std::int64_t left) {
    first_ = row;
    count_ = std::min(left, most_);
    for_each_run_of_all(
        [&](std::byte* run, std::int64_t step, std::int64_t elements, std::byte* place) {
          transpose(run, step, rows_.stride, elements, place, rows_[0].itemsize(), pitch_, count_,
                    rows_[0].itemsize());
        });
    return count_;
  }
  Span operator[](std::int64_t r) {
    return {memory_.data() + r * pitch_, rows_.numel, nullptr, rows_.dtype};
  }
  // Of these rows alone.
  void scatter(std::span<const std::int64_t> changed) {
    const std::int64_t itemsize = rows_[0].itemsize();
    for_each_run_of_all(
        [&](std::byte* run, std::int64_t step, std::int64_t elements, std::byte* place) {
          if (std::ssize(changed) == count_) {
            transpose(place, pitch_, itemsize, count_, run, rows_.stride, step, elements, itemsize);
            return;
          }
          for (const std::int64_t r : changed)
            copy_elements(run + r * rows_.stride, step, place + r * pitch_, itemsize, elements,
                          itemsize);
        });
  }

 private:
  static constexpr std::int64_t kLine = 128, kMostBytes = std::int64_t{4} << 20;

  // visit(a run of the first row, its stride and length, its place in the panel)
  template <class Visit>
  void for_each_run_of_all(Visit visit) {
    std::byte* place = memory_.data();
    for_each_run(rows_[first_], 0, rows_.numel,
                 [&](std::byte* run, std::int64_t elements, std::int64_t stride) {
                   visit(run, stride, elements, place);
                   place += elements * rows_[0].itemsize();
                 });
  }

  const RowSpan& rows_;
  std::int64_t pitch_, most_, first_ = 0, count_ = 0;
  Table<std::byte> memory_;
};

// visit(part, span, piece) for what a chunk holds of each part; the piece counts from the part's first byte. Of rows
// it returns whether it has changed the piece, or nothing.
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
    if constexpr (std::is_same_v<Rows, RowSpan>) {
      if (rows.are_interleaved()) {
        visit_panels(rows, row, chunk.bytes / row_bytes, part, whole, visit);
        return;
      }
    }
    for (std::int64_t left = chunk.bytes; left > 0; left -= row_bytes)
      visit(part++, rows[row++], whole);
  }

 private:
  template <class Visit>
  static void visit_panels(const RowSpan& rows, std::int64_t row, std::int64_t count,
                           std::size_t part, const Chunk& whole, Visit& visit) {
    Panel panel(rows);
    std::vector<std::int64_t> changed;
    for (std::int64_t done = 0, together = 0; done < count; done += together) {
      together = panel.gather(row + done, count - done);
      changed.clear();
      for (std::int64_t r = 0; r < together; ++r, ++part) {
        if constexpr (std::is_void_v<decltype(visit(part, panel[r], whole))>) {
          visit(part, panel[r], whole);
        } else if (visit(part, panel[r], whole)) {
          changed.push_back(r);
        }
      }
      if (!changed.empty()) panel.scatter(changed);
    }
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
