// The sum of every tensor in one pass. The twin of cuda/measure.cuh, which also decides in that pass.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/elements.hpp"
#include "cpu/engine.hpp"
#include "cpu/float_environment.hpp"
#include "cpu/isa.hpp"
#include "cpu/memory.hpp"
#include "cpu/workers.hpp"

namespace gradclip::cpu {
namespace {

template <class AnySpan>
double largest_of(const AnySpan& span, const Chunk& chunk) {
  double result = 0.0;
  const auto largest = kernels().of(span.dtype).largest;
  for_each_tile(span, chunk, [&](const std::byte* tile, std::size_t bytes) {
    if (is_complex(span.dtype))
      visit_magnitudes(span.dtype, tile, bytes, 1.0, [&](double m) { result = larger(m, result); });
    else
      result = larger(value_of_pattern(span.dtype, largest(tile, bytes)), result);
  });
  return result;
}

// Terms (|x| / unit)^p of a chunk, in runs of order::kTermsPerRun.
template <class AnySpan>
ExactSum sum_powers(const AnySpan& span, const Chunk& chunk, double unit, double p) {
  const double scale = order::power_scale(unit);
  ExactSum sum;
  double run = 0.0;
  std::size_t terms = 0;
  for_each_tile(span, chunk, [&](const std::byte* tile, std::size_t bytes) {
    visit_magnitudes(span.dtype, tile, bytes, scale, [&](double m) {
      run += power(m / (unit * scale), p);
      if (++terms == order::kTermsPerRun) {
        sum.add(run);
        run = 0.0;
        terms = 0;
      }
    });
  });
  sum.add(run);
  return sum;
}

NormSum norm_sum(const ExactSum& sum) {
  const WideValue rounded = sum.rounded();
  return {rounded.value, rounded.exponent, 0.0};
}

// Whether a piece is one tile where it lies.
bool is_tile(const Span& span, const Chunk& piece) {
  return !span.layout && piece.bytes <= static_cast<std::int64_t>(order::kTileBytes);
}

// Add the sums of tiles where a kernel takes pairs as they lie; false where it does not.
template <class AnySpan>
bool add_direct(const AnySpan&, const Chunk&, const NormOrder&, ExactSum&) {
  return false;
}
bool add_direct(const PairSpan& pair, const Chunk& piece, const NormOrder& order, ExactSum& sum) {
  if (order.kind != NormOrder::two || !is_direct(pair)) return false;
  sum_direct_tiles(pair, piece, [&](const WideValue& tile) { sum.add(tile); });
  return true;
}

// Sums of the parts: store(chunk, part, sum), by any thread, but by one for a chunk, of each part that has bytes;
// `chunk` is where the part begins. `units` are the largest magnitudes of slow ones, if there are any.
template <class Parts, class Store>
void sum_parts(const Parts& parts, const ChunkPlan& plan, const NormOrder& order,
               const Table<double>& units, Store store) {
  const auto is_slow = [&](std::size_t tensor) {
    return !units.empty() && needs_unit(order, is_complex(parts.dtype(tensor)));
  };
  const auto finish = [&](const Chunk& chunk, std::size_t part, const ExactSum& exact, bool slow) {
    if constexpr (requires { store.keep(part, exact); })
      if (!slow) store.keep(part, exact);
    if (!slow) return store(chunk, part, norm_sum(exact));
    const WideValue sum = exact.rounded();
    const double unit = units[part], terms = is_finite(unit) ? narrow(sum) : 1.0;
    store(chunk, part,
          order.kind == NormOrder::one ? magnitude_sum(terms, unit) : NormSum{terms, 0, unit});
  };
  Table<ExactSum> partials(plan.partials);
  for_each_chunk(plan, Pass::forward, [&](const Chunk& chunk) {
    const TypeKernels& type = kernels().of(parts.dtype(chunk.tensor));
    const auto sum_tile = order.kind == NormOrder::two ? type.sum_squares : type.sum_magnitudes;
    const bool whole = chunk.partial == kWhole, slow = is_slow(chunk.tensor);
    parts.visit(
        chunk, [&]<class AnySpan>(std::size_t part, const AnySpan& span, const Chunk& piece) {
          if constexpr (std::is_same_v<AnySpan, Span>) {
            if (whole && !slow && is_tile(span, piece)) {
              // A part of one tile, of which there are often thousands: nothing to add.
              const WideValue sum = sum_tile(span.data, static_cast<std::size_t>(piece.bytes));
              store(chunk, part, {sum.value, sum.exponent, 0.0});
              if constexpr (requires { store.keep(part, ExactSum()); }) {
                ExactSum exact;
                exact.add(sum);
                store.keep(part, exact);
              }
              return;
            }
          }
          ExactSum sum;
          if (slow) {
            const double unit = units[part];
            if (unit != 0.0 && is_finite(unit)) sum = sum_powers(span, piece, unit, order.p);
          } else if (!add_direct(span, piece, order, sum)) {
            for_each_tile(span, piece, [&](const std::byte* tile, std::size_t bytes) {
              sum.add(sum_tile(tile, bytes));
            });
          }
          if (whole)
            finish(chunk, part, sum, slow);
          else
            partials[chunk.partial] = sum;
        });
  });
  for (std::size_t c = 0; c < plan.chunks.size();) {
    const Chunk& first = plan.chunks[c];
    if (first.partial == kWhole) {
      ++c;
      continue;
    }
    const std::size_t part = parts.part_of(first);
    ExactSum sum;
    for (; c < plan.chunks.size() && plan.chunks[c].partial != kWhole &&
           parts.part_of(plan.chunks[c]) == part;
         ++c)
      sum.add(partials[plan.chunks[c].partial]);
    finish(first, part, sum, is_slow(first.tensor));
  }
}

template <class Parts, class Store>
void measure_parts(const Parts& parts, const ChunkPlan& plan, const NormOrder& order, Store store) {
  const DefaultFloatEnvironment environment;  // also for what is added up here
  const auto largest = [&](auto skips) {
    return largest_by_part(parts, plan,
                           [&](const Chunk& chunk, const auto& span, const Chunk& piece) {
                             return skips(chunk.tensor) ? 0.0 : largest_of(span, piece);
                           });
  };
  if (order.kind == NormOrder::infinity) {
    const Table<double> magnitudes = largest([](std::size_t) { return false; });
    for (std::size_t part = 0; part < magnitudes.size(); ++part)
      store(Chunk{}, part, {magnitudes[part], 0, 0.0});
    return;
  }
  const auto is_fast = [&](std::size_t i) {
    return !needs_unit(order, is_complex(parts.dtype(i)));
  };
  bool all_fast = true;
  for (std::size_t i = 0; i < parts.tensors() && order.kind != NormOrder::two; ++i)
    all_fast = all_fast && is_fast(i);
  sum_parts(parts, plan, order, all_fast ? Table<double>() : largest(is_fast), store);
}

// Of pairs, with the sums of the second arrays, chunk by chunk.
struct PairParts : RowParts<PairRows> {
  const ChunkPlan& plan;
  Table<PairSums>& sums;

  template <class Visit>
  void visit(const Chunk& chunk, Visit visit) const {
    PairSums& here = sums[static_cast<std::size_t>(&chunk - plan.chunks.data())];
    here = {};  // of orders that take two passes the second counts
    RowParts::visit(chunk, [&](std::size_t part, PairSpan pair, const Chunk& piece) {
      pair.sums = pair.formula.is_difference ? nullptr : &here;
      visit(part, pair, piece);
    });
  }
};

// Gradients that are written as they are measured, where they have a second array.
struct AccumulatedParts : TensorParts {
  const PairTable& pairs;

  template <class Visit>
  void visit(const Chunk& chunk, Visit visit) const {
    const PairRows& pair = pairs.gradients[chunk.tensor];
    if (pair.y.first)
      visit(std::size_t{chunk.tensor}, AccumulatedSpan{pair[0]}, chunk);
    else
      TensorParts::visit(chunk, visit);
  }
};

template <class Parts>
Table<NormSum> sums_of(const Parts& parts, const ChunkPlan& plan, const NormOrder& order) {
  Table<NormSum> sums(parts.count());
  measure_parts(parts, plan, order,
                [&](const Chunk&, std::size_t part, const NormSum& sum) { sums[part] = sum; });
  return sums;
}

}  // namespace

Table<NormSum> measure(std::span<const Span> spans, const ChunkPlan& plan, const NormOrder& order,
                       std::span<ExactSum> exact) {
  if (exact.empty()) return sums_of(TensorParts{spans}, plan, order);
  struct Store {
    Table<NormSum>& sums;
    std::span<ExactSum> exact;
    void operator()(const Chunk&, std::size_t part, const NormSum& sum) const { sums[part] = sum; }
    void keep(std::size_t part, const ExactSum& sum) const { exact[part] = sum; }
  };
  Table<NormSum> sums(spans.size());
  measure_parts(TensorParts{spans}, plan, order, Store{sums, exact});
  return sums;
}

Table<NormSum> measure_rows(const RowTable& rows, const ChunkPlan& plan, const NormOrder& order) {
  return sums_of(RowParts(rows), plan, order);
}

Table<NormSum> measure_pairs(const PairTable& pairs, const ChunkPlan& plan, const NormOrder& order,
                             PairSums& second) {
  Table<PairSums> sums(plan.chunks.size());
  Table<NormSum> parts = sums_of(PairParts{RowParts(pairs), plan, sums}, plan, order);
  const DefaultFloatEnvironment environment;
  for (const PairSums& chunk : sums) second.add(chunk);
  return parts;
}

Table<NormSum> accumulate(std::span<const Span> spans, const PairTable& pairs,
                          const ChunkPlan& plan) {
  return sums_of(AccumulatedParts{{spans}, pairs}, plan, NormOrder{});
}

void row_norms(const RowTable& rows, const ChunkPlan& plan, const NormOrder& order,
               std::span<double> norms) {
  measure_parts(RowParts(rows), plan, order,
                [&](const Chunk&, std::size_t part, const NormSum& sum) {
                  norms[part] = norm_of(order, sum);
                });
}

RowNorms measure_row_norms(const RowTable& rows, const ChunkPlan& plan, double grad_scale) {
  const NormOrder order;
  RowNorms norms{Table<double>(rows.count()), {}};
  Table<ExactSum> chunks(plan.chunks.size()), tensors(rows.gradients.size());
  measure_parts(RowParts(rows), plan, order,
                [&](const Chunk& chunk, std::size_t part, const NormSum& sum) {
                  norms.rows[part] = norm_of(order, sum, grad_scale);
                  const auto c = static_cast<std::size_t>(&chunk - plan.chunks.data());
                  chunks[c].add(sum.value, sum.exponent);
                });
  const DefaultFloatEnvironment environment;
  for (std::size_t c = 0; c < chunks.size(); ++c) tensors[plan.chunks[c].tensor].add(chunks[c]);
  for (const ExactSum& sum : tensors) norms.tensors.push_back(norm_sum(sum));
  return norms;
}

}  // namespace gradclip::cpu
