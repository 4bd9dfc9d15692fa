// The sum of every tensor in one pass. The twin of cuda/measure.cuh, which also decides in that pass.
#include <algorithm>
#include <cmath>

#include "cpu/elements.hpp"
#include "cpu/engine.hpp"
#include "cpu/float_environment.hpp"
#include "cpu/isa.hpp"
#include "cpu/memory.hpp"
#include "cpu/workers.hpp"

namespace gradclip::cpu {
namespace {

double largest_of(const Span& span, const Chunk& chunk) {
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
ExactSum sum_powers(const Span& span, const Chunk& chunk, double unit, double p) {
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

// The sum of every tensor; `units` are the largest magnitudes of slow tensors, if there are any.
Table<NormSum> sums_of(std::span<const Span> spans, const ChunkPlan& plan, const NormOrder& order,
                       const Table<double>& units) {
  Table<NormSum> sums(spans.size());
  Table<ExactSum> partials(plan.partials);
  for_each_chunk(plan, Pass::forward, [&](const Chunk& chunk) {
    const Span& span = spans[chunk.tensor];
    const TypeKernels& type = kernels().of(span.dtype);
    const auto sum_tile = order.kind == NormOrder::two ? type.sum_squares : type.sum_magnitudes;
    const bool whole = chunk.partial == kWholeTensor;
    const bool slow = !units.empty() && needs_unit(order, is_complex(span.dtype));
    if (whole && !slow && !span.layout &&
        chunk.bytes <= static_cast<std::int64_t>(order::kTileBytes)) {
      // A tensor of one tile, of which there are often thousands: nothing to add.
      const WideValue sum = sum_tile(span.data, static_cast<std::size_t>(chunk.bytes));
      sums[chunk.tensor] = {sum.value, sum.exponent, 0.0};
      return;
    }
    ExactSum sum;
    if (slow) {
      const double unit = units[chunk.tensor];
      if (unit != 0.0 && is_finite(unit)) sum = sum_powers(span, chunk, unit, order.p);
    } else {
      for_each_tile(span, chunk, [&](const std::byte* tile, std::size_t bytes) {
        sum.add(sum_tile(tile, bytes));
      });
    }
    if (whole)
      sums[chunk.tensor] = norm_sum(sum);
    else
      partials[chunk.partial] = sum;
  });
  for (std::size_t c = 0; c < plan.chunks.size();) {
    const Chunk& first = plan.chunks[c];
    if (first.partial == kWholeTensor) {
      ++c;
      continue;
    }
    ExactSum sum;
    for (; c < plan.chunks.size() && plan.chunks[c].tensor == first.tensor; ++c)
      sum.add(partials[plan.chunks[c].partial]);
    sums[first.tensor] = norm_sum(sum);
  }
  return sums;
}

}  // namespace

Table<NormSum> measure(std::span<const Span> spans, const ChunkPlan& plan, const NormOrder& order) {
  const DefaultFloatEnvironment environment;  // also for what is added up here
  if (order.kind == NormOrder::infinity) {
    Table<NormSum> result;
    result.reserve(spans.size());
    const auto largest = [&](const Chunk& chunk) { return largest_of(spans[chunk.tensor], chunk); };
    for (const double m : largest_by_tensor(spans.size(), plan, largest))
      result.push_back({m, 0, 0.0});
    return result;
  }
  const auto slow = [&](const Span& span) { return needs_unit(order, is_complex(span.dtype)); };
  if (order.kind == NormOrder::two || std::none_of(spans.begin(), spans.end(), slow))
    return sums_of(spans, plan, order, {});

  const auto largest = [&](const Chunk& chunk) {
    const Span& span = spans[chunk.tensor];
    return slow(span) ? largest_of(span, chunk) : 0.0;
  };
  const Table<double> units = largest_by_tensor(spans.size(), plan, largest);
  Table<NormSum> sums = sums_of(spans, plan, order, units);
  for (std::size_t i = 0; i < spans.size(); ++i) {
    if (!slow(spans[i])) continue;
    const double sum = is_finite(units[i]) ? narrow({sums[i].value, sums[i].exponent}) : 1.0;
    sums[i] = {sum, 0, units[i]};
    if (order.kind == NormOrder::one) sums[i] = magnitude_sum(sum, units[i]);
  }
  return sums;
}

}  // namespace gradclip::cpu
