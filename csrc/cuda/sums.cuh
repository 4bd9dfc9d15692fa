// Sums that a framework hands on as words: added over shards, and decided from. Each decision has one block. What
// measure.cuh ends with, from sums that it has not measured; on a CPU core/clip.cpp serves both.
#pragma once

#include "cuda/decide.cuh"

namespace gradclip::cuda {

__device__ __forceinline__ double read_float(const Floats& floats, std::size_t i) {
  return floats.are_float32 ? double{static_cast<const float*>(floats.data)[i]}
                            : static_cast<const double*>(floats.data)[i];
}
__device__ __forceinline__ void write_float(const Floats& floats, std::size_t i, double value) {
  if (floats.are_float32)
    static_cast<float*>(floats.data)[i] = static_cast<float>(value);
  else
    static_cast<double*>(floats.data)[i] = value;
}

// One warp for each sum.
__global__ void __launch_bounds__(kThreads)
    combine_sums_kernel(const __grid_constant__ CombineSumsArguments list) {
  auto* const sums = &shared_memory<ExactSum>();
  const std::size_t all = list.count * list.parts;
  const std::size_t warps = std::size_t{gridDim.x} * kWarps;
  for (std::size_t i = std::size_t{blockIdx.x} * kWarps + warp_id(); i < all; i += warps) {
    const std::size_t step = list.parts * kSumWords;  // to the next shard
    const std::uint32_t* const first =
        list.words + i / list.parts * list.shards * step + i % list.parts * kSumWords;
    const NormSum sum = group_sum(
        list.order, list.shards, [=](std::uint32_t k) { return load_sum(first + k * step); }, sums);
    if (lane_id() == 0) store_sum(sum, list.combined + i * kSumWords);
  }
}

// visit(i, sum) for every tensor, which is the group of its rows, by one thread.
template <class Visit>
__device__ __forceinline__ void for_each_tensor(const DecideSumsArguments& list,
                                                const std::uint32_t* words, ExactSum* sums,
                                                Visit visit) {
  const TableView& table = list.table;
  if (!table.rows) {
    for (std::uint32_t i = threadIdx.x; i < table.tensors; i += kThreads)
      visit(i, load_sum(words + i * kSumWords));
    return;
  }
  for (auto i = static_cast<std::uint32_t>(warp_id()); i < table.tensors; i += kWarps) {
    const RowEntry rows = table.rows[i];
    const std::uint32_t* const first = words + rows.first * kSumWords;
    const NormSum sum = group_sum(
        list.decisions.order, rows.count,
        [=](std::uint32_t k) { return load_sum(first + k * kSumWords); }, sums);
    if (lane_id() == 0) visit(i, sum);
  }
}

// visit(g, sum) for every group, by one thread. `tensors`: their sums.
template <class Visit>
__device__ __forceinline__ void for_each_group(const DecideSumsArguments& list,
                                               const std::uint32_t* words, const NormSum* tensors,
                                               ExactSum* sums, Visit visit) {
  const TableView& table = list.table;
  const NormOrder& order = list.decisions.order;
  if (list.grouping == Groups::tensor || list.grouping == Groups::row) {
    for (std::uint32_t g = threadIdx.x; g < table.groups; g += kThreads)
      visit(g, list.grouping == Groups::row ? load_sum(words + g * kSumWords) : tensors[g]);
    return;
  }
  for (auto g = static_cast<std::uint32_t>(warp_id()); g < table.groups; g += kWarps) {
    NormSum sum;
    if (list.grouping == Groups::sample) {
      sum = group_sum(
          order, table.tensors,
          [=, &table](std::uint32_t k) {
            // Of a list whose parts are whole: one sample.
            if (!table.rows) return load_sum(words + k * kSumWords);
            const RowEntry rows = table.rows[k];
            return g < rows.count ? load_sum(words + (rows.first + g) * kSumWords) : NormSum{};
          },
          sums);
    } else {
      const bool are_all = list.grouping == Groups::all;
      const std::uint32_t begin = are_all ? 0 : table.group_begin[g];
      const std::uint32_t end = are_all ? table.tensors : table.group_begin[g + 1];
      const std::uint32_t* const members = are_all ? nullptr : table.members + begin;
      sum = group_sum(
          order, end - begin, [=](std::uint32_t k) { return tensors[members ? members[k] : k]; },
          sums);
    }
    if (lane_id() == 0) visit(g, sum);
  }
}

// visit(part, group) for every part, by one thread.
template <class Visit>
__device__ __forceinline__ void for_each_part(const DecideSumsArguments& list, Visit visit) {
  const TableView& table = list.table;
  if (list.grouping == Groups::row || !table.rows) {
    for (std::uint32_t part = threadIdx.x; part < list.parts; part += kThreads)
      visit(part, list.grouping == Groups::sample ? 0 : table.group_of(part));
    return;
  }
  for (auto i = static_cast<std::uint32_t>(warp_id()); i < table.tensors; i += kWarps) {
    const RowEntry rows = table.rows[i];
    for (auto k = static_cast<std::uint32_t>(lane_id()); k < rows.count; k += 32)
      visit(rows.first + k, list.grouping == Groups::sample ? k : table.group_of(i));
  }
}

// Decision `d`, by a block.
__device__ __forceinline__ void decide_sums(const DecideSumsArguments& list, std::size_t d) {
  const TableView& table = list.table;
  const SumDecisions& all = list.decisions;
  auto* const sums = &shared_memory<ExactSum>();
  NormSum* const tensors = list.sums_of_tensors + std::size_t{blockIdx.x} * table.tensors;
  double* const norms = list.group_norms + std::size_t{blockIdx.x} * table.groups;
  double* const coefficients = list.coefficients + std::size_t{blockIdx.x} * table.groups;
  const std::uint32_t* const words = all.words + d * list.parts * kSumWords;
  const std::size_t first_tensor = d * table.tensors, first_group = d * table.groups;
  const std::size_t first_limit = all.per_group ? first_group : d;
  ClipOptions options = all.options;
  options.grad_scale = read_float(all.grad_scale, d);
  if (!is_finite(options.grad_scale) || options.grad_scale <= 0.0) options.grad_scale = quiet_nan();

  int nonfinite = 0;
  for_each_tensor(list, words, sums, [&](std::uint32_t i, const NormSum& sum) {
    const bool is_odd = !is_finite(sum.value) || !is_finite(sum.unit);
    nonfinite |= is_odd;
    tensors[i] = sum;
    all.nonfinite[first_tensor + i] = is_odd;
    write_float(all.norms, first_tensor + i, norm_call(all.order, sum, options.grad_scale));
  });
  __syncthreads();
  for_each_group(list, words, tensors, sums, [&](std::uint32_t g, const NormSum& sum) {
    norms[g] = norm_call(all.order, sum, options.grad_scale);
    nonfinite |= !is_finite(norms[g]);
    write_float(all.group_norms, first_group + g, norms[g]);
  });
  if (warp_id() == 0) {
    const NormSum total =
        group_sum(all.order, table.tensors, [=](std::uint32_t k) { return tensors[k]; }, sums);
    if (lane_id() == 0)
      write_float(all.total_norm, d, norm_call(all.order, total, options.grad_scale));
  }

  GroupFindings findings;
  findings.any_nonfinite = __syncthreads_or(nonfinite);
  int clips = 0, changes = 0;
  for (std::uint32_t g = threadIdx.x; g < table.groups; g += kThreads) {
    const double limit = read_float(all.limits, first_limit + (all.per_group ? g : 0));
    // Nothing here can raise: a threshold that is none makes NaN.
    const double norm = is_usable(options, limit) ? norms[g] : quiet_nan();
    const GroupDecision group = decide_group(norm, limit, options, findings);
    coefficients[g] = group.coefficient;
    write_float(all.coefficients, first_group + g, group.coefficient);
    clips |= group.clips;
    changes |= group.changes;
  }
  const bool any_clips = __syncthreads_or(clips), any_changes = __syncthreads_or(changes);
  if (threadIdx.x == 0) all.clipped[d] = any_clips;
  const Action action = action_of(options, findings, any_changes);
  double* const factors = all.factors + d * list.parts;
  for_each_part(list, [&](std::uint32_t part, std::uint32_t group) {
    factors[part] = action == Action::nothing ? 1.0
                    : action == Action::zero  ? kSetToZero
                                              // + 0: a threshold of -0 is one of 0.
                                              : coefficients[group] / options.grad_scale + 0.0;
  });
}

__global__ void __launch_bounds__(kThreads)
    decide_sums_kernel(const __grid_constant__ DecideSumsArguments list) {
  for (std::size_t d = blockIdx.x; d < list.decisions.count; d += gridDim.x) {
    decide_sums(list, d);
    __syncthreads();  // before the next one's sums
  }
}

}  // namespace gradclip::cuda
