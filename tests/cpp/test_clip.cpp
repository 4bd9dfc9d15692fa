// core/clip.hpp and core/decide.hpp: what a clip decides.
#include <cmath>
#include <vector>

#include "core/clip.hpp"
#include "support.hpp"

using namespace gradclip;
using gradclip::test::listed;

namespace {

constexpr NormOrder kTwo{NormOrder::two, 2.0};
constexpr double kOne[] = {1.0}, kFour[] = {4.0};  // thresholds

// Sums of tensors with these 2-norms.
std::vector<NormSum> sums(const std::vector<double>& norms) {
  std::vector<NormSum> result;
  for (const double norm : norms) result.push_back({norm * norm, 0, 0.0});
  return result;
}

// What was measured, and what is decided from that.
struct Clip {
  Norms norms;
  ClipDecision decision;
};

Clip clip(const std::vector<NormSum>& tensors, std::span<const double> limits,
          const Groups& groups = {}, const ClipOptions& options = {}) {
  const Table<NormSum> group = sums_of_groups(kTwo, tensors, groups);
  Norms norms = norms_of(kTwo, tensors, groups, group, options.grad_scale);
  ClipDecision decision = decide_clip(norms, groups, limits, options);
  return {std::move(norms), std::move(decision)};
}
Clip clip(const std::vector<double>& norms, double max_norm, const Groups& groups = {},
          const ClipOptions& options = {}) {
  return clip(sums(norms), {&max_norm, 1}, groups, options);
}

}  // namespace

TEST_CASE("the coefficient is exactly 1 unless the norm is above the threshold") {
  CHECK(clip_coefficient(0.0, 1.0) == 1.0);
  CHECK(clip_coefficient(1.0, 1.0) == 1.0);
  CHECK(clip_coefficient(std::nextafter(1.0, 2.0), 1.0) < 1.0);
  CHECK(clip_coefficient(3.0, 0.1) == 0.1 / 3.0);
  CHECK(clip_coefficient(INFINITY, 1.0) == 0.0);
  CHECK(std::isnan(clip_coefficient(NAN, 1.0)));
  CHECK(clip_coefficient(INFINITY, INFINITY) == 1.0);
  CHECK(clip_coefficient(NAN, INFINITY) == 1.0);
  // With something added to the norm, as PyTorch does.
  CHECK(clip_coefficient(3.0, 0.5, 1.0) == 0.125);
  CHECK(clip_coefficient(0.5, 1.0, 0.5) == 1.0);
  CHECK(clip_coefficient(0.0, 0.0, 1e-6) == 0.0);
  CHECK(is_usable({}, 0.0));
  CHECK_FALSE(is_usable({}, -1.0));
  CHECK_FALSE(is_usable({}, NAN));
}

TEST_CASE("coefficients that are given") {
  ClipOptions given;
  given.are_coefficients = true;
  CHECK(is_usable(given, -2.0));
  CHECK_FALSE(is_usable(given, INFINITY));
  const double coefficients[] = {1.0, 0.0, 3.0};
  const auto [norms, decision] =
      clip(sums({3.0, 4.0, 12.0}), coefficients, {Groups::tensor}, given);
  CHECK(norms.total == 13.0);
  CHECK(listed(decision.factors) == std::vector{1.0, 0.0, 3.0});
  CHECK(decision.action == Action::scale);
  CHECK(decision.clipped);
  const double one = 1.0;
  CHECK(clip(sums({3.0}), {&one, 1}, {}, given).decision.action == Action::nothing);
}

TEST_CASE("a threshold that turns out not to be usable: nothing is done") {
  const GroupDecision group = decide_group(1e9, 1.0, {NonFinite::zero}, {true, true});
  CHECK(std::isnan(group.coefficient));
  CHECK_FALSE(group.clips);
  CHECK_FALSE(group.changes);
}

TEST_CASE("nothing to clip: nothing to do") {
  const auto [norms, decision] = clip({3.0, 4.0}, 5.0);
  CHECK(norms.total == 5.0);
  CHECK(listed(norms.tensors) == std::vector{3.0, 4.0});
  CHECK(listed(decision.coefficients) == std::vector{1.0});
  CHECK(decision.action == Action::nothing);
  CHECK_FALSE(decision.clipped);
}

TEST_CASE("one group") {
  const auto [norms, decision] = clip({3.0, 4.0}, 2.5);
  CHECK(listed(decision.coefficients) == std::vector{0.5});
  CHECK(listed(decision.factors) == std::vector{0.5, 0.5});
  CHECK(decision.action == Action::scale);
  CHECK(decision.clipped);
}

TEST_CASE("each tensor its own group") {
  const auto [norms, decision] = clip({3.0, 4.0}, 3.0, {Groups::tensor});
  CHECK(norms.total == 5.0);
  CHECK(norms.groups == norms.tensors);
  CHECK(listed(decision.coefficients) == std::vector{1.0, 0.75});
  CHECK(decision.factors == decision.coefficients);
}

TEST_CASE("labels, one of them unused") {
  const auto [norms, decision] = clip({3.0, 12.0, 4.0}, 6.0, {Groups::labels, {2, 0, 2}, 3});
  CHECK(norms.total == 13.0);
  CHECK(listed(norms.groups) == std::vector{12.0, 0.0, 5.0});
  CHECK(listed(decision.coefficients) == std::vector{0.5, 1.0, 1.0});
  CHECK(listed(decision.factors) == std::vector{1.0, 0.5, 1.0});
}

TEST_CASE("each group its own threshold") {
  const double max_norms[] = {24.0, 2.5};
  const ClipDecision decision =
      clip(sums({3.0, 12.0, 4.0}), max_norms, {Groups::labels, {1, 0, 1}, 2}).decision;
  CHECK(listed(decision.coefficients) == std::vector{1.0, 0.5});
  CHECK(listed(decision.factors) == std::vector{0.5, 1.0, 0.5});
}

TEST_CASE("no tensors") {
  for (const Groups& groups : {Groups{}, Groups{Groups::tensor}, Groups{Groups::labels}}) {
    const auto [norms, decision] = clip(std::vector<double>{}, 1.0, groups);
    CHECK(norms.total == 0.0);
    CHECK(decision.action == Action::nothing);
  }
}

TEST_CASE("grad_scale: norms are unscaled, factors unscale") {
  const auto [norms, clipped] = clip({30.0, 40.0}, 2.5, {}, {NonFinite::raise, 10.0});
  CHECK(norms.total == 5.0);
  CHECK(listed(clipped.coefficients) == std::vector{0.5});
  CHECK(listed(clipped.factors) == std::vector{0.05, 0.05});
  const ClipDecision only_unscaled = clip({30.0, 40.0}, 9.0, {}, {NonFinite::raise, 10.0}).decision;
  CHECK(listed(only_unscaled.coefficients) == std::vector{1.0});
  CHECK(listed(only_unscaled.factors) == std::vector{0.1, 0.1});
  CHECK_FALSE(only_unscaled.clipped);
  // The two cancel: nothing to write.
  const ClipOptions half{NonFinite::raise, 0.5};
  CHECK(listed(clip({4.0}, 1.0, {}, half).decision.factors) == std::vector{0.25});
  CHECK(clip({1.0}, 1.0, {}, half).decision.action == Action::nothing);
}

TEST_CASE("norms that are not finite, under each policy") {
  for (const double bad : {double(INFINITY), double(NAN)}) {
    const auto under = [&](NonFinite policy) { return clip({3.0, bad}, 1.0, {}, {policy}); };
    for (const NonFinite policy : {NonFinite::raise, NonFinite::skip}) {
      const auto [norms, decision] = under(policy);
      CHECK(decision.any_nonfinite);
      CHECK(norms.odd == std::vector<std::size_t>{1});
      CHECK(decision.action == Action::nothing);
      CHECK(listed(decision.coefficients) == std::vector{1.0});
    }
    const ClipDecision zero = under(NonFinite::zero).decision;
    CHECK(zero.action == Action::zero);
    CHECK(listed(zero.coefficients) == std::vector{0.0});
    const ClipDecision propagate = under(NonFinite::propagate).decision;
    CHECK(propagate.action == Action::scale);
    CHECK((std::isinf(bad) ? propagate.factors[0] == 0.0 : std::isnan(propagate.factors[0])));
  }
}

TEST_CASE("a norm beyond float64, of finite gradients, is not finite and no gradient is to blame") {
  const std::vector<NormSum> tensors(2, {1.0, 2046, 0.0});
  const auto within = clip(tensors, kOne, {}, {NonFinite::skip});
  CHECK(within.norms.tensors[0] == 0x1p1023);
  CHECK(within.norms.total == std::sqrt(2.0) * 0x1p1023);
  const std::vector<NormSum> more(5, {1.0, 2046, 0.0});
  const auto beyond = clip(more, kOne, {}, {NonFinite::skip});
  CHECK(beyond.norms.total == INFINITY);
  CHECK(beyond.decision.any_nonfinite);
  CHECK(beyond.norms.odd.empty());
}

TEST_CASE("reduced sums: the total is over all processes, the norms are this one's") {
  const std::vector<NormSum> tensors = sums({3.0, 4.0});
  const Groups groups{Groups::tensor};
  const std::vector<NormSum> group{from_plain(36.0), from_plain(64.0)};
  Norms norms = norms_of(kTwo, tensors, groups, tensors, 1.0);
  take_sums(norms, kTwo, group, 1.0);
  CHECK(listed(norms.tensors) == std::vector{3.0, 4.0});
  CHECK(listed(norms.groups) == std::vector{6.0, 8.0});
  CHECK(norms.total == 10.0);
  const ClipDecision decision = decide_clip(norms, groups, kFour, {});
  CHECK(listed(decision.coefficients) == std::vector{4.0 / 6.0, 0.5});
}

TEST_CASE("sums make norms, and survive the way through one float64 where they fit") {
  const NormOrder orders[] = {
      kTwo, {NormOrder::one, 1.0}, {NormOrder::infinity, INFINITY}, {NormOrder::other, 3.0}};
  const double expected[] = {3.0, 9.0, 9.0, 6.0};
  for (int i = 0; i < 4; ++i) {
    const NormSum sum{i == 3 ? 1.0 : 9.0, 0, i == 3 ? 6.0 : 0.0};
    CHECK(norm_of(orders[i], sum) == doctest::Approx(expected[i]).epsilon(1e-15));
    const NormSum back = from_plain(to_plain(orders[i], sum));
    CHECK(norm_of(orders[i], back) == doctest::Approx(expected[i]).epsilon(1e-15));
  }
  CHECK(norm_of(kTwo, {1.0, -2148, 0.0}) == 0x1p-1074);
  CHECK(norm_of(kTwo, {1.0, 2046, 0.0}) == 0x1p1023);
  CHECK(norm_of(kTwo, {1.0, -3, 0.0}) == std::sqrt(0.125));
  CHECK(norm_of(kTwo, {1.0, 2100, 0.0}) == INFINITY);
}

TEST_CASE("the total does not depend on the grouping or the order, for any ord") {
  test::Random random(1);
  for (const NormOrder& order :
       {kTwo, NormOrder{NormOrder::one, 1.0}, NormOrder{NormOrder::infinity, INFINITY}}) {
    std::vector<NormSum> tensors;
    for (int i = 0; i < 100; ++i)
      tensors.push_back({test::random_magnitude(random, -300, 300), 0, 0.0});
    const double total = norm_of(order, group_sums(order, tensors, {}, 1)[0]);
    random.shuffle(tensors);
    CHECK(norm_of(order, group_sums(order, tensors, {}, 1)[0]) == total);
  }
}
