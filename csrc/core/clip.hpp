// The decision of a clip: from the sums of tensors to what every tensor is multiplied by.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "core/coefficient.hpp"
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

struct ClipDecision {
  double total_norm = 0.0;  // over all groups
  Table<double> norms;      // of this process's tensors
  Table<double> group_norms;
  Table<double> coefficients;          // one per group
  std::vector<std::size_t> nonfinite;  // tensors that hold an infinity or a NaN
  bool nonfinite_norm = false;         // some norm is not finite
  enum Action { nothing, scale, zero } action = nothing;
  Table<double> factors;  // of every tensor: coefficient / grad_scale
  bool clipped = false;
};

inline Table<NormSum> sums_of_groups(const NormOrder& order, std::span<const NormSum> tensors,
                                     const Groups& groups) {
  if (groups.kind == Groups::tensor) return {tensors.begin(), tensors.end()};
  return group_sums(order, tensors, groups.label, groups.count(tensors.size()));
}

// `group` holds the sums over all processes if `reduced`, else those of `tensors`. `max_norms` has one
// threshold for each group, or one for all.
ClipDecision decide_clip(const NormOrder& order, std::span<const NormSum> tensors,
                         const Groups& groups, std::span<const NormSum> group, bool reduced,
                         std::span<const double> max_norms, double grad_scale, NonFinite policy,
                         double epsilon = 0.0);

}  // namespace gradclip
