// The kernels, run on the CPU (simt/), against the CPU engine: the same bits for every dtype, size,
// alignment, layout, list, group, policy, grid and schedule.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "core/clip.hpp"
#include "core/reduction_order.hpp"
#include "cpu/engine.hpp"
#include "cuda/engine.hpp"
#include "cuda/plan.hpp"
#include "device_lists.hpp"

namespace gradclip {
namespace {

struct Call {
  NormOrder order{};
  double max_norm = 1.0, grad_scale = 1.0;
  NonFinite policy = NonFinite::propagate;
  Groups groups{};
  bool kept = false;
  bool on_device = false;  // the threshold
  double epsilon = 0.0;
  std::vector<double> max_norms{};  // one per group, on the device, instead of max_norm
};

// Clip the same memory with both engines and compare everything they tell and leave. `in_two_steps`: a GPU
// decides after it has measured, not at the end of it.
void compare(List& list, const Call& call, bool in_two_steps) {
  const auto before = bytes_of(list);
  const std::vector<Span> spans = spans_of(list);
  const cpu::ChunkPlan plan = plan_of(spans);
  const Table<NormSum> sums = cpu::measure(spans, plan, call.order);
  const Table<NormSum> group = sums_of_groups(call.order, sums, call.groups);
  const std::span<const double> max_norms = call.max_norms.empty()
                                                ? std::span<const double>(&call.max_norm, 1)
                                                : std::span<const double>(call.max_norms);
  const ClipOptions options{call.policy, call.grad_scale, call.epsilon};
  const Norms norms = norms_of(call.order, sums, call.groups, group, call.grad_scale);
  const ClipDecision expected = decide_clip(norms, call.groups, max_norms, options);
  if (expected.action == Action::scale) cpu::scale(spans, plan, expected.factors);
  if (expected.action == Action::zero) cpu::set_to_zero(spans, plan);
  const auto after = bytes_of(list);
  restore(list, before);

  cuda::List gpu = call.kept ? cuda::List(spans, call.groups, nullptr, 0)
                             : cuda::List(spans, call.groups, nullptr, 0, nullptr);
  const cuda::ResultLayout at = gpu.layout();
  std::vector<double> memory(at.bytes() / 8, -7.0);
  auto* const result = reinterpret_cast<std::byte*>(memory.data());
  cuda::Decision decision{{call.max_norm}, options};
  if (call.on_device) decision.limits = {0.0, &call.max_norm, DType::float64};
  if (!call.max_norms.empty()) decision.limits = {0.0, call.max_norms.data(), DType::float64, true};
  if (in_two_steps) {
    gpu.measure(call.order, call.grad_scale, result, nullptr);
    gpu.decide(decision, result, nullptr);
  } else {
    gpu.measure(call.order, call.grad_scale, result, nullptr, &decision);
  }
  gpu.change(options, result, nullptr);

  const auto number = [&](std::size_t offset, std::size_t i) {
    return bits(memory[offset / 8 + i]);
  };
  CHECK(number(at.total_norm(), 0) == bits(norms.total));
  for (std::size_t i = 0; i < list.size(); ++i) {
    CAPTURE(i);
    CHECK(number(at.norms(), i) == bits(norms.tensors[i]));
  }
  for (std::size_t g = 0; g < at.groups; ++g) {
    CAPTURE(g);
    CHECK(number(at.group_norms(), g) == bits(norms.groups[g]));
    CHECK(number(at.coefficients(), g) == bits(expected.coefficients[g]));
  }
  cuda::ResultFlags flags{};
  std::memcpy(&flags, result + at.flags(), sizeof(flags));
  CHECK(flags.clipped == expected.clipped);
  CHECK(flags.nonfinite_norm == expected.any_nonfinite);
  CHECK(flags.action == static_cast<std::uint8_t>(expected.action));
  CHECK(flags.bad_limit == 0);
  std::vector<std::size_t> nonfinite;
  for (std::size_t i = 0; i < list.size(); ++i)
    if (result[at.nonfinite() + i] != std::byte{0}) nonfinite.push_back(i);
  CHECK(nonfinite == norms.odd);
  CHECK(bytes_of(list) == after);
  restore(list, before);
}
void compare(List& list, const Call& call) {
  compare(list, call, false);
  compare(list, call, true);
}

}  // namespace

TEST_CASE("every size around a vector, a row and a tile, every dtype, aligned or not") {
  set(kSettings[2]);
  for (const DType dtype : kTypes) {
    const std::int64_t tile = elements_of_tile(dtype);
    List list;
    unsigned seed = 1;
    for (const std::int64_t edge : {std::int64_t{0}, tile / 1024, tile / 32, tile, 3 * tile})
      for (const std::int64_t by : {-1, 0, 1})
        for (const std::size_t offset : {0, 1, 3}) {
          if (edge + by < 0) continue;
          list.emplace_back(dtype, edge + by, offset);
          list.back().fill(seed++, 1.0);
        }
    CAPTURE(name_of(dtype));
    for (const auto kind : {NormOrder::two, NormOrder::one, NormOrder::infinity}) {
      compare(list, {.order = {kind, 2.0}});
      compare(list, {.order = {kind, 2.0}, .max_norm = 1e30});
    }
  }
}

TEST_CASE("every grid and schedule") {
  for (const Settings& settings : kSettings) {
    set(settings);
    List list;
    list.emplace_back(DType::float32, 40 * 4096 + 5);
    list.emplace_back(DType::bfloat16, 7);
    list.emplace_back(DType::float64, 9 * 2048 + 1, 1);
    list.emplace_back(DType::complex64, 5 * 2048);
    for (int i = 0; i < 60; ++i) list.emplace_back(DType::float16, 100 + i);
    list.emplace_back(DType::float32, 20 * 4096);
    for (std::size_t i = 0; i < list.size(); ++i) list[i].fill(static_cast<unsigned>(i), 1.0);
    compare(list, {});
    compare(list, {.kept = true, .on_device = true});
    compare(list, {.groups = {Groups::tensor}});
  }
}

TEST_CASE("shares that are kept back, in one tensor and in many") {
  for (const Settings& settings : kSettings) {
    set({1, settings.schedule});
    const std::int64_t blocks = cuda::kBlocksPerMultiprocessor;
    const std::int64_t tiles = blocks * cuda::kWarps * (cuda::kTilesToKeepBack + 1);
    for (const int tensors : {1, 40}) {
      List list;
      std::int64_t cost = 0;
      for (int i = 0; i < tensors; ++i) {
        list.emplace_back(DType::float32, tiles * 4096 / tensors + 5 * i);
        list.back().fill(static_cast<unsigned>(i), 1.0);
        cost += cuda::cost_of(list.back().span.nbytes());
      }
      CHECK(cuda::Shares(cost, blocks).kept_back >= 2 * blocks);
      compare(list, {}, false);
      compare(list, {.order = {NormOrder::infinity, 2.0}, .max_norm = 1e30}, false);
      compare(list, {.max_norm = 1e30, .kept = true}, false);  // counters were set back
    }
  }
}

TEST_CASE("groups by label, other orders, grad_scale") {
  set(kSettings[2]);
  List list;
  for (const DType dtype : kTypes)
    for (const std::int64_t numel : {0, 33, 2 * 4096 + 9}) {
      list.emplace_back(dtype, numel);
      list.back().fill(static_cast<unsigned>(list.size()), 3.0);
    }
  Groups labels{Groups::labels};
  for (std::size_t i = 0; i < list.size(); ++i) labels.label.push_back(i * 7 % 5);
  labels.used = 5;
  for (const NormOrder order : {NormOrder{NormOrder::two, 2.0}, NormOrder{NormOrder::one, 1.0},
                                NormOrder{NormOrder::infinity, INFINITY},
                                NormOrder{NormOrder::other, 3.0}, NormOrder{NormOrder::other, 0.5}})
    for (const Groups& groups : {Groups{}, Groups{Groups::tensor}, labels})
      compare(list, {.order = order, .max_norm = 20.0, .grad_scale = 3.0, .groups = groups});
}

TEST_CASE("a threshold for each group; something added to norms") {
  set(kSettings[2]);
  List list;
  for (const std::int64_t numel : {33, 4096, 2 * 4096 + 9})
    list.emplace_back(DType::float32, numel);
  for (const Tensor& tensor : list) tensor.fill(1, 1.0);
  // Named, since GCC 12 takes parts of a temporary Call for uninitialised.
  const Groups tensor{Groups::tensor}, labels{Groups::labels, {1, 0, 1}, 2};
  Call call{.groups = tensor, .max_norms = {1e30, 2.0, INFINITY}};
  compare(list, call);
  call.groups = labels;
  call.max_norms = {0.5, 40.0};
  compare(list, call);
  compare(list, {.epsilon = 100.0});
  compare(list, {.max_norm = 0.0, .epsilon = 1e-6});
}

TEST_CASE("overflow, underflow, infinities, NaN, with every policy") {
  set(kSettings[1]);
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (const DType dtype : kTypes)
    for (const double scale : {1e-45, 1e-30, 1e30, 1e-310, 1e300}) {
      List list;
      list.emplace_back(dtype, 5000);
      list.emplace_back(dtype, 100);
      list[0].fill(1, scale);
      list[1].fill(2, 1.0);
      compare(list, {});
      compare(list, {.order = {NormOrder::one, 1.0}});
    }
  for (const DType dtype : kTypes)
    for (const double odd : {kInfinity, -kInfinity, std::nan("")})
      for (const auto policy : {NonFinite::raise, NonFinite::skip, NonFinite::zero})
        for (const auto kind : {NormOrder::two, NormOrder::one, NormOrder::infinity}) {
          List list;
          list.emplace_back(dtype, 300);
          list.emplace_back(dtype, 9000);
          for (const Tensor& tensor : list) tensor.fill(3, 1.0);
          list[1].set(8191, odd);
          compare(list, {.order = {kind, 1.0}, .policy = policy});
          compare(list, {.order = {kind, 1.0}, .policy = policy, .groups = {Groups::tensor}});
        }
}

TEST_CASE("strided tensors") {
  set(kSettings[2]);
  for (const DType dtype : kTypes) {
    const auto size = static_cast<std::int64_t>(size_of(dtype));
    List list;
    list.emplace_back(dtype, 3 * 40 * 130);
    list[0].fill(5, 1.0);
    const StridedLayout layout{{{3, 40 * 130 * size}, {20, 260 * size}, {65, 2 * size}}};
    list[0].span.layout = &layout;
    list[0].span.numel = 3 * 20 * 65;
    list.emplace_back(dtype, 77);
    list[1].fill(6, 1.0);
    compare(list, {});
    compare(list, {.order = {NormOrder::infinity, INFINITY}});
  }
}

TEST_CASE("as many tensors as an argument holds, few or many, and more") {
  set(kSettings[3]);
  List list;
  std::vector<std::size_t> counts{1500};
  for (const std::size_t held : {cuda::kFewEntries, cuda::kMostEntries})
    for (const std::size_t count : {held - 1, held, held + 1}) counts.push_back(count);
  std::sort(counts.begin(), counts.end());
  for (const std::size_t count : counts) {
    while (list.size() < count) {
      const auto i = static_cast<unsigned>(list.size());
      list.emplace_back(kTypes[i % 4], 10 + i % 50);
      list.back().fill(i, 1.0);
    }
    compare(list, {});
  }
}

TEST_CASE("tiles that are all zero are read once, those whose squares vanish again") {
  set(kSettings[0]);
  const auto loads = [](double x, NormOrder order) {
    List list;
    for (const DType dtype : {DType::float16, DType::bfloat16, DType::float32, DType::float64}) {
      list.emplace_back(dtype, 20'000);
      list.back().fill(1, 0.0);
      if (dtype != DType::float16) list.back().set(19'999, x);
    }
    const std::size_t before = simt::counters().loads;
    compare(list, {.order = order});
    return simt::counters().loads - before;
  };
  CHECK(loads(0.0, {}) == loads(1.0, {}));
  CHECK(loads(-0.0, {}) == loads(1.0, {}));
  CHECK(loads(1e-30, {}) > loads(1.0, {}));
  CHECK(loads(0.0, {NormOrder::one, 1.0}) == loads(1.0, {NormOrder::one, 1.0}));
}

TEST_CASE("the grid of a kernel is what is resident of it") {
  simt::machine().multiprocessors = 4;
  List list;
  list.emplace_back(DType::float32, 1'000'000);
  list[0].fill(1, 1.0);
  cuda::List gpu(spans_of(list), {}, nullptr, 0, nullptr);
  std::vector<double> memory(gpu.layout().bytes() / 8);
  auto* const result = reinterpret_cast<std::byte*>(memory.data());
  gpu.measure({}, 1.0, result, nullptr);
  CHECK(simt::counters().blocks_of_last_launch == 4 * cuda::kBlocksPerMultiprocessor);
  gpu.clip_by_value({1.0}, result, nullptr);
  CHECK(simt::counters().blocks_of_last_launch == 4 * cuda::kBlocksOfLargeKernels);
  gpu.measure({NormOrder::other, 3.0}, 1.0, result, nullptr);
  CHECK(simt::counters().blocks_of_last_launch == 4 * cuda::kBlocksOfLargeKernels);
}

TEST_CASE("no gradients at all") {
  List list;
  compare(list, {});
}

TEST_CASE("value clip and scale") {
  set(kSettings[2]);
  for (const DType dtype : {DType::float16, DType::bfloat16, DType::float32, DType::float64})
    for (const ValueLimit limit :
         {ValueLimit{0.0}, ValueLimit{0.5}, ValueLimit{1e-9}, ValueLimit{1e9},
          ValueLimit{1.0 / 3.0}, ValueLimit{1.0 / 3.0, true}}) {
      List list;
      list.emplace_back(dtype, 3 * elements_of_tile(dtype) + 5, 1);
      list.emplace_back(dtype, 40);
      for (const Tensor& tensor : list) tensor.fill(9, 1.0);
      list[1].set(3, std::nan(""));
      const auto before = bytes_of(list);
      const std::vector<Span> spans = spans_of(list);
      const cpu::ChunkPlan plan = plan_of(spans);
      const cpu::ValueClip expected = cpu::measure_values(spans, plan, limit);
      cpu::clip_by_value(spans, plan, limit, expected.tiles);
      const auto clipped = bytes_of(list);
      const Table<double> factors(list.size(), limit.value);
      restore(list, before);
      list[1].set(3, 1.0);
      const auto finite = bytes_of(list);
      cpu::scale(spans, plan, factors);
      const auto scaled = bytes_of(list);

      restore(list, before);
      cuda::List gpu(spans, {}, nullptr, 0, nullptr);
      std::vector<double> memory(gpu.layout().bytes() / 8);
      auto* const result = reinterpret_cast<std::byte*>(memory.data());
      gpu.clip_by_value(limit, result, nullptr);
      CHECK(bytes_of(list) == clipped);
      cuda::ResultFlags flags{};
      std::memcpy(&flags, result + gpu.layout().flags(), sizeof(flags));
      CHECK(flags.clipped == expected.clipped);
      for (std::size_t i = 0; i < list.size(); ++i)
        CHECK(bits(memory[gpu.layout().norms() / 8 + i]) == bits(expected.largest[i].value));

      std::vector<std::int64_t> counts(2 * list.size(), -1);
      gpu.count_nonfinite(counts.data(), nullptr);
      CHECK(counts == std::vector<std::int64_t>{0, 0, 1, 0});
      restore(list, finite);
      gpu.scale(limit.value, nullptr);
      CHECK(bytes_of(list) == scaled);
    }
}

TEST_CASE("sums go out to be reduced and come back") {
  set(kSettings[2]);
  List list;
  list.emplace_back(DType::float32, 30000);
  list.emplace_back(DType::float64, 3000);
  for (const Tensor& tensor : list) tensor.fill(9, 1.0);
  const std::vector<Span> spans = spans_of(list);
  for (const auto kind : {NormOrder::two, NormOrder::one, NormOrder::infinity}) {
    const NormOrder order{kind, 2.0};
    const Groups groups{Groups::tensor};
    const Table<NormSum> sums = cpu::measure(spans, plan_of(spans), order);
    cuda::List gpu(spans, groups, nullptr, 0, nullptr);
    const cuda::ResultLayout at = gpu.layout();
    std::vector<double> memory(at.bytes() / 8);
    auto* const result = reinterpret_cast<std::byte*>(memory.data());
    gpu.measure(order, 1.0, result, nullptr);
    Table<NormSum> reduced;
    std::vector<double> twice;
    for (std::size_t g = 0; g < 2; ++g) {
      CHECK(bits(memory[at.group_sums() / 8 + g]) == bits(to_plain(order, sums[g])));
      twice.push_back(2.0 * to_plain(order, sums[g]));
      reduced.push_back(from_plain(twice[g]));
    }
    const cuda::Decision decision{{1.0}, {NonFinite::skip}};
    gpu.take_sums(order, 1.0, twice.data(), result, nullptr, &decision);
    Norms norms = norms_of(order, sums, groups, sums, 1.0);
    take_sums(norms, order, reduced, 1.0);
    const ClipDecision expected = decide_clip(norms, groups, std::vector{1.0}, decision.options);
    CHECK(bits(memory[0]) == bits(norms.total));
    for (std::size_t g = 0; g < 2; ++g)
      CHECK(bits(memory[at.coefficients() / 8 + g]) == bits(expected.coefficients[g]));
  }
}

TEST_CASE("a threshold on the device that is not positive writes nothing and says so") {
  set(kSettings[0]);
  List list;
  list.emplace_back(DType::float32, 100);
  list[0].fill(1, 1.0);
  const auto before = bytes_of(list);
  for (const float bad : {-1.0f, -INFINITY, NAN})
    for (const bool per_group : {false, true}) {
      const float one_bad[] = {1.0f, bad};
      const Groups groups = per_group ? Groups{Groups::labels, {0}, 2} : Groups{};
      cuda::List gpu(spans_of(list), groups, nullptr, 0, nullptr);
      std::vector<double> memory(gpu.layout().bytes() / 8);
      auto* const result = reinterpret_cast<std::byte*>(memory.data());
      cuda::Decision decision{{0.0, &bad, DType::float32}, {NonFinite::skip}};
      if (per_group) decision.limits = {0.0, one_bad, DType::float32, true};
      gpu.measure({}, 1.0, result, nullptr, &decision);
      gpu.change({}, result, nullptr);
      cuda::ResultFlags flags{};
      std::memcpy(&flags, result + gpu.layout().flags(), sizeof(flags));
      CHECK(flags.bad_limit == 1);
      CHECK(bytes_of(list) == before);
    }
}

TEST_CASE("every tile has one warp, in order, also beyond 2^32 bytes and 2^16 tensors") {
  std::vector<std::int64_t> sizes = {0, 1, (std::int64_t{1} << 33) + 5, 16384, 0, 16385};
  sizes.push_back((std::int64_t{1} << 42) + 7);
  sizes.insert(sizes.end(), 70'000, 4);
  sizes.push_back(std::int64_t{3} << 31);
  std::int64_t total = 0;
  for (const std::int64_t bytes : sizes) total += cuda::cost_of(bytes);
  for (const std::int64_t blocks : {1, 3 * 132, 3 * 160}) {
    const cuda::Shares shares(total, blocks);
    CHECK(shares.kept_back == cuda::kMostKeptBack * blocks);
    std::int64_t cost = 0;
    for (const std::int64_t bytes : sizes) {
      const cuda::TensorEntry entry{nullptr, bytes, cost, 0, 0, DType::float16};
      cost += cuda::cost_of(bytes);
      const std::int64_t tiles = cuda::tiles_of(bytes);
      const std::int64_t last_tile = entry.first_cost + (tiles - 1) * cuda::kTileCost;
      const std::int64_t first = shares.at(entry.first_cost), last = shares.at(last_tile);
      std::int64_t next = 0, wrong = 0;
      for (std::int64_t s = std::max(first - 1, std::int64_t{0}); s <= last + 1; ++s)
        for (int w = 0; s < shares.count() && w < cuda::kWarps; ++w) {
          const cuda::TileRange range = cuda::tile_range(entry, shares.range(s, w));
          if (range.empty()) continue;
          wrong += s < first || s > last || range.begin != next || range.all != tiles;
          next = range.end;
          if (range.end == range.all) wrong += range.end_byte(bytes) != bytes;
        }
      if (wrong != 0 || next != tiles) {
        CAPTURE(bytes);
        CHECK(wrong == 0);
        CHECK(next == tiles);
      }
    }
    CHECK(cost == total);
  }
}

TEST_CASE("calls of a kept list take turns on the device, whatever their streams") {
  set(kSettings[2]);
  List list;
  list.emplace_back(DType::float32, 100'000);
  list[0].fill(1, 1.0);
  cuda::List gpu(spans_of(list), {}, nullptr, 0);
  std::vector<double> memory(gpu.layout().bytes() / 8);
  auto* const result = reinterpret_cast<std::byte*>(memory.data());
  auto* const first = reinterpret_cast<cuda::Stream>(std::uintptr_t{16});
  auto* const second = reinterpret_cast<cuda::Stream>(std::uintptr_t{32});
  auto& waits = simt::machine().waits;
  using Waits = std::vector<std::pair<cuda::Stream, cuda::Stream>>;
  waits.clear();
  gpu.measure({}, 1.0, result, first);
  gpu.change({}, result, first);
  CHECK(waits.empty());
  gpu.clip_by_value({1.0}, result, second);
  CHECK(waits == Waits{{second, first}});
  gpu.measure({NormOrder::other, 3.0}, 1.0, result, first);
  CHECK(waits == Waits{{second, first}, {first, second}});
  gpu.measure({}, 1.0, result, first);
  CHECK(waits.size() == 2);
  // What is captured must not wait for what is not.
  simt::machine().is_capturing = true;
  gpu.measure({}, 1.0, result, second);
  CHECK(waits.size() == 2);
  simt::machine().is_capturing = false;
  waits.clear();
}

TEST_CASE("launches, copies and allocations of a call") {
  set(kSettings[1]);
  List list;
  for (int i = 0; i < 300; ++i) list.emplace_back(DType::float32, 64);
  for (const Tensor& tensor : list) tensor.fill(1, 1.0);
  compare(list, {});  // makes the workspace
  for (const bool in_two_steps : {false, true}) {
    const simt::Counters before = simt::counters();
    compare(list, {}, in_two_steps);
    CHECK(simt::counters().launches == before.launches + (in_two_steps ? 3 : 2));
    CHECK(simt::counters().copies == before.copies);
    CHECK(simt::counters().allocations == before.allocations);
    CHECK(simt::counters().waits == before.waits);
  }
}

}  // namespace gradclip
