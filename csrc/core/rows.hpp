// The rows of gradients: parts of them along one axis.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <list>
#include <stdexcept>

#include "core/span.hpp"
#include "core/table.hpp"

namespace gradclip {

// What the rows of a gradient are: one for each index of its first axis. A sample goes through all gradients. A
// unit is a row, or in the other layout an index of the last axis; a gradient with fewer than two axes is one.
enum class RowKind { row, sample, unit, unit_last };

struct RowSpan {
  std::byte* first = nullptr;             // the lowest address of row 0
  std::int64_t count = 0, stride = 0;     // in bytes, of either sign
  std::int64_t numel = 0;                 // of one row
  const StridedLayout* layout = nullptr;  // of one row; null where it is dense
  DType dtype = DType::float32;

  Span operator[](std::int64_t row) const { return {first + row * stride, numel, layout, dtype}; }
  std::int64_t row_bytes() const { return numel * static_cast<std::int64_t>(size_of(dtype)); }
  // Whether elements of other rows lie between those of a row, as of the columns of a matrix.
  bool are_interleaved() const {
    return layout && count > 1 && stride != 0 && std::abs(stride) < layout->axes.back().stride;
  }
  bool operator==(const RowSpan& other) const {
    return first == other.first && count == other.count && stride == other.stride &&
           numel == other.numel && dtype == other.dtype &&
           (layout && other.layout ? layout->axes == other.layout->axes : layout == other.layout);
  }
};

// Of all gradients: row r of gradient i is number first[i] + r.
struct RowTable {
  RowKind kind = RowKind::row;
  Table<RowSpan> gradients;
  Table<std::size_t> first = {0};    // one more than gradients: the last is the number of rows
  std::list<StridedLayout> layouts;  // that rows point to; addresses must stay

  RowTable() = default;
  RowTable(RowTable&&) = default;  // which keeps the addresses
  RowTable& operator=(RowTable&&) = default;

  // Of rows without elements there can be any number.
  static constexpr std::size_t kMostRows = std::size_t{1} << 48;

  std::size_t count() const { return first.back(); }
  void add(const RowSpan& rows) {
    if (static_cast<std::size_t>(rows.count) > kMostRows - first.back())
      throw std::length_error("grads: expected at most 2^48 rows together, got more");
    gradients.push_back(rows);
    first.push_back(first.back() + static_cast<std::size_t>(rows.count));
  }
};

}  // namespace gradclip
