// core/clip.hpp and core/coefficient.hpp: what a clip decides.
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

ClipDecision decide(const std::vector<double>& norms, double max_norm, const Groups& groups = {},
                    double grad_scale = 1.0, NonFinite policy = NonFinite::raise) {
  const std::vector<NormSum> tensors = sums(norms);
  const Table<NormSum> group = sums_of_groups(kTwo, tensors, groups);
  return decide_clip(kTwo, tensors, groups, group, false, {&max_norm, 1}, grad_scale, policy);
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
  CHECK(is_threshold(0.0));
  CHECK_FALSE(is_threshold(-1.0));
  CHECK_FALSE(is_threshold(NAN));
}

TEST_CASE("nothing to clip: nothing to do") {
  const ClipDecision decision = decide({3.0, 4.0}, 5.0);
  CHECK(decision.total_norm == 5.0);
  CHECK(listed(decision.norms) == std::vector{3.0, 4.0});
  CHECK(listed(decision.coefficients) == std::vector{1.0});
  CHECK(decision.action == ClipDecision::nothing);
  CHECK_FALSE(decision.clipped);
}

TEST_CASE("one group") {
  const ClipDecision decision = decide({3.0, 4.0}, 2.5);
  CHECK(listed(decision.coefficients) == std::vector{0.5});
  CHECK(listed(decision.factors) == std::vector{0.5, 0.5});
  CHECK(decision.action == ClipDecision::scale);
  CHECK(decision.clipped);
}

TEST_CASE("each tensor its own group") {
  const ClipDecision decision = decide({3.0, 4.0}, 3.0, {Groups::tensor});
  CHECK(decision.total_norm == 5.0);
  CHECK(decision.group_norms == decision.norms);
  CHECK(listed(decision.coefficients) == std::vector{1.0, 0.75});
  CHECK(decision.factors == decision.coefficients);
}

TEST_CASE("labels, one of them unused") {
  const ClipDecision decision = decide({3.0, 12.0, 4.0}, 6.0, {Groups::labels, {2, 0, 2}, 3});
  CHECK(decision.total_norm == 13.0);
  CHECK(listed(decision.group_norms) == std::vector{12.0, 0.0, 5.0});
  CHECK(listed(decision.coefficients) == std::vector{0.5, 1.0, 1.0});
  CHECK(listed(decision.factors) == std::vector{1.0, 0.5, 1.0});
}

TEST_CASE("each group its own threshold") {
  const std::vector<NormSum> tensors = sums({3.0, 12.0, 4.0});
  const Groups groups{Groups::labels, {1, 0, 1}, 2};
  const double max_norms[] = {24.0, 2.5};
  const ClipDecision decision =
      decide_clip(kTwo, tensors, groups, sums_of_groups(kTwo, tensors, groups), false, max_norms,
                  1.0, NonFinite::raise);
  CHECK(listed(decision.coefficients) == std::vector{1.0, 0.5});
  CHECK(listed(decision.factors) == std::vector{0.5, 1.0, 0.5});
}

TEST_CASE("no tensors") {
  for (const Groups& groups : {Groups{}, Groups{Groups::tensor}, Groups{Groups::labels}}) {
    const ClipDecision decision = decide({}, 1.0, groups);
    CHECK(decision.total_norm == 0.0);
    CHECK(decision.action == ClipDecision::nothing);
  }
}

TEST_CASE("grad_scale: norms are unscaled, factors unscale") {
  const ClipDecision clipped = decide({30.0, 40.0}, 2.5, {}, 10.0);
  CHECK(clipped.total_norm == 5.0);
  CHECK(listed(clipped.coefficients) == std::vector{0.5});
  CHECK(listed(clipped.factors) == std::vector{0.05, 0.05});
  const ClipDecision only_unscaled = decide({30.0, 40.0}, 9.0, {}, 10.0);
  CHECK(listed(only_unscaled.coefficients) == std::vector{1.0});
  CHECK(listed(only_unscaled.factors) == std::vector{0.1, 0.1});
  CHECK_FALSE(only_unscaled.clipped);
  // The two cancel: nothing to write.
  CHECK(listed(decide({4.0}, 1.0, {}, 0.5).factors) == std::vector{0.25});
  CHECK(decide({1.0}, 1.0, {}, 0.5).action == ClipDecision::nothing);
}

TEST_CASE("norms that are not finite, under each policy") {
  for (const double bad : {double(INFINITY), double(NAN)}) {
    const auto under = [&](NonFinite policy) { return decide({3.0, bad}, 1.0, {}, 1.0, policy); };
    for (const NonFinite policy : {NonFinite::raise, NonFinite::skip}) {
      const ClipDecision decision = under(policy);
      CHECK(decision.nonfinite_norm);
      CHECK(decision.nonfinite == std::vector<std::size_t>{1});
      CHECK(decision.action == ClipDecision::nothing);
      CHECK(listed(decision.coefficients) == std::vector{1.0});
    }
    const ClipDecision zero = under(NonFinite::zero);
    CHECK(zero.action == ClipDecision::zero);
    CHECK(listed(zero.coefficients) == std::vector{0.0});
    const ClipDecision propagate = under(NonFinite::propagate);
    CHECK(propagate.action == ClipDecision::scale);
    CHECK((std::isinf(bad) ? propagate.factors[0] == 0.0 : std::isnan(propagate.factors[0])));
  }
}

TEST_CASE("a norm beyond float64, of finite gradients, is not finite and no gradient is to blame") {
  const std::vector<NormSum> tensors{{1.0, 2046, 0.0}, {1.0, 2046, 0.0}};
  const auto group = sums_of_groups(kTwo, tensors, {});
  const ClipDecision decision =
      decide_clip(kTwo, tensors, {}, group, false, kOne, 1.0, NonFinite::skip);
  CHECK(decision.norms[0] == 0x1p1023);
  CHECK(decision.total_norm == std::sqrt(2.0) * 0x1p1023);
  const std::vector<NormSum> more(5, {1.0, 2046, 0.0});
  const ClipDecision beyond = decide_clip(kTwo, more, {}, sums_of_groups(kTwo, more, {}), false,
                                          kOne, 1.0, NonFinite::skip);
  CHECK(beyond.total_norm == INFINITY);
  CHECK(beyond.nonfinite_norm);
  CHECK(beyond.nonfinite.empty());
}

TEST_CASE("reduced sums: the total is over all processes, the norms are this one's") {
  const std::vector<NormSum> tensors = sums({3.0, 4.0});
  const Groups groups{Groups::tensor};
  const std::vector<NormSum> group{from_plain(36.0), from_plain(64.0)};
  const ClipDecision decision =
      decide_clip(kTwo, tensors, groups, group, true, kFour, 1.0, NonFinite::raise);
  CHECK(listed(decision.norms) == std::vector{3.0, 4.0});
  CHECK(listed(decision.group_norms) == std::vector{6.0, 8.0});
  CHECK(decision.total_norm == 10.0);
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
