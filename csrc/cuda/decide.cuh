// The end of a measurement, by one block: norms of groups, coefficients, and what is to be done. The
// twin of core/clip.cpp.
#pragma once

#include "core/decide.hpp"
#include "cuda/arguments.hpp"
#include "cuda/combine.cuh"

namespace gradclip::cuda {

__device__ __noinline__ double power_call(double x, double p) { return power(x, p); }
__device__ __noinline__ double norm_call(const NormOrder& order, NormSum sum, double scale) {
  return norm_of(order, sum, scale);
}

// The sum of a group by one warp, step 5 of the reduction order; sum_of(k) is that of its tensor k.
// Right in lane 0. `sums` has an element for every thread of the block.
template <class SumOf>
__device__ __noinline__ NormSum group_sum(const NormOrder& order, std::uint32_t count, SumOf sum_of,
                                          ExactSum* sums) {
  const auto lane = static_cast<std::uint32_t>(lane_id());
  double largest = 0.0;  // of magnitudes, or of units
  if (order.kind == NormOrder::infinity || order.kind == NormOrder::other) {
    for (std::uint32_t k = lane; k < count; k += 32) {
      const NormSum sum = sum_of(k);
      largest = larger(order.kind == NormOrder::other ? sum.unit : sum.value, largest);
    }
    for (int step = 16; step > 0; step /= 2)
      largest = larger(__shfl_xor_sync(kFullWarp, largest, step), largest);
    if (order.kind == NormOrder::infinity) return {largest, 0, 0.0};
  }
  ExactSum& mine = sums[threadIdx.x];
  __syncwarp();
  mine = ExactSum{};
  for (std::uint32_t k = lane; k < count; k += 32) {
    const NormSum sum = sum_of(k);
    if (order.kind != NormOrder::other)
      add_to(mine, sum.value, sum.exponent);
    else if (largest != 0.0)
      add_to(mine, sum.value * power_call(is_finite(largest) ? sum.unit / largest : 1.0, order.p),
             0);
  }
  for (int half = 16; half > 0; half /= 2) {
    __syncwarp();
    if (lane_id() < half) add_to(mine, sums[threadIdx.x + static_cast<unsigned>(half)]);
  }
  const WideValue sum = rounded(mine);
  if (order.kind == NormOrder::other) return {narrow(sum), 0, largest};
  return {sum.value, sum.exponent, 0.0};
}

__device__ __forceinline__ double read_limit(const Limits& limits, std::uint32_t group) {
  if (!limits.device) return limits.value;
  const std::uint32_t at = limits.per_group ? group : 0;
  return visit_real_type(limits.dtype, [&](auto type) {
    return to_double(static_cast<const decltype(type)*>(limits.device)[at]);
  });
}

// From the norms of groups, which the threads of this block have written, to coefficients and flags: the
// loop of decide_clip().
__device__ __noinline__ void decide_groups(const MeasureArguments& arguments) {
  const ResultPointers& result = arguments.result;
  const auto& [limits, options] = arguments.decision;
  const std::uint32_t groups = arguments.table.groups;
  __syncthreads();
  int nonfinite = 0, unusable = 0;
  for (std::uint32_t g = threadIdx.x; g < groups; g += kThreads) {
    nonfinite |= !is_finite(result.group_norms[g]);
    unusable |= !is_usable(options, read_limit(limits, g));
  }
  GroupFindings all;
  all.any_nonfinite = __syncthreads_or(nonfinite);
  all.any_unusable = __syncthreads_or(unusable);
  int clips = 0, changes = 0;
  for (std::uint32_t g = threadIdx.x; g < groups; g += kThreads) {
    const GroupDecision group =
        decide_group(result.group_norms[g], read_limit(limits, g), options, all);
    result.coefficients[g] = group.coefficient;
    clips |= group.clips;
    changes |= group.changes;
  }
  const bool any_clips = __syncthreads_or(clips), any_changes = __syncthreads_or(changes);
  if (threadIdx.x != 0) return;
  *result.flags = {static_cast<std::uint8_t>(any_clips),
                   static_cast<std::uint8_t>(all.any_nonfinite),
                   static_cast<std::uint8_t>(all.any_unusable),
                   static_cast<std::uint8_t>(action_of(options, all, any_changes))};
}

__device__ __noinline__ void write_group(const MeasureArguments& arguments, std::uint32_t group,
                                         NormSum sum) {
  arguments.result.group_norms[group] = norm_call(arguments.order, sum, arguments.grad_scale);
  arguments.result.group_sums[group] = to_plain(arguments.order, sum);
}

// The last block of a measurement of rows: gradients, each the group of its rows, samples, and the total.
template <class SumOf>
__device__ __noinline__ void finish_rows(const MeasureArguments& arguments, SumOf sum_of,
                                         ExactSum* sums) {
  const TableView& table = arguments.table;
  const NormOrder& order = arguments.order;
  NormSum* const of_gradients = arguments.scratch.sums_of_gradients;
  for (auto i = static_cast<std::uint32_t>(warp_id()); i < table.tensors; i += kWarps) {
    const RowEntry rows = table.rows[i];
    const bool has_units =
        order.kind == NormOrder::infinity || needs_unit(order, is_complex(table.entries[i].dtype));
    int nonfinite = 0;
    for (auto k = static_cast<std::uint32_t>(lane_id()); k < rows.count; k += 32) {
      Largest unit;
      if (has_units) load_fresh(&arguments.scratch.units[rows.first + k], unit);
      nonfinite |= has_units ? unit.nonfinite != 0 : !is_finite(sum_of(rows.first + k).value);
    }
    nonfinite = __any_sync(kFullWarp, nonfinite);
    const NormSum sum =
        group_sum(order, rows.count, [=](std::uint32_t k) { return sum_of(rows.first + k); }, sums);
    if (lane_id() != 0) continue;
    of_gradients[i] = sum;
    arguments.result.norms[i] = norm_call(order, sum, arguments.grad_scale);
    arguments.result.nonfinite[i] = nonfinite != 0;
  }
  if (arguments.grouping == Groups::sample) {
    for (auto g = static_cast<std::uint32_t>(warp_id()); g < table.groups; g += kWarps) {
      const NormSum sum = group_sum(
          order, table.tensors,
          [=](std::uint32_t k) {
            return g < table.rows[k].count ? sum_of(table.rows[k].first + g) : NormSum{};
          },
          sums);
      if (lane_id() == 0) write_group(arguments, g, sum);
    }
  }
  __syncthreads();
  if (warp_id() != 0) return;
  const NormSum total =
      group_sum(order, table.tensors, [=](std::uint32_t k) { return of_gradients[k]; }, sums);
  if (lane_id() == 0) *arguments.result.total_norm = norm_call(order, total, arguments.grad_scale);
}

// The last block of a measurement: groups and the total. `total` is the sum over all tensors, where
// that could be taken along the way: in all orders but `other`.
__device__ __noinline__ void finish_measurement(const MeasureArguments& arguments, NormSum total,
                                                ExactSum* sums) {
  const TableView& table = arguments.table;
  const NormOrder& order = arguments.order;
  const NormSum* const sums_of_tensors = arguments.scratch.sums;
  const auto sum_of = [=](std::uint32_t tensor) {
    NormSum sum;
    load_fresh(&sums_of_tensors[tensor], sum);
    return sum;
  };
  if (table.rows) {
    finish_rows(arguments, sum_of, sums);
    if (arguments.decides) decide_groups(arguments);
    return;
  }
  if (order.kind == NormOrder::other && warp_id() == 0)
    total = group_sum(order, table.tensors, sum_of, sums);
  if (threadIdx.x == 0) {
    *arguments.result.total_norm = norm_call(order, total, arguments.grad_scale);
    if (arguments.grouping == Groups::all) write_group(arguments, 0, total);
  }
  if (arguments.grouping == Groups::tensor) {
    for (std::uint32_t g = threadIdx.x; g < table.groups; g += kThreads)
      write_group(arguments, g, sum_of(g));
  } else if (arguments.grouping == Groups::labels) {
    for (auto g = static_cast<std::uint32_t>(warp_id()); g < table.groups; g += kWarps) {
      const std::uint32_t begin = table.group_begin[g];
      const std::uint32_t* const members = table.members + begin;
      const NormSum sum = group_sum(
          order, table.group_begin[g + 1] - begin,
          [=](std::uint32_t k) { return sum_of(members[k]); }, sums);
      if (lane_id() == 0) write_group(arguments, g, sum);
    }
  }
  if (arguments.decides) decide_groups(arguments);
}

// One block: of groups whose sums have come back from all processes, or whose norms are there.
__global__ void __launch_bounds__(kThreads)
    decide_kernel(const __grid_constant__ DecideArguments list) {
  const MeasureArguments& arguments = list.measured;
  if (list.sums) {
    auto* const sums = &shared_memory<ExactSum>();
    const double* const reduced = list.sums;
    const auto sum_of = [=](std::uint32_t group) -> NormSum {
      return {reduced[group] + 0.0, 0, 1.0};  // no -0
    };
    for (std::uint32_t g = threadIdx.x; g < arguments.table.groups; g += kThreads)
      write_group(arguments, g, sum_of(g));
    if (warp_id() == 0) {
      const NormSum total = arguments.grouping == Groups::all
                                ? sum_of(0)
                                : group_sum(arguments.order, arguments.table.groups, sum_of, sums);
      if (lane_id() == 0)
        *arguments.result.total_norm = norm_call(arguments.order, total, arguments.grad_scale);
    }
  }
  if (arguments.decides) decide_groups(arguments);
}

}  // namespace gradclip::cuda
