// The kernels. Each is compiled twice, for List = InMemory<...> and InArgument<...>.
#pragma once

#include "cuda/change.cuh"
#include "cuda/measure.cuh"

namespace gradclip::cuda {

template <Measure kMeasure, class List>
__global__ void __launch_bounds__(kThreads, kMeasure == Measure::powers ? kBlocksOfLargeKernels
                                                                        : kBlocksPerMultiprocessor)
    measure_kernel(const __grid_constant__ List list) {
  measure<kMeasure>(list.arguments, list.entries);
}
template <class List>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    change_kernel(const __grid_constant__ List list) {
  change(list.arguments, list.entries);
}
template <class List>
__global__ void __launch_bounds__(kThreads, kBlocksOfLargeKernels)
    clip_by_value_kernel(const __grid_constant__ List list) {
  clip_by_value(list.arguments, list.entries);
}
template <class List>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    count_nonfinite_kernel(const __grid_constant__ List list) {
  count_nonfinite(list.arguments.table, list.entries, list.arguments.counts);
}
template <class List>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    probe_read_kernel(const __grid_constant__ List list) {
  unsigned seen = 0;
  probe<kTuning.rows_in_flight>(list.arguments.table, list.entries, [&](const uint4* mine) {
    uint4 v[kTuning.rows_in_flight];
#pragma unroll
    for (int k = 0; k < kTuning.rows_in_flight; ++k) v[k] = __ldg(mine + 32 * k);
#pragma unroll
    for (int k = 0; k < kTuning.rows_in_flight; ++k) seen |= v[k].x | v[k].y | v[k].z | v[k].w;
  });
  // A pattern that no sum of bits gives by accident: the loads must not be left out.
  if (seen == 0x5eed5eedu) list.arguments.counts[0] = seen;
}
template <class List>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    probe_read_write_kernel(const __grid_constant__ List list) {
  const auto flip =
      static_cast<unsigned>(list.arguments.flip);  // 0, which the compiler does not know
  probe<kTuning.vectors_in_flight>(list.arguments.table, list.entries, [&](uint4* mine) {
    uint4 v[kTuning.vectors_in_flight];
#pragma unroll
    for (int k = 0; k < kTuning.vectors_in_flight; ++k) v[k] = __ldcg(mine + 32 * k);
#pragma unroll
    for (int k = 0; k < kTuning.vectors_in_flight; ++k)
      __stcg(mine + 32 * k, make_uint4(v[k].x ^ flip, v[k].y ^ flip, v[k].z ^ flip, v[k].w ^ flip));
  });
}

}  // namespace gradclip::cuda
