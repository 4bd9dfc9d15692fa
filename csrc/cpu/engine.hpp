// What the CPU does with a list of gradients: the twin of cuda/engine.hpp. Arguments have been checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/element.hpp"
#include "core/norm.hpp"
#include "core/rows.hpp"
#include "core/span.hpp"
#include "core/table.hpp"
#include "cpu/kernels.hpp"
#include "cpu/parts.hpp"
#include "cpu/plan.hpp"

namespace gradclip::cpu {

// The sum of every tensor, in one pass (two for `other` orders). `exact`: what was added up, of those that need no
// unit; or nothing.
Table<NormSum> measure(std::span<const Span> spans, const ChunkPlan& plan, const NormOrder& order,
                       std::span<ExactSum> exact = {});

// The sum of every row, by a plan of whole rows: that of the row as a tensor of its own.
Table<NormSum> measure_rows(const RowTable& rows, const ChunkPlan& plan, const NormOrder& order);

// Of the 2-norm, without a table of the sums: the norms of rows, divided by the scale of the gradients, and the sum
// of every gradient, which is the group of its rows.
struct RowNorms {
  Table<double> rows;
  Table<NormSum> tensors;
};
RowNorms measure_row_norms(const RowTable& rows, const ChunkPlan& plan, double grad_scale);
// Their norms alone, into what is 0 where a row has no elements. (Sums of millions of rows would cost more than
// the rows.)
void row_norms(const RowTable& rows, const ChunkPlan& plan, const NormOrder& order,
               std::span<double> norms);

// Multiply tensor i by factors[i]; where that is 1, its memory is not touched. `down`: factors are not negative,
// and no element is above the exact product in magnitude.
void scale(std::span<const Span> spans, const ChunkPlan& plan, std::span<const double> factors,
           bool down = false);
// The same of rows, by a plan of whole rows: each has a coefficient, or row r of all gradients has number r.
void scale_rows(const RowTable& rows, const ChunkPlan& plan, std::span<const double> coefficients,
                double grad_scale, bool down);
void scale_samples(const RowTable& rows, const ChunkPlan& plan,
                   std::span<const double> coefficients, double grad_scale, bool down);

// The sum of what is made of every part of pairs, and those of the second arrays: of squares if the formula
// multiplies them, of magnitudes if it takes their signs.
Table<NormSum> measure_pairs(const PairTable& pairs, const ChunkPlan& plan, const NormOrder& order,
                             PairSums& second);
// Write what is made of each whole gradient, where it has a second array, in its place; and the sum of squares of what
// lies there then, by the plan of the gradients.
Table<NormSum> accumulate(std::span<const Span> spans, const PairTable& pairs,
                          const ChunkPlan& plan);
// Write coefficient / grad_scale times what is made of each part, or, of differences, that beside the second
// array; a difference whose factor is 1 is not touched. `are_samples`: row r of all gradients has number r.
void scale_pairs(const PairTable& pairs, const ChunkPlan& plan,
                 std::span<const double> coefficients, double grad_scale, bool down,
                 bool are_samples);
// Write the second arrays, of the same dtypes.
void take_second(const PairTable& pairs, const ChunkPlan& plan);

// Set every element to +0, also where it was not finite.
void set_to_zero(std::span<const Span> spans, const ChunkPlan& plan);

// What a clip of real tensors by value finds before it writes: the largest magnitudes, and the tiles with
// an element beyond `limit`.
struct ValueClip {
  Table<NormSum> largest;
  Table<std::uint64_t> tiles;  // of each chunk of the plan, a bit for each tile
  bool clipped = false;        // whether there is any
};
ValueClip measure_values(std::span<const Span> spans, const ChunkPlan& plan,
                         const ValueLimit& limit);

// Clip every element into [-limit, limit]; only `tiles` are touched.
void clip_by_value(std::span<const Span> spans, const ChunkPlan& plan, const ValueLimit& limit,
                   std::span<const std::uint64_t> tiles);

// Elements of one tensor that are NaN or infinite; a complex element counts once.
NonFiniteCounts count_nonfinite(const Span& span);
// Of what is made of a pair.
NonFiniteCounts count_nonfinite(const PairRows& pair);

// The machine's own speed over the same dense memory with the same threads.
std::uint32_t probe_read(std::span<const Span> spans, const ChunkPlan& plan);
void probe_read_write(std::span<const Span> spans, const ChunkPlan& plan);

}  // namespace gradclip::cpu
