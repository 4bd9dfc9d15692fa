// The kernels. The 2-norm and what follows it are compiled for List = InMemory<...> and two sizes of
// InArgument<...>, the others for InMemory<...> alone.
#pragma once

#include "cuda/change.cuh"
#include "cuda/measure.cuh"
#include "cuda/sums.cuh"

namespace gradclip::cuda {

template <Measure kMeasure, class List>
__global__ void __launch_bounds__(kThreads, kMeasure == Measure::powers ? kBlocksOfLargeKernels
                                                                        : kBlocksPerMultiprocessor)
    measure_kernel(const __grid_constant__ List list) {
  using Accumulator = typename AccumulatorOf<kMeasure>::Type;
  measure<kMeasure, OfGradients>(list.arguments, list.view(),
                                 shared_memory<CombineShared<Accumulator>>());
}
template <Measure kMeasure>
__global__ void __launch_bounds__(kThreads, kBlocksOfLargeKernels)
    measure_pairs_kernel(const __grid_constant__ InMemory<MeasureArguments> list) {
  using Accumulator = typename AccumulatorOf<kMeasure>::Type;
  measure<kMeasure, OfPairs>(list.arguments, list.view(), shared_memory<PairShared<Accumulator>>());
}
template <class List>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    change_kernel(const __grid_constant__ List list) {
  change(list.arguments, list.view());
}
__global__ void __launch_bounds__(kThreads, kBlocksOfLargeKernels)
    change_pairs_kernel(const __grid_constant__ InMemory<ChangeArguments> list) {
  change_pairs(list.arguments, list.view());
}
template <class List>
__global__ void __launch_bounds__(kThreads, kBlocksOfLargeKernels)
    clip_by_value_kernel(const __grid_constant__ List list) {
  clip_by_value(list.arguments, list.view());
}
template <class Source>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    count_nonfinite_kernel(const __grid_constant__ InMemory<CountArguments> list) {
  count_nonfinite<Source>(list.arguments, list.view());
}

}  // namespace gradclip::cuda
