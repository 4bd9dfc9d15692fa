// The end of a measurement, by one block: norms of groups, coefficients, and what is to be done. The
// twin of core/clip.cpp.
#pragma once

#include "core/coefficient.hpp"
#include "cuda/arguments.hpp"
#include "cuda/combine.cuh"

namespace gradclip::cuda {

__device__ __noinline__ double power_of(double x, double p) { return power(x, p); }
__device__ __noinline__ double norm(const NormOrder& order, NormSum sum, double scale) {
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
      add_to(mine, sum.value * power_of(is_finite(largest) ? sum.unit / largest : 1.0, order.p), 0);
  }
  for (int half = 16; half > 0; half /= 2) {
    __syncwarp();
    if (lane_id() < half) add_to(mine, sums[threadIdx.x + static_cast<unsigned>(half)]);
  }
  const WideValue sum = rounded(mine);
  if (order.kind == NormOrder::other) return {narrow(sum), 0, largest};
  return {sum.value, sum.exponent, 0.0};
}

__device__ __forceinline__ double read_threshold(const Threshold& threshold, std::uint32_t group) {
  if (!threshold.device) return threshold.value;
  const std::uint32_t at = threshold.per_group ? group : 0;
  switch (threshold.dtype) {
    case DType::float16: return to_double(static_cast<const Float16*>(threshold.device)[at]);
    case DType::bfloat16: return to_double(static_cast<const BFloat16*>(threshold.device)[at]);
    case DType::float32: return static_cast<const float*>(threshold.device)[at];
    default: return static_cast<const double*>(threshold.device)[at];
  }
}

// From the norms of groups, which the threads of this block have written, to coefficients and flags.
__device__ __noinline__ void decide_from_norms(const MeasureArguments& arguments) {
  const ResultPointers& result = arguments.result;
  const Request& request = arguments.request;
  const std::uint32_t groups = arguments.table.groups;
  __syncthreads();
  int odd_norm = 0, odd_threshold = 0;
  for (std::uint32_t g = threadIdx.x; g < groups; g += kThreads) {
    odd_norm |= !is_finite(result.group_norms[g]);
    odd_threshold |= !is_threshold(read_threshold(request.max_norm, g));
  }
  const bool nonfinite = __syncthreads_or(odd_norm);
  const bool bad_threshold = __syncthreads_or(odd_threshold);
  const bool stay =
      nonfinite && (request.policy == NonFinite::raise || request.policy == NonFinite::skip);
  const bool zero = nonfinite && request.policy == NonFinite::zero && !bad_threshold;
  int clipped = 0, changed = 0;
  for (std::uint32_t g = threadIdx.x; g < groups; g += kThreads) {
    const double max_norm = read_threshold(request.max_norm, g);
    double coefficient = clip_coefficient(result.group_norms[g], max_norm, request.epsilon);
    if (stay) coefficient = 1.0;
    if (zero) coefficient = 0.0;
    if (bad_threshold) coefficient = quiet_nan();
    result.coefficients[g] = coefficient;
    clipped |= coefficient != 1.0;
    changed |= coefficient / request.grad_scale != 1.0;
  }
  const bool any_clipped = __syncthreads_or(clipped), any_changed = __syncthreads_or(changed);
  if (threadIdx.x != 0) return;
  const bool nothing = stay || bad_threshold || (!zero && !any_changed);
  const auto action = nothing ? ClipDecision::nothing
                      : zero  ? ClipDecision::zero
                              : ClipDecision::scale;
  *result.flags = {static_cast<std::uint8_t>(!stay && !bad_threshold && (zero || any_clipped)),
                   static_cast<std::uint8_t>(nonfinite), static_cast<std::uint8_t>(bad_threshold),
                   static_cast<std::uint8_t>(action)};
}

__device__ __noinline__ void write_group(const MeasureArguments& arguments, std::uint32_t group,
                                         NormSum sum) {
  const Request& request = arguments.request;
  arguments.result.group_norms[group] = norm(request.order, sum, request.grad_scale);
  if (request.until == Request::sums)
    arguments.result.group_sums[group] = to_plain(request.order, sum);
}

// The last block of a measurement: groups and the total. `total` is the sum over all tensors, where
// that could be taken along the way: in all orders but `other`.
__device__ __noinline__ void finish_measurement(const MeasureArguments& arguments, NormSum total,
                                                ExactSum* sums) {
  const TableView& table = arguments.table;
  const Request& request = arguments.request;
  const NormSum* const sums_of_tensors = arguments.scratch.sums;
  const auto sum_of = [=](std::uint32_t tensor) {
    NormSum sum;
    load_fresh(&sums_of_tensors[tensor], sum);
    return sum;
  };
  if (request.order.kind == NormOrder::other && warp_id() == 0)
    total = group_sum(request.order, table.tensors, sum_of, sums);
  if (threadIdx.x == 0) {
    *arguments.result.total_norm = norm(request.order, total, request.grad_scale);
    if (arguments.grouping == Groups::all && request.until != Request::norms)
      write_group(arguments, 0, total);
  }
  if (request.until == Request::norms) return;
  if (arguments.grouping == Groups::tensor) {
    for (std::uint32_t g = threadIdx.x; g < table.groups; g += kThreads)
      write_group(arguments, g, sum_of(g));
  } else if (arguments.grouping == Groups::labels) {
    for (auto g = static_cast<std::uint32_t>(warp_id()); g < table.groups; g += kWarps) {
      const std::uint32_t begin = table.group_begin[g];
      const std::uint32_t* const members = table.members + begin;
      const NormSum sum = group_sum(
          request.order, table.group_begin[g + 1] - begin,
          [=](std::uint32_t k) { return sum_of(members[k]); }, sums);
      if (lane_id() == 0) write_group(arguments, g, sum);
    }
  }
  if (request.until == Request::clip) decide_from_norms(arguments);
}

// One block: the sums of groups have come back from all processes.
__global__ void __launch_bounds__(kThreads)
    decide_kernel(const __grid_constant__ MeasureArguments arguments) {
  auto* const sums = &shared_memory<ExactSum>();
  const Request& request = arguments.request;
  const double* const reduced = arguments.reduced;
  const auto sum_of = [=](std::uint32_t group) -> NormSum {
    return {reduced[group] + 0.0, 0, 1.0};  // no -0
  };
  for (std::uint32_t g = threadIdx.x; g < arguments.table.groups; g += kThreads)
    arguments.result.group_norms[g] = norm(request.order, sum_of(g), request.grad_scale);
  if (warp_id() == 0) {
    const NormSum total = arguments.grouping == Groups::all
                              ? sum_of(0)
                              : group_sum(request.order, arguments.table.groups, sum_of, sums);
    if (lane_id() == 0)
      *arguments.result.total_norm = norm(request.order, total, request.grad_scale);
  }
  decide_from_norms(arguments);
}

}  // namespace gradclip::cuda
