// The kernels. Each is compiled for a table in memory and for one inside the argument.
#pragma once

#include "cuda/change.cuh"
#include "cuda/measure.cuh"

namespace gradclip::cuda {

// What holds for both kinds of arguments: the table in memory, or inside the argument itself.
template <class Arguments>
__device__ __forceinline__ const Arguments& with_table(const Arguments& arguments) {
  return arguments;
}
template <class Arguments>
__device__ __forceinline__ Arguments with_table(const WithEntries<Arguments>& list) {
  Arguments arguments = list.arguments;
  arguments.table.entries = list.entries;
  return arguments;
}

template <Measure kMeasure, class Arguments>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    measure_kernel(const __grid_constant__ Arguments arguments) {
  measure<kMeasure>(with_table(arguments));
}
template <class Arguments>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    change_kernel(const __grid_constant__ Arguments arguments) {
  change(with_table(arguments));
}
template <class Arguments>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    clip_by_value_kernel(const __grid_constant__ Arguments arguments) {
  clip_by_value(with_table(arguments));
}
template <class Arguments>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    count_nonfinite_kernel(const __grid_constant__ Arguments arguments) {
  const auto& list = with_table(arguments);
  count_nonfinite(list.table, list.counts);
}
template <class Arguments>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    probe_read_kernel(const __grid_constant__ Arguments arguments) {
  const auto& list = with_table(arguments);
  unsigned seen = 0;
  probe<kTuning.rows_in_flight>(list.table, [&](const uint4* mine) {
    uint4 v[kTuning.rows_in_flight];
#pragma unroll
    for (int k = 0; k < kTuning.rows_in_flight; ++k) v[k] = __ldg(mine + 32 * k);
#pragma unroll
    for (int k = 0; k < kTuning.rows_in_flight; ++k) seen |= v[k].x | v[k].y | v[k].z | v[k].w;
  });
  // A pattern that no sum of bits gives by accident: the loads must not be left out.
  if (seen == 0x5eed5eedu) list.counts[0] = seen;
}
template <class Arguments>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    probe_read_write_kernel(const __grid_constant__ Arguments arguments) {
  const auto& list = with_table(arguments);
  const auto flip = static_cast<unsigned>(list.flip);  // 0, which the compiler does not know
  probe<kTuning.vectors_in_flight>(list.table, [&](uint4* mine) {
    uint4 v[kTuning.vectors_in_flight];
#pragma unroll
    for (int k = 0; k < kTuning.vectors_in_flight; ++k) v[k] = __ldcg(mine + 32 * k);
#pragma unroll
    for (int k = 0; k < kTuning.vectors_in_flight; ++k)
      __stcg(mine + 32 * k, make_uint4(v[k].x ^ flip, v[k].y ^ flip, v[k].z ^ flip, v[k].w ^ flip));
  });
}

}  // namespace gradclip::cuda
