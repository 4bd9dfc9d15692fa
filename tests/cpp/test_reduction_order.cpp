// The engine against the model of docs/reduction-order.md: equal bits on every instruction set, at
// every address, for any number of threads and in any rounding mode of the caller.
#include <cfenv>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "core/clip.hpp"
#include "cpu/engine.hpp"
#include "cpu/workers.hpp"
#include "order_model.hpp"
#include "samples.hpp"

using namespace gradclip;
using namespace gradclip::test;

namespace {

constexpr NormOrder kTwo{NormOrder::two, 2.0}, kOne{NormOrder::one, 1.0};

template <class T>
Span span_of(std::vector<T>& values) {
  return {reinterpret_cast<std::byte*>(values.data()), static_cast<std::int64_t>(values.size()),
          nullptr, kDTypeOf<T>};
}

cpu::ChunkPlan plan_of(const std::vector<Span>& spans) {
  std::vector<std::int64_t> bytes;
  for (const Span& span : spans) bytes.push_back(span.nbytes());
  return cpu::make_plan(bytes);
}

Table<NormSum> measure(const std::vector<Span>& spans, const NormOrder& order) {
  return cpu::measure(spans, plan_of(spans), order);
}

WideValue wide(const NormSum& sum) { return {sum.value, sum.exponent}; }

// The same numbers in every type, to the last bit on every machine.
template <class T>
std::vector<T> fixed_input() {
  std::vector<T> values;
  for (std::uint32_t i = 0; i < 40003; ++i) {
    const auto hash = static_cast<std::int32_t>(i * 2654435761u);
    values.push_back(element<T>(static_cast<double>(hash) * 0x1p-29));
  }
  return values;
}

template <class T>
std::string fixed_norm(const NormOrder& order) {
  std::vector<T> values = fixed_input<T>();
  char text[40];
  std::snprintf(text, sizeof(text), "%a", norm_of(order, measure({span_of(values)}, order)[0]));
  return text;
}

}  // namespace

TEST_CASE_TEMPLATE("a tile has the bits of the model, everywhere", T, GRADCLIP_ALL_TYPES) {
  Random random(1);
  for (const Values values : kAllValues) {
    for (const std::size_t size : sizes_in_a_tile<T>()) {
      const std::vector<T> tile = sample<T>(values, size, random);
      const WideValue squares = model_tile<T>(tile, Terms::squares);
      const WideValue magnitudes = model_tile<T>(tile, Terms::magnitudes);
      for (std::size_t offset = 0; offset < 64; offset += kOffsetStep) {
        const Guarded memory(offset, bytes_of(tile));
        for_each_isa([&](const cpu::Kernels& kernels) {
          const cpu::TypeKernels& type = kernels.of(kDTypeOf<T>);
          if (same_number(type.sum_squares(memory.data(), memory.size()), squares) &&
              same_number(type.sum_magnitudes(memory.data(), memory.size()), magnitudes))
            return;
          CAPTURE(static_cast<int>(values));
          CAPTURE(size);
          CAPTURE(offset);
          FAIL_CHECK("not the sum of the model");
        });
      }
    }
  }
}

TEST_CASE_TEMPLATE("a tensor has the bits of the model, for any number of threads", T,
                   GRADCLIP_ALL_TYPES) {
  constexpr std::size_t kTile = order::kTileBytes / sizeof(T);
  Random random(2);
  std::vector<std::vector<T>> tensors;
  for (const std::size_t size : {std::size_t{0}, std::size_t{1}, kTile - 1, kTile, kTile + 1,
                                 4 * kTile, 4 * kTile + 1, 13 * kTile + 7})
    for (const Values values : {Values::ordinary, Values::huge, Values::tiny, Values::any_finite})
      tensors.push_back(sample<T>(values, size, random));
  tensors.push_back(sample<T>(Values::one_nan, 9 * kTile, random));
  tensors.push_back(sample<T>(Values::one_infinity, 9 * kTile, random));

  std::vector<Span> spans;
  for (auto& tensor : tensors) spans.push_back(span_of(tensor));
  for (const auto& [order, terms] :
       {std::pair{kTwo, Terms::squares}, std::pair{kOne, Terms::magnitudes}}) {
    std::vector<WideValue> expected;
    for (const auto& tensor : tensors) expected.push_back(model_sum<T>(tensor, terms));
    const WideValue expected_total = add_in_bins(expected);
    for (const int threads : {1, 2, 3, 8}) {
      cpu::set_num_threads(threads);
      for_each_isa([&](const cpu::Kernels&) {
        const Table<NormSum> sums = measure(spans, order);
        for (std::size_t i = 0; i < sums.size(); ++i) {
          CAPTURE(threads);
          CAPTURE(i);
          CHECK(same_number(wide(sums[i]), expected[i]));
        }
        CHECK(same_number(wide(group_sums(order, sums, {}, 1)[0]), expected_total));
      });
    }
  }
}

TEST_CASE("a strided span has the sum of its elements in their order") {
  Random random(3);
  std::vector<float> memory = sample<float>(Values::ordinary, 300 * 200, random);
  const StridedLayout layout{{{150, 2 * 200 * 4}, {100, 2 * 4}}};
  std::vector<float> elements;
  for (std::size_t row = 0; row < 150; ++row)
    for (std::size_t column = 0; column < 100; ++column)
      elements.push_back(memory[2 * row * 200 + 2 * column]);
  Span span = span_of(memory);
  span.layout = &layout;
  span.numel = 150 * 100;
  CHECK(same_number(wide(measure({span}, kTwo)[0]), model_sum<float>(elements, Terms::squares)));
}

TEST_CASE("complex numbers are pairs of real ones for the 2-norm") {
  Random random(4);
  std::vector<double> parts = sample<double>(Values::ordinary, 5000, random);
  Span span = span_of(parts);
  span.dtype = DType::complex128;
  span.numel = 2500;
  CHECK(same_number(wide(measure({span}, kTwo)[0]), model_sum<double>(parts, Terms::squares)));
}

TEST_CASE("other orders: terms relative to the largest magnitude, 32 at a time") {
  Random random(5);
  for (const std::size_t count : {1u, 31u, 32u, 33u, 40000u}) {
    std::vector<double> parts = sample<double>(Values::ordinary, 2 * count, random);
    std::vector<double> magnitudes;
    for (std::size_t i = 0; i < count; ++i)
      magnitudes.push_back(modulus(parts[2 * i], parts[2 * i + 1]));
    const double largest = *std::max_element(magnitudes.begin(), magnitudes.end());
    for (const double p : {0.5, 3.0}) {
      std::vector<WideValue> runs;
      for (std::size_t first = 0; first < count; first += 32) {
        double run = 0.0;
        for (std::size_t i = first; i < std::min(first + 32, count); ++i)
          run += power(magnitudes[i] / largest, p);
        runs.push_back({run, 0});
      }
      Span span = span_of(parts);
      span.dtype = DType::complex128;
      span.numel = static_cast<std::int64_t>(count);
      const NormSum sum = measure({span}, {NormOrder::other, p})[0];
      CHECK(sum.unit == largest);
      CHECK(sum.value == narrow(add_in_bins(runs)));
    }
  }
}

TEST_CASE_TEMPLATE("the maximum norm is the largest magnitude, and NaN is never lost", T,
                   GRADCLIP_ALL_TYPES) {
  const NormOrder infinity_norm{NormOrder::infinity, INFINITY};
  Random random(6);
  for (const Values values : kAllValues) {
    std::vector<T> tensor = sample<T>(values, 3 * order::kTileBytes / sizeof(T) + 5, random);
    double expected = 0.0;
    for (const T& x : tensor) expected = larger(std::fabs(to_double(x)), expected);
    const double got = measure({span_of(tensor)}, infinity_norm)[0].value;
    CHECK((got == expected || (std::isnan(got) && std::isnan(expected))));
  }
}

TEST_CASE_TEMPLATE("the caller's rounding mode changes nothing and is left alone", T,
                   GRADCLIP_ALL_TYPES) {
  Random random(7);
  std::vector<T> values = sample<T>(Values::any_finite, 50000, random);
  const std::vector<Span> spans{span_of(values)};
  for (const NormOrder& order : {kTwo, kOne, NormOrder{NormOrder::other, 3.0}}) {
    const NormSum expected = measure(spans, order)[0];
    for (const int mode : {FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO}) {
      std::fesetround(mode);
      const NormSum sum = measure(spans, order)[0];
      const int after = std::fegetround();
      std::fesetround(FE_TONEAREST);
      CHECK(after == mode);
      CHECK(same_number(wide(sum), wide(expected)));
    }
  }
}

TEST_CASE("the same bits on every processor") {
  // Written down once: what any machine must find. Another compiler, architecture or rewrite that
  // changes the order, or fuses a multiplication and an addition, is seen here.
  CHECK(fixed_norm<Float16>(kTwo) == "0x1.cde5bc9c3d817p+8");
  CHECK(fixed_norm<BFloat16>(kTwo) == "0x1.cde5e9fdff5cfp+8");
  CHECK(fixed_norm<float>(kTwo) == "0x1.cde5ba1c3a5cep+8");
  CHECK(fixed_norm<double>(kTwo) == "0x1.cde5ba1a54304p+8");
  CHECK(fixed_norm<Float16>(kOne) == "0x1.388550324p+16");
  CHECK(fixed_norm<BFloat16>(kOne) == "0x1.388542086p+16");
  CHECK(fixed_norm<float>(kOne) == "0x1.38854ea384p+16");
  CHECK(fixed_norm<double>(kOne) == "0x1.38854ec59ae8p+16");
  CHECK(fixed_norm<double>({NormOrder::other, 3.0}) == "0x1.58b7f7aa1c5fcp+6");
}
