// A gradient as the kernels see it: memory, size, type, and strides where it is not dense.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "core/dtype.hpp"

namespace gradclip {

// Axes from the outermost to the innermost in memory; all strides are positive or 0, in bytes (of the second of
// a pair, of either sign).
struct StridedLayout {
  struct Axis {
    std::int64_t size, stride;
    bool operator==(const Axis&) const = default;
  };
  static constexpr std::size_t kMaxAxes = 64;  // as NumPy and torch have
  std::vector<Axis> axes;

  // Bytes from the first byte of the first element to the last byte of the last one.
  std::int64_t extent(std::int64_t itemsize) const;
};

struct Span {
  std::byte* data = nullptr;  // the lowest address
  std::int64_t numel = 0;
  const StridedLayout* layout = nullptr;  // null where the elements are dense
  DType dtype = DType::float32;

  std::int64_t itemsize() const { return static_cast<std::int64_t>(size_of(dtype)); }
  std::int64_t nbytes() const { return numel * itemsize(); }
  std::int64_t extent() const { return layout ? layout->extent(itemsize()) : nbytes(); }
};

// Order the axes as they lie in memory: drop axes of one element, flip negative strides (moving
// `data` to the lowest address), sort by decreasing stride, merge what is contiguous. The result has
// a layout only if the elements are not dense. No axis may be empty. Throws std::length_error beyond
// kMaxAxes.
struct OrderedAxes {
  std::byte* data;
  std::optional<StridedLayout> layout;
};
OrderedAxes order_axes(std::byte* data, std::int64_t itemsize,
                       std::vector<StridedLayout::Axis> axes);

// The same of two arrays of one shape, in the order in which the first lies in memory. Strides of the second one
// can be negative then.
struct StridedArray {
  std::byte* data;  // of the first element
  std::int64_t itemsize;
  std::vector<StridedLayout::Axis> axes;
};
struct OrderedPair {
  OrderedAxes first, second;
};
OrderedPair order_pair(const StridedArray& first, const StridedArray& second);

// Call run(address, elements, stride) for elements [first, first + count), in order, one innermost
// axis at a time.
template <class Run>
void for_each_run(const Span& span, std::int64_t first, std::int64_t count, Run run) {
  const std::int64_t itemsize = span.itemsize();
  if (!span.layout) {
    run(span.data + first * itemsize, count, itemsize);
    return;
  }
  const auto& axes = span.layout->axes;
  const std::size_t inner = axes.size() - 1;
  std::int64_t index[StridedLayout::kMaxAxes];
  std::int64_t offset = 0;
  for (std::size_t a = axes.size(); a-- > 0;) {
    index[a] = first % axes[a].size;
    first /= axes[a].size;
    offset += index[a] * axes[a].stride;
  }
  while (count > 0) {
    const std::int64_t left = axes[inner].size - index[inner];
    const std::int64_t elements = left < count ? left : count;
    run(span.data + offset, elements, axes[inner].stride);
    count -= elements;
    index[inner] += elements;
    offset += elements * axes[inner].stride;
    for (std::size_t a = inner; a > 0 && index[a] == axes[a].size; --a) {
      offset += axes[a - 1].stride - axes[a].size * axes[a].stride;
      index[a] = 0;
      ++index[a - 1];
    }
  }
}

// Whether two elements of one entry share memory. Exact.
bool overlaps_itself(const Span& span);

// A pair of entries that share memory, if any: `first < second`. Exact, also for interleaved
// views, whose address ranges overlap but whose elements do not. No entry may overlap itself; but those from
// `read_only` on, which may, and one another.
struct SharedMemory {
  std::size_t first, second;
};
std::optional<SharedMemory> find_shared_memory(std::span<const Span> spans, std::size_t read_only);

}  // namespace gradclip
