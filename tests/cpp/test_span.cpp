// core/span.hpp against the list of all elements' addresses, on small random layouts.
#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <optional>
#include <set>
#include <stdexcept>
#include <vector>

#include "core/span.hpp"
#include "support.hpp"

using namespace gradclip;
using namespace gradclip::test;

namespace {

using Axes = std::vector<StridedLayout::Axis>;

// Addresses are only compared here, never read: any will do.
std::byte arena[4096];
std::byte* const middle = arena + sizeof(arena) / 2;

// The addresses of all elements in the order that docs/reduction-order.md gives them: axes by
// decreasing absolute stride (equal ones as they come), every axis by increasing address.
std::vector<const std::byte*> addresses_of(const std::byte* data, Axes axes) {
  for (auto& [size, stride] : axes) {
    if (stride < 0) data += (size - 1) * stride;
    stride = std::abs(stride);
  }
  std::stable_sort(axes.begin(), axes.end(),
                   [](const auto& a, const auto& b) { return a.stride > b.stride; });
  std::vector<const std::byte*> addresses{data};
  for (const auto& [size, stride] : axes) {
    std::vector<const std::byte*> longer;
    for (const std::byte* address : addresses)
      for (std::int64_t i = 0; i < size; ++i) longer.push_back(address + i * stride);
    addresses = std::move(longer);
  }
  return addresses;
}

// Random shape and strides; half of them nested (the next stride a multiple of what is inside, or a
// little more), as real arrays are.
Axes random_axes(Random& random, std::int64_t itemsize) {
  Axes axes(static_cast<std::size_t>(random.between(0, 4)));
  const bool nested = random.bits() % 2 == 0;
  std::int64_t inside = itemsize;
  for (auto& [size, stride] : axes) {
    size = random.between(1, 4);
    if (nested) {
      stride = inside + itemsize * std::max<std::int64_t>(0, random.between(-2, 1));
      inside = stride * size;
      if (random.bits() % 4 == 0) stride = -stride;
    } else {
      stride = random.between(-8, 8) * std::max<std::int64_t>(2, itemsize / 2);
    }
  }
  random.shuffle(axes);
  return axes;
}

constexpr DType kTypes[] = {DType::float16, DType::float32, DType::float64, DType::complex128};

// A span, what keeps its layout, and the addresses of its elements.
struct Sample {
  Sample(DType dtype, std::byte* data, const Axes& axes) : addresses(addresses_of(data, axes)) {
    OrderedAxes ordered = order_axes(data, static_cast<std::int64_t>(size_of(dtype)), axes);
    layout = std::move(ordered.layout);
    span = {ordered.data, static_cast<std::int64_t>(addresses.size()), nullptr, dtype};
  }
  Span view() const {
    Span result = span;
    result.layout = layout ? &*layout : nullptr;
    return result;
  }
  std::vector<const std::byte*> bytes() const {
    std::vector<const std::byte*> all;
    for (const std::byte* address : addresses)
      for (std::int64_t i = 0; i < span.itemsize(); ++i) all.push_back(address + i);
    std::sort(all.begin(), all.end());
    return all;
  }
  bool overlaps_itself() const {
    const auto all = bytes();
    return std::adjacent_find(all.begin(), all.end()) != all.end();
  }

  std::vector<const std::byte*> addresses;
  std::optional<StridedLayout> layout;
  Span span;
};

Sample random_sample(Random& random, std::byte* data) {
  const DType dtype = kTypes[random.bits() % std::size(kTypes)];
  return Sample(dtype, data, random_axes(random, static_cast<std::int64_t>(size_of(dtype))));
}

std::vector<const std::byte*> walk(const Span& span, std::int64_t first, std::int64_t count) {
  std::vector<const std::byte*> visited;
  for_each_run(span, first, count,
               [&](const std::byte* run, std::int64_t elements, std::int64_t stride) {
                 for (std::int64_t i = 0; i < elements; ++i) visited.push_back(run + i * stride);
               });
  return visited;
}

}  // namespace

TEST_CASE("elements are walked by address, from any element for any number of them") {
  Random random(1);
  for (int trial = 0; trial < 3000; ++trial) {
    const Sample sample = random_sample(random, middle);
    const Span span = sample.view();
    REQUIRE(walk(span, 0, span.numel) == sample.addresses);
    const std::int64_t first = random.between(0, span.numel);
    const std::int64_t count = random.between(0, span.numel - first);
    const auto begin = sample.addresses.begin() + first;
    CHECK(walk(span, first, count) == std::vector(begin, begin + count));
  }
}

TEST_CASE("a span has a layout only where its elements are not dense") {
  Random random(2);
  for (int trial = 0; trial < 3000; ++trial) {
    const Sample sample = random_sample(random, middle);
    const auto& addresses = sample.addresses;
    bool dense = true;
    for (std::size_t i = 1; i < addresses.size(); ++i)
      dense = dense && addresses[i] - addresses[i - 1] == sample.span.itemsize();
    CHECK(sample.layout.has_value() == !dense);
    const auto all = sample.bytes();
    CHECK(sample.view().data == all.front());
    CHECK(sample.view().extent() == all.back() + 1 - all.front());
  }
}

TEST_CASE("contiguous axes are merged, and 64 axes that cannot be are the most") {
  const OrderedAxes merged = order_axes(middle, 4, {{2, 48}, {3, 8}, {2, 24}});
  REQUIRE(merged.layout);
  REQUIRE(merged.layout->axes.size() == 1);
  CHECK(merged.layout->axes[0].size == 12);
  CHECK(merged.layout->axes[0].stride == 8);

  Axes many(StridedLayout::kMaxAxes, {2, 12});
  CHECK(order_axes(middle, 4, many).layout->axes.size() == 64);
  many.push_back({2, 12});
  CHECK_THROWS_AS(order_axes(middle, 4, many), std::length_error);
}

TEST_CASE("overlap within one span") {
  Random random(3);
  int overlapping = 0;
  for (int trial = 0; trial < 5000; ++trial) {
    const Sample sample = random_sample(random, middle);
    const bool expected = sample.overlaps_itself();
    CHECK(overlaps_itself(sample.view()) == expected);
    overlapping += expected;
  }
  CHECK(overlapping > 500);
  CHECK(overlapping < 4500);
}

TEST_CASE("memory shared by two of several spans") {
  Random random(4);
  int sharing = 0;
  for (int trial = 0; trial < 5000; ++trial) {
    std::vector<Sample> samples;
    while (samples.size() < static_cast<std::size_t>(1 + trial % 4)) {
      Sample sample = random_sample(random, middle + random.between(-48, 48) * 2);
      if (!sample.overlaps_itself()) samples.push_back(std::move(sample));
    }
    std::set<std::pair<std::size_t, std::size_t>> expected;
    for (std::size_t b = 1; b < samples.size(); ++b) {
      for (std::size_t a = 0; a < b; ++a) {
        const auto left = samples[a].bytes(), right = samples[b].bytes();
        std::vector<const std::byte*> both;
        std::set_intersection(left.begin(), left.end(), right.begin(), right.end(),
                              std::back_inserter(both));
        if (!both.empty()) expected.insert({a, b});
      }
    }
    std::vector<Span> spans;
    for (const Sample& sample : samples) spans.push_back(sample.view());
    const auto found = find_shared_memory(spans, spans.size());
    REQUIRE(found.has_value() == !expected.empty());
    if (found) CHECK(expected.count({found->first, found->second}) == 1);
    sharing += found.has_value();
  }
  CHECK(sharing > 500);
  CHECK(sharing < 4500);
}

TEST_CASE("empty spans share nothing, interleaved and adjacent ones neither") {
  const auto shared = [](const std::vector<Span>& spans) {
    return find_shared_memory(spans, spans.size());
  };
  const Sample even(DType::float32, arena, {{8, 8}}), odd(DType::float32, arena + 4, {{8, 8}});
  const Span empty{arena, 0, nullptr, DType::float32},
      after{arena + 64, 4, nullptr, DType::float32};
  CHECK_FALSE(shared({even.view(), odd.view(), empty, after, empty}));
  const Span across{arena + 60, 2, nullptr, DType::float32};
  const auto found = shared({after, odd.view(), empty, across});
  REQUIRE(found);
  CHECK(found->second == 3);
}
