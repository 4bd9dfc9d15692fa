#include "core/clip.hpp"

#include <algorithm>

namespace gradclip {

ClipDecision decide_clip(const NormOrder& order, std::span<const NormSum> tensors,
                         const Groups& groups, std::span<const NormSum> group, bool reduced,
                         std::span<const double> max_norms, double grad_scale, NonFinite policy,
                         double epsilon) {
  ClipDecision decision;
  const auto unscaled_norm = [&](const NormSum& sum) { return norm_of(order, sum, grad_scale); };

  decision.norms.reserve(tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    decision.norms.push_back(unscaled_norm(tensors[i]));
    if (!is_finite(tensors[i].value) || !is_finite(tensors[i].unit))
      decision.nonfinite.push_back(i);
  }
  bool all_finite = decision.nonfinite.empty();
  for (const NormSum& sum : group) {
    decision.group_norms.push_back(unscaled_norm(sum));
    all_finite = all_finite && is_finite(decision.group_norms.back());
  }
  // Without other processes the total comes from the tensors: it does not depend on the grouping.
  decision.total_norm = groups.kind == Groups::all
                            ? decision.group_norms[0]
                            : unscaled_norm(group_sums(order, reduced ? group : tensors, {}, 1)[0]);
  decision.nonfinite_norm = !all_finite;

  decision.coefficients.assign(group.size(), 1.0);
  if (!all_finite && (policy == NonFinite::raise || policy == NonFinite::skip)) return decision;
  if (!all_finite && policy == NonFinite::zero) {
    std::fill(decision.coefficients.begin(), decision.coefficients.end(), 0.0);
    decision.action = ClipDecision::zero;
    decision.clipped = true;
    return decision;
  }
  bool any_change = false;
  for (std::size_t g = 0; g < group.size(); ++g) {
    const double max_norm = max_norms[max_norms.size() == 1 ? 0 : g];
    const double coefficient = clip_coefficient(decision.group_norms[g], max_norm, epsilon);
    decision.coefficients[g] = coefficient;
    decision.clipped = decision.clipped || coefficient != 1.0;
    any_change = any_change || coefficient / grad_scale != 1.0;
  }
  if (!any_change) return decision;
  decision.action = ClipDecision::scale;
  decision.factors.reserve(tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i)
    decision.factors.push_back(decision.coefficients[groups.of(i)] / grad_scale);
  return decision;
}

}  // namespace gradclip
