// The machine's own speed, to compare with. A GPU is probed by the benchmark (bench/device.py), with kernels of its own.
#include <atomic>

#include "cpu/engine.hpp"
#include "cpu/isa.hpp"
#include "cpu/workers.hpp"

namespace gradclip::cpu {

std::uint32_t probe_read(std::span<const Span> spans, const ChunkPlan& plan) {
  std::atomic<std::uint32_t> all{0};
  for_each_chunk(plan, Pass::forward, [&](const Chunk& chunk) {
    all |= kernels().read(spans[chunk.tensor].data + chunk.first_byte,
                          static_cast<std::size_t>(chunk.bytes));
  });
  return all;
}

void probe_read_write(std::span<const Span> spans, const ChunkPlan& plan) {
  for_each_chunk(plan, Pass::forward, [&](const Chunk& chunk) {
    kernels().read_write(spans[chunk.tensor].data + chunk.first_byte,
                         static_cast<std::size_t>(chunk.bytes));
  });
}

}  // namespace gradclip::cpu
