#include "core/clip.hpp"

#include <utility>

namespace gradclip {

RowSums sums_of_rows(const NormOrder& order, Table<NormSum>&& rows,
                     std::span<const std::size_t> first_row, const Groups& groups) {
  RowSums sums;
  std::vector<std::size_t> sample;  // of every row
  if (groups.kind == Groups::sample) sample.reserve(rows.size());
  for (std::size_t i = 0; i + 1 < first_row.size(); ++i) {
    const std::size_t count = first_row[i + 1] - first_row[i];
    sums.tensors.push_back(
        group_sums(order, std::span(rows).subspan(first_row[i], count), {}, 1)[0]);
    for (std::size_t r = 0; r < count && groups.kind == Groups::sample; ++r) sample.push_back(r);
  }
  sums.groups =
      groups.kind == Groups::row ? std::move(rows) : group_sums(order, rows, sample, groups.used);
  return sums;
}

Norms norms_of(const NormOrder& order, std::span<const NormSum> tensors, const Groups& groups,
               std::span<const NormSum> group, double grad_scale, Table<double>&& known) {
  const auto unscaled = [&](const NormSum& sum) { return norm_of(order, sum, grad_scale); };
  Norms norms;
  norms.tensors.reserve(tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    norms.tensors.push_back(unscaled(tensors[i]));
    if (!is_finite(tensors[i].value) || !is_finite(tensors[i].unit)) norms.odd.push_back(i);
  }
  norms.groups = std::move(known);
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
  if (groups.are_of_rows()) return decision;
  decision.factors.reserve(norms.tensors.size());
  for (std::size_t i = 0; i < norms.tensors.size(); ++i)
    decision.factors.push_back(decision.coefficients[groups.of(i)] / options.grad_scale);
  return decision;
}

PartsDecision decide_parts(const NormOrder& order, Table<NormSum>&& sums,
                           std::span<const std::size_t> first_part, const Groups& groups,
                           std::span<const double> limits, const ClipOptions& options) {
  PartsDecision result;
  const std::size_t tensors = first_part.size() - 1, parts = first_part.back();
  bool are_whole = parts == tensors;
  for (std::size_t i = 0; i < tensors; ++i) are_whole = are_whole && first_part[i] == i;
  if (groups.are_of_rows()) {
    const RowSums of_rows = sums_of_rows(order, std::move(sums), first_part, groups);
    result.norms = norms_of(order, of_rows.tensors, groups, of_rows.groups, options.grad_scale);
  } else {
    Table<NormSum> of_tensors = std::move(sums);
    if (!are_whole)
      of_tensors = sums_of_rows(order, std::move(of_tensors), first_part, {Groups::row}).tensors;
    result.norms = norms_of(order, of_tensors, groups, sums_of_groups(order, of_tensors, groups),
                            options.grad_scale);
  }
  result.clip = decide_clip(result.norms, groups, limits, options);
  const bool scales = result.clip.action == Action::scale;
  result.factors.assign(parts, result.clip.action == Action::zero ? kSetToZero : 1.0);
  for (std::size_t i = 0; i < tensors && scales; ++i) {
    for (std::size_t part = first_part[i]; part < first_part[i + 1]; ++part) {
      const std::size_t group = groups.kind == Groups::row      ? part
                                : groups.kind == Groups::sample ? part - first_part[i]
                                                                : groups.of(i);
      // + 0: a threshold of -0 is one of 0.
      result.factors[part] = result.clip.coefficients[group] / options.grad_scale + 0.0;
    }
  }
  return result;
}

}  // namespace gradclip
