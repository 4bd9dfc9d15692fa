// The device's own speed, to compare with. The twin of cpu/probe.cpp.
#pragma once

#include "cuda/tile.cuh"
#include "cuda/walk.cuh"

namespace gradclip::cuda {

// visit(vector, words) over the whole rows of every tensor.
template <int kVectors, class Visit>
__device__ __forceinline__ void probe(const TableView& table, const TensorEntry* entries,
                                      Visit visit) {
  walk(table, entries, [&](std::uint32_t, const TensorEntry& entry, const TileRange& tiles) {
    constexpr auto kStep = static_cast<std::int64_t>(kVectors * order::kRowBytes);
    const std::int64_t end = tiles.end_byte(entry.bytes);
    for (std::int64_t at = tiles.first_byte(); at + kStep <= end; at += kStep)
      visit(reinterpret_cast<uint4*>(entry.data + at) + lane_id());
  });
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
