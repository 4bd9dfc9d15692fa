// Sums as words, decisions from them and factors of parts, as JAX's handlers ask for them, on emulated kernels: the same
// bits as the CPU engine and core/.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <list>
#include <vector>

#include "core/clip.hpp"
#include "core/sum_words.hpp"
#include "cpu/engine.hpp"
#include "cuda/engine.hpp"
#include "device_lists.hpp"

namespace gradclip {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
const double kNaN = std::nan("");
const NormOrder kOrders[] = {{NormOrder::two, 2.0},
                             {NormOrder::one, 1.0},
                             {NormOrder::infinity, kInfinity},
                             {NormOrder::other, 3.0},
                             {NormOrder::other, 0.5}};

// A list whose gradients have so many rows each, or columns.
RowTable rows_of(const std::vector<Span>& spans, std::int64_t count, bool are_columns) {
  RowTable table;
  for (const Span& span : spans) {
    const std::int64_t numel = span.numel / count, itemsize = span.itemsize();
    const StridedLayout* layout = nullptr;
    if (are_columns && numel > 1) {
      table.layouts.push_back({{{numel, count * itemsize}}});
      layout = &table.layouts.back();
    }
    const std::int64_t stride = are_columns ? itemsize : numel * itemsize;
    table.add({span.data, count, stride, numel, layout, span.dtype});
  }
  return table;
}

using WordsOfSums = std::vector<std::uint32_t>;

WordsOfSums words_of(const Table<NormSum>& sums) {
  WordsOfSums words(sums.size() * kSumWords);
  for (std::size_t i = 0; i < sums.size(); ++i) store_sum(sums[i], &words[i * kSumWords]);
  return words;
}
// Every NaN as the same one, and numbers as they are rounded: the CPU leaves the sum of a single tile as it is.
WordsOfSums comparable(WordsOfSums words) {
  for (std::size_t i = 0; i < words.size(); i += kSumWords) {
    NormSum sum = load_sum(&words[i]);
    ExactSum exact;
    exact.add(sum.value, sum.exponent);
    const WideValue rounded = exact.rounded();
    sum = {rounded.value, rounded.exponent, is_nan(sum.unit) ? quiet_nan() : sum.unit};
    store_sum(sum, &words[i]);
  }
  return words;
}

WordsOfSums measured(const std::vector<Span>& spans, const RowTable* rows, const NormOrder& order) {
  WordsOfSums words((rows ? rows->count() : spans.size()) * kSumWords, 0xcdcdcdcdu);
  cuda::List(spans, {}, rows, 0, nullptr).measure_sums(order, words.data(), nullptr);
  return words;
}
void compare_sums(const List& list, std::int64_t count) {
  const std::vector<Span> spans = spans_of(list);
  for (const NormOrder& order : kOrders) {
    CAPTURE(order.p);
    CHECK(comparable(measured(spans, nullptr, order)) ==
          comparable(words_of(cpu::measure(spans, plan_of(spans), order))));
    for (const bool are_columns : {false, true}) {
      CAPTURE(are_columns);
      const RowTable rows = rows_of(spans, count, are_columns);
      CHECK(comparable(measured(spans, &rows, order)) ==
            comparable(words_of(cpu::measure_rows(rows, cpu::make_plan(rows), order))));
    }
  }
}

List mixed_list(double scale) {
  List list;
  for (const DType dtype : kTypes)
    for (const std::int64_t numel : {0, 6, 6 * 33, 6 * 1400}) {
      list.emplace_back(dtype, numel, list.size() % 2);
      list.back().fill(static_cast<unsigned>(list.size()), scale);
    }
  return list;
}

}  // namespace

TEST_CASE("sums of tensors, rows and columns are the words of the CPU's") {
  for (const Settings& settings : {kSettings[0], kSettings[3]}) {
    set(settings);
    compare_sums(mixed_list(1.0), 6);
  }
  set(kSettings[2]);
  for (const double scale : {0.0, 1e-310, 1e300}) compare_sums(mixed_list(scale), 3);
  compare_sums({}, 1);
}

TEST_CASE("NaN and infinity are in the sum of their row alone") {
  set(kSettings[1]);
  List list = mixed_list(1.0);
  for (const Tensor& tensor : list) {
    if (tensor.span.numel == 0) continue;
    tensor.set(0, kInfinity);
    tensor.set(tensor.span.numel - 1, kNaN);
  }
  compare_sums(list, 6);
}

TEST_CASE("a list in an argument, in memory, and how many launches and copies") {
  set(kSettings[2]);
  List list;
  for (int i = 0; i < 1200; ++i) {
    list.emplace_back(kTypes[i % 4], 1 + i % 70);
    list.back().fill(static_cast<unsigned>(i), 1.0);
  }
  const std::vector<Span> spans = spans_of(list);
  for (const std::size_t count : {std::size_t{90}, std::size_t{900}, list.size()}) {
    const std::vector<Span> some(spans.begin(), spans.begin() + static_cast<std::ptrdiff_t>(count));
    measured(some, nullptr, {});  // makes the workspace
    const simt::Counters before = simt::counters();
    CHECK(comparable(measured(some, nullptr, {})) ==
          comparable(words_of(cpu::measure(some, plan_of(some), {}))));
    CHECK(simt::counters().launches == before.launches + 1);
    CHECK(simt::counters().copies == before.copies + (count > 960));
    CHECK(simt::counters().allocations == before.allocations);
    CHECK(simt::counters().waits == before.waits);
  }
}

// Sums of every kind: of numbers, of nothing, infinite and NaN.
Table<NormSum> any_sums(const NormOrder& order, std::size_t count, unsigned seed, bool are_finite) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  Table<NormSum> sums(count);
  for (std::size_t i = 0; i < count; ++i) {
    const double x = std::fabs(normal(random));
    if (i % 7 == 6) continue;
    sums[i] = order.kind == NormOrder::other      ? NormSum{1.0 + x, 0, std::exp(3 * x)}
              : order.kind == NormOrder::infinity ? NormSum{x, 0, 0.0}
                                                  : NormSum{1.0 + x / 8, int(i % 11) * 9 - 40, 0.0};
    if (are_finite || i % 5 != 4) continue;
    const double odd = i % 2 ? kInfinity : kNaN;
    (order.kind == NormOrder::other ? sums[i].unit : sums[i].value) = odd;
  }
  return sums;
}

TEST_CASE("sums of shards are added up as on the CPU") {
  set(kSettings[2]);
  for (const NormOrder& order : kOrders)
    for (const std::size_t shards : {1, 3, 40})
      for (const std::size_t parts : {1, 90})
        for (const bool are_finite : {true, false}) {
          // Once more than there are blocks for.
          const bool is_long = order.kind == NormOrder::two && shards == 3 && parts == 90;
          const std::size_t count = is_long ? 50 : 2;
          const Table<NormSum> sums = any_sums(order, count * shards * parts, 5, are_finite);
          WordsOfSums combined(count * parts * kSumWords, 0xcdcdcdcdu), expected;
          cuda::combine_sums(order, words_of(sums).data(), count, shards, parts, combined.data(),
                             nullptr);
          std::vector<std::size_t> part(shards * parts);
          for (std::size_t i = 0; i < part.size(); ++i) part[i] = i % parts;
          for (std::size_t c = 0; c < count; ++c) {
            const auto here = std::span(sums).subspan(c * part.size(), part.size());
            const WordsOfSums words = words_of(group_sums(order, here, part, parts));
            expected.insert(expected.end(), words.begin(), words.end());
          }
          CHECK(comparable(combined) == comparable(expected));
        }
}

namespace {

struct Case {
  NormOrder order{};
  Groups groups{};
  std::vector<std::size_t> parts;  // of every tensor
  ClipOptions options{};
  std::vector<double> limits;  // of every group, or one
  std::size_t count = 1;
  bool are_finite = true;
};

RowTable rows_without_memory(const std::vector<std::size_t>& parts) {
  RowTable rows;
  for (const std::size_t count : parts)
    rows.add({nullptr, static_cast<std::int64_t>(count), 0, 0, nullptr, DType::float32});
  return rows;
}

// What comes out, by float64s or float32s.
template <class Float>
struct Out {
  std::vector<double> factors;
  std::vector<Float> total_norm, norms, group_norms, coefficients;
  std::vector<char> clipped, nonfinite;

  Out(std::size_t count, std::size_t parts, std::size_t tensors, std::size_t groups)
      : factors(count * parts),
        total_norm(count),
        norms(count * tensors),
        group_norms(count * groups),
        coefficients(count * groups),
        clipped(count),
        nonfinite(count * tensors) {}
};
template <class Float>
bool same(const std::vector<Float>& a, const std::vector<Float>& b) {
  bool all = a.size() == b.size();
  for (std::size_t i = 0; i < a.size(); ++i) all = all && bits(a[i]) == bits(b[i]);
  return all;
}

template <class Float>
Out<Float> decided(const Case& c, const WordsOfSums& words, const std::vector<Float>& limits,
                   const std::vector<Float>& scales) {
  const RowTable rows = rows_without_memory(c.parts);
  const bool are_whole = rows.count() == c.parts.size();
  const std::size_t tensors = c.parts.size(), groups = c.groups.count(tensors);
  Out<Float> out(c.count, rows.count(), tensors, groups);
  const auto floats = [](const std::vector<Float>& values) -> cuda::Floats {
    return {const_cast<Float*>(values.data()), sizeof(Float) == 4};
  };
  const cuda::SumDecisions decisions{c.count,
                                     c.order,
                                     c.options,
                                     words.data(),
                                     floats(limits),
                                     limits.size() != c.count,
                                     floats(scales),
                                     out.factors.data(),
                                     floats(out.total_norm),
                                     floats(out.norms),
                                     floats(out.group_norms),
                                     floats(out.coefficients),
                                     reinterpret_cast<bool*>(out.clipped.data()),
                                     reinterpret_cast<bool*>(out.nonfinite.data())};
  const std::vector<Span> spans(tensors);
  cuda::List(spans, c.groups, are_whole ? nullptr : &rows, 0, nullptr)
      .decide_sums(decisions, nullptr);
  return out;
}

template <class Float>
void compare_decisions(const Case& c) {
  const RowTable rows = rows_without_memory(c.parts);
  const std::size_t tensors = c.parts.size(), parts = rows.count();
  const std::size_t groups = c.groups.count(tensors);
  const Table<NormSum> sums = any_sums(c.order, c.count * parts, 3, c.are_finite);
  std::vector<Float> limits, scales;
  Out<Float> expected(c.count, parts, tensors, groups);
  for (std::size_t d = 0; d < c.count; ++d) {
    Table<double> limit;
    for (const double x : c.limits) {
      limits.push_back(static_cast<Float>(x * double(1 + d)));
      limit.push_back(limits.back());
    }
    ClipOptions options = c.options;
    scales.push_back(static_cast<Float>(options.grad_scale * double(1 + d % 3)));
    options.grad_scale = scales.back();
    Table<NormSum> here(sums.begin() + std::ptrdiff_t(d * parts),
                        sums.begin() + std::ptrdiff_t((d + 1) * parts));
    const PartsDecision one =
        decide_parts(c.order, std::move(here), rows.first, c.groups, limit, options);
    for (std::size_t p = 0; p < parts; ++p) expected.factors[d * parts + p] = one.factors[p];
    expected.total_norm[d] = static_cast<Float>(one.norms.total);
    for (std::size_t i = 0; i < tensors; ++i)
      expected.norms[d * tensors + i] = static_cast<Float>(one.norms.tensors[i]);
    for (const std::size_t i : one.norms.odd) expected.nonfinite[d * tensors + i] = 1;
    for (std::size_t g = 0; g < groups; ++g) {
      expected.group_norms[d * groups + g] = static_cast<Float>(one.norms.groups[g]);
      expected.coefficients[d * groups + g] = static_cast<Float>(one.clip.coefficients[g]);
    }
    expected.clipped[d] = one.clip.clipped;
  }
  const Out<Float> out = decided(c, words_of(sums), limits, scales);
  CHECK(same(out.factors, expected.factors));
  CHECK(same(out.total_norm, expected.total_norm));
  CHECK(same(out.norms, expected.norms));
  CHECK(same(out.group_norms, expected.group_norms));
  CHECK(same(out.coefficients, expected.coefficients));
  CHECK(out.clipped == expected.clipped);
  CHECK(out.nonfinite == expected.nonfinite);
}

}  // namespace

TEST_CASE("decisions from sums: every grouping, order and policy, with numbers of both widths") {
  set(kSettings[2]);
  const std::vector<std::size_t> whole(300, 1), rows = {4, 1, 0, 40, 300}, samples(9, 35);
  Groups labels{Groups::labels, {}, 5}, few_labels{Groups::labels, {2, 0, 1, 0, 2}, 3};
  for (std::size_t i = 0; i < whole.size(); ++i) labels.label.push_back(i * 7 % 5);
  const std::pair<Groups, std::vector<std::size_t>> kinds[] = {{Groups{}, whole},
                                                               {Groups{Groups::tensor}, whole},
                                                               {labels, whole},
                                                               {Groups{}, rows},
                                                               {Groups{Groups::tensor}, rows},
                                                               {few_labels, rows},
                                                               {{Groups::row, {}, 345}, rows},
                                                               {{Groups::row, {}, 300}, whole},
                                                               {{Groups::sample, {}, 1}, whole},
                                                               {{Groups::sample, {}, 35}, samples}};
  for (const auto& [groups, parts] : kinds)
    for (const NormOrder& order : kOrders)
      for (const auto policy : {NonFinite::skip, NonFinite::zero, NonFinite::propagate})
        for (const bool are_finite : {true, false}) {
          if (are_finite && policy != NonFinite::skip) continue;  // they are alike
          CAPTURE(groups.kind);
          CAPTURE(order.p);
          Case c;
          c.order = order;
          c.groups = groups;
          c.parts = parts;
          c.count = 2;
          c.are_finite = are_finite;
          c.options.nonfinite = policy;
          c.options.grad_scale = 4.0;
          for (const double limit : {1.5, 1e200, 0.0, kInfinity}) {
            c.limits = {limit};
            compare_decisions<double>(c);
          }
          c.limits.assign(groups.count(parts.size()), 2.5);
          c.limits[0] = 1e30;
          compare_decisions<float>(c);
          c.options.norm_error = norm_error_bound(order, false);
          compare_decisions<double>(c);
          c.options.norm_error = 0.0;
          c.options.are_coefficients = true;
          c.limits[0] = 1.0;
          compare_decisions<float>(c);
        }
}

TEST_CASE("more decisions than blocks, by one launch without a copy; none") {
  set(kSettings[1]);
  Case c;
  c.parts = {1, 1, 1};
  c.limits = {2.0};
  c.count = 600;
  c.options.nonfinite = NonFinite::propagate;
  for (int i = 0; i < 2; ++i) compare_decisions<float>(c);  // each of two workspaces in both roles
  const simt::Counters before = simt::counters();
  compare_decisions<float>(c);
  CHECK(simt::counters().launches == before.launches + 1);
  CHECK(simt::counters().copies == before.copies);
  CHECK(simt::counters().allocations == before.allocations);
  CHECK(simt::counters().waits == before.waits);
  c.count = 0;
  compare_decisions<float>(c);
}

TEST_CASE("limits and scales that cannot be used make NaN") {
  set(kSettings[0]);
  Case c;
  c.groups.kind = Groups::tensor;
  c.parts = {1, 1};
  c.options.nonfinite = NonFinite::propagate;
  const WordsOfSums words = words_of({{1.0, 4, 0.0}, {1.0, 0, 0.0}});  // norms 4 and 1
  for (const double bad : {-1.0, kNaN}) {
    const Out<double> out = decided<double>(c, words, {bad, 0.5}, {1.0});
    CHECK(is_nan(out.coefficients[0]));
    CHECK(is_nan(out.factors[0]));
    CHECK(out.factors[1] == 0.5);
    CHECK(out.group_norms[0] == 4.0);
  }
  for (const double bad : {-1.0, 0.0, kInfinity, kNaN}) {
    const Out<double> out = decided<double>(c, words, {1.0, 1.0}, {bad});
    CHECK(is_nan(out.total_norm[0]));
    CHECK(is_nan(out.factors[1]));
    CHECK(out.clipped[0] == 1);
  }
}

TEST_CASE("a threshold that is a norm as float32 has reported it is that norm") {
  set(kSettings[0]);
  Case c;
  c.parts = {1};
  const WordsOfSums words = words_of({{2.0, 0, 0.0}});
  const auto reported = static_cast<float>(std::sqrt(2.0));  // which is less
  CHECK(decided<float>(c, words, {reported}, {1.0f}).factors[0] < 1.0);
  c.options.as_reported = true;
  CHECK(decided<float>(c, words, {reported}, {1.0f}).factors[0] == 1.0);
}

TEST_CASE("parts are multiplied by their factors: 1 writes nothing, kSetToZero zeros") {
  set(kSettings[2]);
  const double some[] = {0.3, 1.0, kSetToZero, 1.0 / 3.0, 0.0, 1e-300, 1.0};
  for (const bool down : {false, true})
    for (const int kind : {0, 1, 2}) {  // whole, rows, columns
      CAPTURE(down);
      CAPTURE(kind);
      List list = mixed_list(1.0);
      for (const Tensor& tensor : list)
        if (tensor.span.numel > 7) tensor.set(7, kNaN);
      const auto before = bytes_of(list);
      const std::vector<Span> spans = spans_of(list);
      const RowTable rows = rows_of(spans, kind == 0 ? 1 : 6, kind == 2);
      std::vector<double> factors(rows.count());
      Table<double> products;
      std::vector<Span> zeros;
      for (std::size_t p = 0; p < factors.size(); ++p) {
        factors[p] = some[p % 7];
        products.push_back(sets_to_zero(factors[p]) ? 1.0 : factors[p]);
        const std::size_t i = p / (kind == 0 ? 1 : 6);
        if (sets_to_zero(factors[p]))
          zeros.push_back(rows.gradients[i][static_cast<std::int64_t>(p - rows.first[i])]);
      }
      cpu::set_to_zero(zeros, plan_of(zeros));
      if (kind == 0)
        cpu::scale(spans, plan_of(spans), products, down);
      else
        cpu::scale_rows(rows, cpu::make_plan(rows), products, 1.0, down);
      const auto after = bytes_of(list);
      restore(list, before);
      const simt::Counters counters = simt::counters();
      cuda::List(spans, {}, kind == 0 ? nullptr : &rows, 0, nullptr)
          .scale_by(factors.data(), down, nullptr);
      CHECK(simt::counters().launches == counters.launches + 1);
      CHECK(bytes_of(list) == after);
    }
}

}  // namespace gradclip
