#include "core/span.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

#include "core/table.hpp"

namespace gradclip {

std::int64_t StridedLayout::extent(std::int64_t itemsize) const {
  std::int64_t bytes = itemsize;
  for (const Axis& axis : axes) bytes += (axis.size - 1) * axis.stride;
  return bytes;
}

namespace {

// One bit per `grain` bytes of an address range.
class ByteSet {
 public:
  ByteSet(std::int64_t extent, std::int64_t grain)
      : grain_(grain), words_(static_cast<std::size_t>(extent / grain / 64 + 1)) {}

  // False if any of the bytes was there already.
  bool insert(std::int64_t offset, std::int64_t bytes) {
    for (std::int64_t i = offset / grain_; i < (offset + bytes) / grain_; ++i) {
      std::uint64_t& word = words_[static_cast<std::size_t>(i / 64)];
      const std::uint64_t bit = std::uint64_t{1} << (i % 64);
      if (word & bit) return false;
      word |= bit;
    }
    return true;
  }

 private:
  std::int64_t grain_;
  std::vector<std::uint64_t> words_;
};

// The largest grain that every element of `span`, seen from `base`, is a multiple of.
std::int64_t grain_of(const Span& span, const std::byte* base) {
  std::int64_t grain = std::gcd(span.itemsize(), static_cast<std::int64_t>(span.data - base));
  if (span.layout)
    for (const auto& axis : span.layout->axes) grain = std::gcd(grain, axis.stride);
  return grain;
}

// False if an element of `span` is in `seen` already.
bool insert_elements(ByteSet& seen, const Span& span, const std::byte* base) {
  bool fresh = true;
  for_each_run(span, 0, span.numel,
               [&](const std::byte* run, std::int64_t elements, std::int64_t stride) {
                 for (std::int64_t i = 0; fresh && i < elements; ++i)
                   fresh = seen.insert(run + i * stride - base, span.itemsize());
               });
  return fresh;
}

}  // namespace

bool overlaps_itself(const Span& span) {
  if (!span.layout) return false;
  // Axes that nest (each steps over all that is inside it) cannot overlap.
  bool nested = true;
  std::int64_t inside = span.itemsize();
  const auto& axes = span.layout->axes;
  for (auto axis = axes.rbegin(); axis != axes.rend(); ++axis) {
    if (axis->stride == 0) return true;
    nested = nested && axis->stride >= inside;
    inside += (axis->size - 1) * axis->stride;
  }
  if (nested) return false;
  ByteSet seen(inside, grain_of(span, span.data));
  return !insert_elements(seen, span, span.data);
}

OrderedAxes order_axes(std::byte* data, std::int64_t itemsize,
                       std::vector<StridedLayout::Axis> axes) {
  std::erase_if(axes, [](const auto& axis) { return axis.size == 1; });
  for (auto& axis : axes) {
    if (axis.stride < 0) {
      data += (axis.size - 1) * axis.stride;
      axis.stride = -axis.stride;
    }
  }
  std::stable_sort(axes.begin(), axes.end(),
                   [](const auto& a, const auto& b) { return a.stride > b.stride; });
  std::vector<StridedLayout::Axis> merged;
  for (const auto& axis : axes) {
    if (!merged.empty() && merged.back().stride == axis.size * axis.stride)
      merged.back() = {merged.back().size * axis.size, axis.stride};
    else
      merged.push_back(axis);
  }
  const bool dense = merged.empty() || (merged.size() == 1 && merged[0].stride == itemsize);
  if (dense) return {data, std::nullopt};
  if (merged.size() > StridedLayout::kMaxAxes)
    throw std::length_error("expected at most 64 strided axes, got " +
                            std::to_string(merged.size()));
  return {data, StridedLayout{std::move(merged)}};
}

std::optional<SharedMemory> find_shared_memory(std::span<const Span> spans) {
  struct Range {
    const std::byte *begin, *end;
    std::size_t entry;
  };
  Table<Range> ranges;
  ranges.reserve(spans.size());
  bool sorted = true;
  for (std::size_t i = 0; i < spans.size(); ++i) {
    if (spans[i].numel == 0) continue;
    sorted = sorted && (ranges.empty() || ranges.back().begin <= spans[i].data);
    ranges.push_back({spans[i].data, spans[i].data + spans[i].extent(), i});
  }
  if (!sorted)
    std::sort(ranges.begin(), ranges.end(),
              [](const Range& a, const Range& b) { return a.begin < b.begin; });

  // Clusters of ranges that overlap; nearly always of one range each.
  for (std::size_t i = 0; i < ranges.size();) {
    const std::byte* end = ranges[i].end;
    std::size_t next = i + 1;
    while (next < ranges.size() && ranges[next].begin < end) {
      end = std::max(end, ranges[next].end);
      ++next;
    }
    if (next - i > 1) {
      const std::byte* base = ranges[i].begin;
      std::int64_t grain = grain_of(spans[ranges[i].entry], base);
      for (std::size_t k = i + 1; k < next; ++k)
        grain = std::gcd(grain, grain_of(spans[ranges[k].entry], base));
      ByteSet seen(end - base, grain);
      for (std::size_t k = i; k < next; ++k) {
        if (insert_elements(seen, spans[ranges[k].entry], base)) continue;
        // With whom: rare and for the message alone, so found pair by pair.
        for (std::size_t j = i; j < k; ++j) {
          ByteSet pair(end - base, grain);
          insert_elements(pair, spans[ranges[j].entry], base);
          if (insert_elements(pair, spans[ranges[k].entry], base)) continue;
          const std::size_t a = ranges[j].entry, b = ranges[k].entry;
          return SharedMemory{std::min(a, b), std::max(a, b)};
        }
      }
    }
    i = next;
  }
  return std::nullopt;
}

}  // namespace gradclip
