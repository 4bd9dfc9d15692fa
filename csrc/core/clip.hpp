// What was measured of a list of gradients, and what a clip decides from that.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "core/decide.hpp"
#include "core/norm.hpp"

namespace gradclip {

// Which tensors share a norm: one group of all, each tensor its own, or by label.
struct Groups {
  enum Kind { all, tensor, labels };
  Kind kind = all;
  std::vector<std::size_t> label = {};  // of every tensor, for `labels`
  std::size_t labels_used = 0;          // largest label + 1

  std::size_t count(std::size_t tensors) const {
    return kind == all ? 1 : kind == tensor ? tensors : labels_used;
  }
  std::size_t of(std::size_t i) const { return kind == all ? 0 : kind == tensor ? i : label[i]; }
};

inline Table<NormSum> sums_of_groups(const NormOrder& order, std::span<const NormSum> tensors,
                                     const Groups& groups) {
  if (groups.kind == Groups::tensor) return {tensors.begin(), tensors.end()};
  return group_sums(order, tensors, groups.label, groups.count(tensors.size()));
}

// Norms are divided by the scale of the gradients.
struct Norms {
  double total = 0.0;            // over all groups
  Table<double> tensors;         // of this process
  Table<double> groups;          // over all processes
  std::vector<std::size_t> odd;  // tensors whose sum is infinite or NaN
};

// `group`: the sums of groups of these tensors.
Norms norms_of(const NormOrder& order, std::span<const NormSum> tensors, const Groups& groups,
               std::span<const NormSum> group, double grad_scale);
// Instead of this process's, the sums of groups over all processes.
void take_sums(Norms& norms, const NormOrder& order, std::span<const NormSum> group,
               double grad_scale);

struct ClipDecision {
  Table<double> coefficients;  // one per group
  bool any_nonfinite = false;  // whether some norm is not finite
  bool clipped = false;
  Action action = Action::nothing;
  Table<double> factors;  // of every tensor, to `scale`: coefficient / grad_scale
};

// `limits` are thresholds or coefficients, one for each group, or one for all.
ClipDecision decide_clip(const Norms& norms, const Groups& groups, std::span<const double> limits,
                         const ClipOptions& options);

}  // namespace gradclip
