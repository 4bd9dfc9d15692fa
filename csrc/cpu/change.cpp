// What writes: scale, zero, value clip; and the counts of elements that are not finite. The twin of
// cuda/change.cuh, which clips by value as it measures.
#include <algorithm>
#include <cstring>

#include "cpu/elements.hpp"
#include "cpu/engine.hpp"
#include "cpu/isa.hpp"
#include "cpu/memory.hpp"
#include "cpu/workers.hpp"

namespace gradclip::cpu {

namespace {

template <class Parts>
void scale_parts(const Parts& parts, const ChunkPlan& plan, std::span<const double> factors,
                 double divisor, bool down) {
  // Backward: the norms went forward, so the end is still in the cache.
  for_each_chunk(plan, Pass::backward, [&](const Chunk& chunk) {
    const TypeKernels& type = kernels().of(parts.dtype(chunk.tensor));
    const auto kernel = down ? type.scale_down : type.scale;
    parts.visit(chunk, [&](std::size_t part, const Span& span, const Chunk& piece) {
      const double factor = factors[part] / divisor;
      if (factor == 1.0) return false;
      change_each_piece(span, piece, [&](std::byte* data, std::size_t bytes) {
        kernel(data, bytes, factor);
        return true;
      });
      return true;
    });
  });
}

}  // namespace

void scale(std::span<const Span> spans, const ChunkPlan& plan, std::span<const double> factors,
           bool down) {
  scale_parts(TensorParts{spans}, plan, factors, 1.0, down);
}

void scale_rows(const RowTable& rows, const ChunkPlan& plan, std::span<const double> coefficients,
                double grad_scale, bool down) {
  scale_parts(RowParts(rows), plan, coefficients, grad_scale, down);
}

void scale_samples(const RowTable& rows, const ChunkPlan& plan,
                   std::span<const double> coefficients, double grad_scale, bool down) {
  const Table<std::size_t> from_0(rows.gradients.size(), 0);
  scale_parts(RowParts(rows, from_0, coefficients.size()), plan, coefficients, grad_scale, down);
}

namespace {

template <class Change>
void change_pairs(const RowParts<PairRows>& parts, const ChunkPlan& plan, Change change) {
  for_each_chunk(plan, Pass::backward, [&](const Chunk& chunk) {
    parts.visit(chunk, [&](std::size_t part, const PairSpan& pair, const Chunk& piece) {
      change(part, pair, piece);
    });
  });
}

}  // namespace

void scale_pairs(const PairTable& pairs, const ChunkPlan& plan,
                 std::span<const double> coefficients, double grad_scale, bool down,
                 bool are_samples) {
  const Table<std::size_t> from_0(pairs.gradients.size(), 0);
  const auto parts = are_samples ? RowParts(pairs, from_0, coefficients.size()) : RowParts(pairs);
  change_pairs(parts, plan, [&](std::size_t part, const PairSpan& pair, const Chunk& piece) {
    const double factor = coefficients[part] / grad_scale;
    if (pair.formula.is_difference && factor == 1.0) return;
    if (down || !is_direct(pair)) {
      for_each_pair_tile(pair, piece, [&](PairTile& tile) { tile.write(factor, down); });
      return;
    }
    const auto write = kernels().of(pair.x.dtype, pair.y.dtype).write;
    for_each_direct_tile(pair, piece,
                         [&](std::byte* x, const std::byte* y, std::int64_t, std::int64_t,
                             std::size_t numbers) { write(x, y, numbers, pair.formula, factor); });
  });
}

void take_second(const PairTable& pairs, const ChunkPlan& plan) {
  change_pairs(RowParts(pairs), plan, [](std::size_t, const PairSpan& pair, const Chunk& piece) {
    for_each_pair_tile(pair, piece, [](PairTile& tile) { tile.write_second(); });
  });
}

void set_to_zero(std::span<const Span> spans, const ChunkPlan& plan) {
  for_each_chunk(plan, Pass::forward, [&](const Chunk& chunk) {
    change_each_piece(spans[chunk.tensor], chunk, [](std::byte* data, std::size_t bytes) {
      std::memset(data, 0, bytes);
      return true;
    });
  });
}

namespace {

// Whether a tile holds a number (no NaN) whose pattern is above `top`.
bool has_beyond(DType dtype, const std::byte* tile, std::size_t bytes, std::uint64_t top) {
  const double limit = value_of_pattern(dtype, top);
  bool found = false;
  visit_magnitudes(dtype, tile, bytes, 1.0, [&](double m) { found = found || m > limit; });
  return found;
}

// Which of a plan's chunks a chunk of it is.
std::size_t index_of(const Chunk& chunk, const ChunkPlan& plan) {
  return static_cast<std::size_t>(&chunk - plan.chunks.data());
}

}  // namespace

ValueClip measure_values(std::span<const Span> spans, const ChunkPlan& plan,
                         const ValueLimit& limit) {
  ValueClip found;
  found.tiles.resize(plan.chunks.size());
  const auto measure_chunk = [&](const Chunk& chunk, const Span& span, const Chunk&) {
    const auto largest_of = kernels().of(span.dtype).largest;
    const std::uint64_t top = limit.pattern(span.dtype);
    double largest = 0.0;
    std::uint64_t tiles = 0, tile_bit = 1;
    for_each_tile(span, chunk, [&](const std::byte* tile, std::size_t bytes) {
      const std::uint64_t here = largest_of(tile, bytes);
      const double value = value_of_pattern(span.dtype, here);
      largest = larger(value, largest);
      // A NaN, whose pattern is above all others, stays; it may hide what is beyond.
      if (here > top && (!is_nan(value) || has_beyond(span.dtype, tile, bytes, top)))
        tiles |= tile_bit;
      tile_bit <<= 1;
    });
    found.tiles[index_of(chunk, plan)] = tiles;
    return largest;
  };
  const Table<double> largest = largest_by_part(TensorParts{spans}, plan, measure_chunk);
  found.largest.reserve(largest.size());
  for (const double m : largest) found.largest.push_back({m, 0, 0.0});
  found.clipped = std::ranges::any_of(found.tiles, [](std::uint64_t tiles) { return tiles != 0; });
  return found;
}

void clip_by_value(std::span<const Span> spans, const ChunkPlan& plan, const ValueLimit& limit,
                   std::span<const std::uint64_t> tiles) {
  // Backward, as of scale.
  for_each_chunk(plan, Pass::backward, [&](const Chunk& chunk) {
    std::uint64_t left = tiles[index_of(chunk, plan)];
    if (left == 0) return;
    const Span& span = spans[chunk.tensor];
    const auto clamp = kernels().of(span.dtype).clamp;
    const std::uint64_t top = limit.pattern(span.dtype);
    change_each_tile(span, chunk, [&](std::byte* tile, std::size_t bytes) {
      const bool is_beyond = left & 1;
      left >>= 1;
      return is_beyond && clamp(tile, bytes, top);
    });
  });
}

namespace {

template <class AnySpan>
NonFiniteCounts count_in(const AnySpan& span, std::int64_t nbytes) {
  NonFiniteCounts counts;
  const auto count = kernels().of(span.dtype).count_nonfinite;
  const Chunk all{0, nbytes, 0, kWhole};
  for_each_tile(span, all, [&](const std::byte* tile, std::size_t bytes) {
    // A complex element, of two parts, counts once.
    const std::size_t step = is_complex(span.dtype) ? size_of(span.dtype) : bytes;
    for (std::size_t at = 0; at < bytes; at += step) {
      const NonFiniteCounts here = count(tile + at, step);
      counts.nan += is_complex(span.dtype) ? here.nan > 0 : here.nan;
      counts.infinity +=
          is_complex(span.dtype) ? here.nan == 0 && here.infinity > 0 : here.infinity;
    }
  });
  return counts;
}

}  // namespace

NonFiniteCounts count_nonfinite(const Span& span) { return count_in(span, span.nbytes()); }

NonFiniteCounts count_nonfinite(const PairRows& rows) {
  NonFiniteCounts counts;
  for (std::int64_t row = 0; row < rows.x.count; ++row) {
    const NonFiniteCounts here = count_in(rows[row], rows.row_bytes());
    counts.nan += here.nan;
    counts.infinity += here.infinity;
  }
  return counts;
}

}  // namespace gradclip::cpu
