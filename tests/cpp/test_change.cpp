// What the engine writes, through dense and strided spans: the elements, and not a byte between them.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/engine.hpp"
#include "cpu/workers.hpp"
#include "samples.hpp"

using namespace gradclip;
using namespace gradclip::test;

namespace {

// Large enough for several chunks and several threads.
constexpr std::int64_t kRows = 700, kColumns = 300;

// A matrix, and a view of every second column of every third row of it.
struct Matrix {
  explicit Matrix(Values values) {
    Random random(1);
    memory = sample<float>(values, kRows * kColumns, random);
  }
  Span all() {
    return {reinterpret_cast<std::byte*>(memory.data()), kRows * kColumns, nullptr, DType::float32};
  }
  Span view() {
    return {reinterpret_cast<std::byte*>(memory.data()), (kRows + 2) / 3 * (kColumns / 2), &layout,
            DType::float32};
  }

  std::vector<float> memory;
  StridedLayout layout{{{(kRows + 2) / 3, 3 * kColumns * 4}, {kColumns / 2, 2 * 4}}};
};

template <class Change>
std::vector<float> changed(const std::vector<float>& memory, bool strided, Change change) {
  std::vector<float> result = memory;
  for (std::size_t i = 0; i < result.size(); ++i)
    if (!strided || (i / kColumns % 3 == 0 && i % kColumns % 2 == 0)) change(result[i]);
  return result;
}

// Compare patterns: NaN must stay what it was.
bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return std::ranges::equal(bytes_of(a), bytes_of(b));
}

template <class Test>
void with_each_span(Values values, Test test) {
  for (const int threads : {1, 3}) {
    cpu::set_num_threads(threads);
    for (const bool strided : {false, true}) {
      CAPTURE(threads);
      CAPTURE(strided);
      Matrix matrix(values);
      const std::vector<Span> spans{strided ? matrix.view() : matrix.all()};
      test(matrix, strided, spans, cpu::make_plan(std::vector{spans[0].nbytes()}));
    }
  }
}

}  // namespace

TEST_CASE("scale") {
  with_each_span(Values::any_pattern, [](Matrix& matrix, bool strided, const auto& spans,
                                         const cpu::ChunkPlan& plan) {
    const auto before = matrix.memory;
    cpu::scale(spans, plan, std::vector{1.0});
    CHECK(same_bits(matrix.memory, before));
    cpu::scale(spans, plan, std::vector{0.3});
    CHECK(same_bits(matrix.memory, changed(before, strided, [](float& x) { x *= 0.3f; })));
  });
}

TEST_CASE("accumulate") {
  with_each_span(Values::any_finite, [](Matrix& matrix, bool strided, const auto& spans,
                                        const cpu::ChunkPlan& plan) {
    const Span& x = spans[0];
    Random random(2);
    std::vector<BFloat16> added =
        sample<BFloat16>(Values::ordinary, static_cast<std::size_t>(x.numel), random);
    const PairFormula formula{0.3};
    PairTable pairs{formula, {}, {0}, {}};
    pairs.add(
        {{x.data, 1, 0, x.numel, x.layout, x.dtype},
         {reinterpret_cast<std::byte*>(added.data()), 1, 0, x.numel, nullptr, DType::bfloat16},
         formula,
         DType::float64});
    auto next = added.begin();
    const auto sum = changed(matrix.memory, strided, [&](float& element) {
      element = static_cast<float>(static_cast<double>(element) + 0.3 * to_double(*next++));
    });
    const Table<NormSum> measured = cpu::accumulate(spans, pairs, plan);
    CHECK(same_bits(matrix.memory, sum));
    const Table<NormSum> again = cpu::measure(spans, plan, NormOrder{});
    CHECK(measured[0].value == again[0].value);
    CHECK(measured[0].exponent == again[0].exponent);
    // Without a second array it is measured as it is.
    PairTable nothing{formula, {}, {0}, {}};
    nothing.add({{nullptr, 1, 0, 0, nullptr, x.dtype},
                 {nullptr, 1, 0, 0, nullptr, x.dtype},
                 formula,
                 DType::float64});
    CHECK(cpu::accumulate(spans, nothing, plan)[0].value == again[0].value);
    CHECK(same_bits(matrix.memory, sum));
  });
}

TEST_CASE("set to zero") {
  with_each_span(Values::any_pattern, [](Matrix& matrix, bool strided, const auto& spans,
                                         const cpu::ChunkPlan& plan) {
    const auto before = matrix.memory;
    cpu::set_to_zero(spans, plan);
    CHECK(same_bits(matrix.memory, changed(before, strided, [](float& x) { x = 0.0f; })));
  });
}

TEST_CASE("clip by value") {
  with_each_span(Values::ordinary,
                 [](Matrix& matrix, bool strided, const auto& spans, const cpu::ChunkPlan& plan) {
                   const auto before = matrix.memory;
                   float largest = 0.0f;
                   const auto clamped = changed(before, strided, [&](float& x) {
                     largest = std::max(largest, std::fabs(x));
                     x = std::clamp(x, -20.0f, 20.0f);
                   });
                   const cpu::ValueClip nothing = cpu::measure_values(spans, plan, {largest});
                   CHECK_FALSE(nothing.clipped);
                   cpu::clip_by_value(spans, plan, {largest}, nothing.tiles);
                   CHECK(same_bits(matrix.memory, before));
                   const cpu::ValueClip result = cpu::measure_values(spans, plan, {20.0});
                   CHECK(result.clipped);
                   cpu::clip_by_value(spans, plan, {20.0}, result.tiles);
                   CHECK(result.largest[0].value == largest);
                   CHECK(same_bits(matrix.memory, clamped));
                 });
}

TEST_CASE("count of what is not finite; a complex element counts once, as NaN if it has any") {
  with_each_span(Values::any_pattern,
                 [](Matrix& matrix, bool strided, const auto& spans, const cpu::ChunkPlan&) {
                   std::int64_t nan = 0, infinity = 0;
                   changed(matrix.memory, strided, [&](float& x) {
                     nan += std::isnan(x);
                     infinity += std::isinf(x);
                   });
                   const cpu::NonFiniteCounts counts = cpu::count_nonfinite(spans[0]);
                   CHECK(counts.nan == nan);
                   CHECK(counts.infinity == infinity);
                 });
  std::vector<float> parts{1.0f, NAN, INFINITY, NAN, -INFINITY, 2.0f, 3.0f, INFINITY, 0.0f, 0.0f};
  const Span span{reinterpret_cast<std::byte*>(parts.data()), 5, nullptr, DType::complex64};
  const cpu::NonFiniteCounts counts = cpu::count_nonfinite(span);
  CHECK(counts.nan == 2);
  CHECK(counts.infinity == 2);
}
