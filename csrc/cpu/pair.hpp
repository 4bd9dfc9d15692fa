// Pairs by tiles of what is made of them: float64, in buffers of one tile. The twin of cuda/pair.cuh, which makes
// each number as it is loaded.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/pair.hpp"
#include "core/reduction_order.hpp"
#include "cpu/isa.hpp"
#include "cpu/memory.hpp"

namespace gradclip::cpu {

// One tile of a pair.
class PairTile {
 public:
  PairTile(const PairSpan& pair, std::int64_t first_byte, std::int64_t bytes)
      : pair_(pair),
        first_(first_byte / pair.itemsize()),
        elements_(bytes / pair.itemsize()),
        numbers_(static_cast<std::size_t>(bytes) / sizeof(double)) {
    widen(pair.x, z_);
    widen(pair.y, y_);
    const PairFormula& formula = pair.formula;
    if (formula.factor != 0.0) kernels().add_scaled(z_, y_, formula.factor, numbers_);
    if (formula.sign_factor != 0.0) kernels().add_signs(z_, y_, formula.sign_factor, numbers_);
  }
  PairTile(const PairTile&) = delete;

  const std::byte* data() const { return reinterpret_cast<const std::byte*>(z_); }
  std::size_t bytes() const { return numbers_ * sizeof(double); }

  WideValue sum_of_squares() const {
    return kernels().of(DType::float64).sum_squares(data(), bytes());
  }
  void add_sums_of_y(PairSums& sums) const {
    const auto* const y = reinterpret_cast<const std::byte*>(y_);
    const TypeKernels& wide = kernels().of(DType::float64);
    if (pair_.formula.l2 != 0.0) sums.squares.add(wide.sum_squares(y, bytes()));
    if (pair_.formula.l1 != 0.0) sums.magnitudes.add(wide.sum_magnitudes(y, bytes()));
  }

  // To the gradient's memory: factor * z, or y + factor * z. `down`: rounded so that what was measured of it
  // is not above that.
  void write(double factor, bool down) {
    const Kernels& all = kernels();
    const TypeKernels& wide = all.of(DType::float64);
    if (factor != 1.0)
      (down ? wide.scale_down : wide.scale)(reinterpret_cast<std::byte*>(z_), bytes(), factor);
    const bool moves = pair_.formula.is_difference;
    if (moves && !down) all.add_scaled(z_, y_, 1.0, numbers_);
    const TypeKernels& type = all.of(pair_.x.dtype);
    place([&](std::byte* to) {
      if (moves && down)
        type.move_down(y_, z_, to, numbers_);
      else
        (down ? type.narrow_down : type.narrow)(z_, to, numbers_);
    });
  }
  // y, which is of the gradient's dtype.
  void write_second() {
    place([&](std::byte* to) { kernels().of(pair_.x.dtype).narrow(y_, to, numbers_); });
  }

 private:
  // fill(to), which is where the gradient lies.
  template <class Fill>
  void place(Fill fill) {
    fill(pair_.x.layout ? buffer_ : pair_.x.data + first_ * pair_.x.itemsize());
    if (pair_.x.layout) scatter(pair_.x, first_, elements_, buffer_);
  }
  void widen(const Span& span, double* to) {
    kernels().of(span.dtype).widen(gathered(span, first_, elements_, buffer_), to, numbers_);
  }

  static constexpr std::size_t kNumbers = order::kTileBytes / sizeof(double);
  alignas(order::kBlockBytes) double z_[kNumbers];
  alignas(order::kBlockBytes) double y_[kNumbers];
  alignas(order::kBlockBytes) std::byte buffer_[order::kTileBytes];
  const PairSpan& pair_;
  std::int64_t first_, elements_;
  std::size_t numbers_;
};

// visit(tile) for every tile of a piece.
template <class Visit>
void for_each_pair_tile(const PairSpan& pair, const Chunk& piece, Visit visit) {
  constexpr auto kTile = static_cast<std::int64_t>(order::kTileBytes);
  const std::int64_t end = piece.first_byte + piece.bytes;
  for (std::int64_t first = piece.first_byte; first < end; first += kTile) {
    PairTile tile(pair, first, std::min(end - first, kTile));
    visit(tile);
  }
}

// Whether kernels take both arrays where they lie.
inline bool is_direct(const PairSpan& pair) {
  return !pair.x.layout && !pair.y.layout && pair.formula.factor != 0.0;
}

// visit(x, y, first byte, bytes, numbers) for every tile of a piece of a direct pair: where its parts lie.
template <class Visit>
void for_each_direct_tile(const PairSpan& pair, const Chunk& piece, Visit visit) {
  constexpr auto kTile = static_cast<std::int64_t>(order::kTileBytes);
  const std::int64_t end = piece.first_byte + piece.bytes;
  for (std::int64_t first = piece.first_byte; first < end; first += kTile) {
    const std::int64_t bytes = std::min(end - first, kTile), element = first / pair.itemsize();
    visit(pair.x.data + element * pair.x.itemsize(), pair.y.data + element * pair.y.itemsize(),
          first, bytes, static_cast<std::size_t>(bytes) / sizeof(double));
  }
}

// Whether the sum of a tile is the one of the reduction order; `is_wide`: of float64 numbers. Squares of others
// are not lost in float64: 0 is the sum of zeros.
inline bool is_sum(double sum, bool is_wide) {
  return order::can_be_trusted(sum, true) || (sum == 0.0 && !is_wide);
}

// add(sum) with the sum of squares of every tile, and those of the second arrays where somebody asks for them.
template <class Add>
void sum_direct_tiles(const PairSpan& pair, const Chunk& piece, Add add) {
  const PairKernels& both = kernels().of(pair.x.dtype, pair.y.dtype);
  const TypeKernels& second = kernels().of(pair.y.dtype);
  const bool has_signs = pair.formula.l1 != 0.0;
  const bool is_wide = real_of(pair.y.dtype) == DType::float64;
  for_each_direct_tile(
      pair, piece,
      [&](const std::byte* x, const std::byte* y, std::int64_t first, std::int64_t bytes,
          std::size_t numbers) {
        const double sum = both.sum_squares(x, y, numbers, pair.formula);
        if (order::can_be_trusted(sum, true))
          add(WideValue{sum, 0});
        else  // again, by way of the buffers
          add(PairTile(pair, first, bytes).sum_of_squares());
        if (!pair.sums) return;
        const double squares = second.sum_wide_squares(y, numbers);
        const double magnitudes = has_signs ? second.sum_wide_magnitudes(y, numbers) : 0.0;
        if (is_sum(squares, is_wide) && (!has_signs || is_sum(magnitudes, is_wide))) {
          pair.sums->squares.add(squares);
          pair.sums->magnitudes.add(magnitudes);
        } else {
          PairTile(pair, first, bytes).add_sums_of_y(*pair.sums);
        }
      });
}

// What is made of a pair, written in place of the first of it.
struct AccumulatedSpan {
  PairSpan pair;
  DType dtype = pair.x.dtype;
};

// As of a Span: each tile of the first array once it has been written, while the cache holds it.
template <class Visit>
void for_each_tile(const AccumulatedSpan& span, const Chunk& piece, Visit visit) {
  constexpr auto kTile = static_cast<std::int64_t>(order::kTileBytes);
  const PairSpan& pair = span.pair;
  const std::int64_t itemsize = pair.x.itemsize(), end = piece.first_byte + piece.bytes;
  const auto in_pair = [&](std::int64_t bytes) { return bytes / itemsize * pair.itemsize(); };
  const auto write = kernels().of(pair.x.dtype, pair.y.dtype).write;
  alignas(order::kBlockBytes) std::byte buffer[order::kTileBytes];
  for (std::int64_t first = piece.first_byte; first < end; first += kTile) {
    const std::int64_t bytes = std::min(end - first, kTile);
    const Chunk tile{in_pair(first), in_pair(bytes), piece.tensor, kWhole};
    if (is_direct(pair))
      for_each_direct_tile(pair, tile,
                           [&](std::byte* x, const std::byte* y, std::int64_t, std::int64_t,
                               std::size_t numbers) { write(x, y, numbers, pair.formula, 1.0); });
    else
      for_each_pair_tile(pair, tile, [](PairTile& part) { part.write(1.0, false); });
    visit(gathered(pair.x, first / itemsize, bytes / itemsize, buffer),
          static_cast<std::size_t>(bytes));
  }
}

// As of a Span.
template <class Visit>
void for_each_tile(const PairSpan& pair, const Chunk& piece, Visit visit) {
  for_each_pair_tile(pair, piece, [&](const PairTile& tile) {
    if (pair.sums) tile.add_sums_of_y(*pair.sums);
    visit(tile.data(), tile.bytes());
  });
}

}  // namespace gradclip::cpu
