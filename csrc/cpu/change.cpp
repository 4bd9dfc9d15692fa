// What writes: scale, zero, value clip. And what is told of gradients that are not finite.
#include <atomic>
#include <cstring>

#include "cpu/elements.hpp"
#include "cpu/engine.hpp"
#include "cpu/isa.hpp"
#include "cpu/tiles.hpp"
#include "cpu/workers.hpp"

namespace gradclip::cpu {

void scale(std::span<const Span> spans, const Plan& plan, std::span<const double> factors) {
  // Backward: the norms went forward, so the end is still in the cache.
  for_each_chunk(plan, Pass::backward, [&](const Chunk& chunk) {
    const double factor = factors[chunk.tensor];
    if (factor == 1.0) return;
    const auto kernel = kernels().of(spans[chunk.tensor].dtype).scale;
    change_each_piece(spans[chunk.tensor], chunk, [&](std::byte* data, std::size_t bytes) {
      kernel(data, bytes, factor);
      return true;
    });
  });
}

void set_to_zero(std::span<const Span> spans, const Plan& plan) {
  for_each_chunk(plan, Pass::forward, [&](const Chunk& chunk) {
    change_each_piece(spans[chunk.tensor], chunk, [](std::byte* data, std::size_t bytes) {
      std::memset(data, 0, bytes);
      return true;
    });
  });
}

ValueClip clip_by_value(std::span<const Span> spans, const Plan& plan, double limit) {
  std::atomic<bool> clipped{false};
  const auto clip_chunk = [&](const Chunk& chunk) {
    const Span& span = spans[chunk.tensor];
    const TypeKernels& type = kernels().of(span.dtype);
    const std::uint64_t top = pattern_below(span.dtype, limit);
    double largest = 0.0;
    change_each_tile(span, chunk, [&](std::byte* tile, std::size_t bytes) {
      const std::uint64_t here = type.largest(tile, bytes);
      largest = larger(value_of_pattern(span.dtype, here), largest);
      if (here <= top || !type.clamp(tile, bytes, top)) return false;
      clipped.store(true, std::memory_order_relaxed);
      return true;
    });
    return largest;
  };
  ValueClip result;
  for (const double m : largest_by_tensor(spans.size(), plan, clip_chunk))
    result.largest.push_back({m, 0, 0.0});
  result.clipped = clipped;
  return result;
}

NonFiniteCounts count_nonfinite(const Span& span) {
  NonFiniteCounts counts;
  const auto count = kernels().of(span.dtype).count_nonfinite;
  const Chunk all{0, span.nbytes(), 0, kWholeTensor};
  for_each_tile(span, all, [&](const std::byte* tile, std::size_t bytes) {
    // A complex element, of two parts, counts once.
    const std::size_t step = is_complex(span.dtype) ? size_of(span.dtype) : bytes;
    for (std::size_t at = 0; at < bytes; at += step) {
      const NonFiniteCounts here = count(tile + at, step);
      counts.nan += is_complex(span.dtype) ? here.nan > 0 : here.nan;
      counts.infinity +=
          is_complex(span.dtype) ? here.nan == 0 && here.infinity > 0 : here.infinity;
    }
  });
  return counts;
}

std::uint32_t probe_read(std::span<const Span> spans, const Plan& plan) {
  std::atomic<std::uint32_t> all{0};
  for_each_chunk(plan, Pass::forward, [&](const Chunk& chunk) {
    all |= kernels().read(spans[chunk.tensor].data + chunk.first_byte,
                          static_cast<std::size_t>(chunk.bytes));
  });
  return all;
}

void probe_read_write(std::span<const Span> spans, const Plan& plan) {
  for_each_chunk(plan, Pass::forward, [&](const Chunk& chunk) {
    kernels().read_write(spans[chunk.tensor].data + chunk.first_byte,
                         static_cast<std::size_t>(chunk.bytes));
  });
}

}  // namespace gradclip::cpu
