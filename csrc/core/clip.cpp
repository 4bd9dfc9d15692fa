#include "core/clip.hpp"

namespace gradclip {

Norms norms_of(const NormOrder& order, std::span<const NormSum> tensors, const Groups& groups,
               std::span<const NormSum> group, double grad_scale) {
  const auto unscaled = [&](const NormSum& sum) { return norm_of(order, sum, grad_scale); };
  Norms norms;
  norms.tensors.reserve(tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    norms.tensors.push_back(unscaled(tensors[i]));
    if (!is_finite(tensors[i].value) || !is_finite(tensors[i].unit)) norms.odd.push_back(i);
  }
  norms.groups.reserve(group.size());
  for (const NormSum& sum : group) norms.groups.push_back(unscaled(sum));
  // From the tensors: it does not depend on the grouping.
  norms.total =
      groups.kind == Groups::all ? norms.groups[0] : unscaled(group_sums(order, tensors, {}, 1)[0]);
  return norms;
}

void take_sums(Norms& norms, const NormOrder& order, std::span<const NormSum> group,
               double grad_scale) {
  for (std::size_t g = 0; g < group.size(); ++g)
    norms.groups[g] = norm_of(order, group[g], grad_scale);
  norms.total = group.size() == 1 ? norms.groups[0]
                                  : norm_of(order, group_sums(order, group, {}, 1)[0], grad_scale);
}

ClipDecision decide_clip(const Norms& norms, const Groups& groups, std::span<const double> limits,
                         const ClipOptions& options) {
  ClipDecision decision;
  GroupFindings all;
  all.any_nonfinite = !norms.odd.empty();
  for (const double norm : norms.groups) all.any_nonfinite = all.any_nonfinite || !is_finite(norm);
  decision.any_nonfinite = all.any_nonfinite;

  bool any_changes = false;
  decision.coefficients.reserve(norms.groups.size());
  for (std::size_t g = 0; g < norms.groups.size(); ++g) {
    const double limit = limits[limits.size() == 1 ? 0 : g];
    const GroupDecision group = decide_group(norms.groups[g], limit, options, all);
    decision.coefficients.push_back(group.coefficient);
    decision.clipped = decision.clipped || group.clips;
    any_changes = any_changes || group.changes;
  }
  decision.action = action_of(options, all, any_changes);
  if (decision.action != Action::scale) return decision;
  decision.factors.reserve(norms.tensors.size());
  for (std::size_t i = 0; i < norms.tensors.size(); ++i)
    decision.factors.push_back(decision.coefficients[groups.of(i)] / options.grad_scale);
  return decision;
}

}  // namespace gradclip
