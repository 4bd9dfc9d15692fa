#include "core/span.hpp"

#include <algorithm>
#include <array>
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

  // Whether none of the bytes is there; `stays`: they are afterwards.
  bool is_fresh(std::int64_t offset, std::int64_t bytes, bool stays) {
    for (std::int64_t i = offset / grain_; i < (offset + bytes) / grain_; ++i) {
      std::uint64_t& word = words_[static_cast<std::size_t>(i / 64)];
      const std::uint64_t bit = std::uint64_t{1} << (i % 64);
      if (word & bit) return false;
      if (stays) word |= bit;
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
bool are_fresh(ByteSet& seen, const Span& span, const std::byte* base, bool stay = true) {
  bool fresh = true;
  for_each_run(span, 0, span.numel,
               [&](const std::byte* run, std::int64_t elements, std::int64_t stride) {
                 for (std::int64_t i = 0; fresh && i < elements; ++i)
                   fresh = seen.is_fresh(run + i * stride - base, span.itemsize(), stay);
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
  return !are_fresh(seen, span, span.data);
}

namespace {

// The axes of N arrays of one shape, in the order of the first of them; data of each moves to where it begins.
template <std::size_t N>
std::array<OrderedAxes, N> order_all(std::array<std::byte*, N> data,
                                     std::array<std::int64_t, N> itemsize,
                                     std::array<std::vector<StridedLayout::Axis>, N> axes) {
  struct Axis {
    std::int64_t size;
    std::array<std::int64_t, N> strides;
  };
  std::vector<Axis> all;
  for (std::size_t a = 0; a < axes[0].size(); ++a) {
    Axis axis{axes[0][a].size, {}};
    if (axis.size == 1) continue;
    for (std::size_t n = 0; n < N; ++n) axis.strides[n] = axes[n][a].stride;
    if (axis.strides[0] < 0) {
      for (std::size_t n = 0; n < N; ++n) {
        data[n] += (axis.size - 1) * axis.strides[n];
        axis.strides[n] = -axis.strides[n];
      }
    }
    all.push_back(axis);
  }
  std::stable_sort(all.begin(), all.end(),
                   [](const Axis& a, const Axis& b) { return a.strides[0] > b.strides[0]; });
  std::vector<Axis> merged;
  for (const Axis& axis : all) {
    bool joins = !merged.empty();
    for (std::size_t n = 0; joins && n < N; ++n)
      joins = merged.back().strides[n] == axis.size * axis.strides[n];
    if (joins)
      merged.back() = {merged.back().size * axis.size, axis.strides};
    else
      merged.push_back(axis);
  }
  std::array<OrderedAxes, N> ordered;
  for (std::size_t n = 0; n < N; ++n) {
    ordered[n].data = data[n];
    if (merged.empty() || (merged.size() == 1 && merged[0].strides[n] == itemsize[n])) continue;
    if (merged.size() > StridedLayout::kMaxAxes)
      throw std::length_error("expected at most 64 strided axes, got " +
                              std::to_string(merged.size()));
    StridedLayout& layout = ordered[n].layout.emplace();
    for (const Axis& axis : merged) layout.axes.push_back({axis.size, axis.strides[n]});
  }
  return ordered;
}

}  // namespace

OrderedAxes order_axes(std::byte* data, std::int64_t itemsize,
                       std::vector<StridedLayout::Axis> axes) {
  return std::move(order_all<1>({data}, {itemsize}, {std::move(axes)})[0]);
}

OrderedPair order_pair(const StridedArray& first, const StridedArray& second) {
  auto [x, y] = order_all<2>({first.data, second.data}, {first.itemsize, second.itemsize},
                             {first.axes, second.axes});
  return {std::move(x), std::move(y)};
}

std::optional<SharedMemory> find_shared_memory(std::span<const Span> spans, std::size_t read_only) {
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
      // What is written first.
      const auto first = ranges.begin() + static_cast<std::ptrdiff_t>(i);
      std::stable_partition(first, ranges.begin() + static_cast<std::ptrdiff_t>(next),
                            [&](const Range& range) { return range.entry < read_only; });
      ByteSet seen(end - base, grain);
      for (std::size_t k = i; k < next; ++k) {
        const Span& span = spans[ranges[k].entry];
        if (are_fresh(seen, span, base, ranges[k].entry < read_only)) continue;
        // With whom: rare and for the message alone, so found pair by pair.
        for (std::size_t j = i; j < k; ++j) {
          ByteSet pair(end - base, grain);
          are_fresh(pair, spans[ranges[j].entry], base);
          if (are_fresh(pair, span, base, false)) continue;
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
