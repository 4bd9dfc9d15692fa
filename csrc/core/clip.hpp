// What was measured of a list of gradients, and what a clip decides from that.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "core/decide.hpp"
#include "core/norm.hpp"

namespace gradclip {

// What shares a norm: all tensors, each its own, by label; each row its own, or row i of all tensors.
struct Groups {
  enum Kind { all, tensor, labels, row, sample };
  Kind kind = all;
  std::vector<std::size_t> label = {};  // of every tensor, for `labels`
  std::size_t used = 0;                 // largest label + 1; the number of rows, of samples

  std::size_t count(std::size_t tensors) const {
    return kind == all ? 1 : kind == tensor ? tensors : used;
  }
  bool are_of_rows() const { return kind == row || kind == sample; }
  // Of a tensor; where not tensors but rows have groups, of nothing.
  std::size_t of(std::size_t i) const { return kind == all ? 0 : kind == tensor ? i : label[i]; }
};

inline Table<NormSum> sums_of_groups(const NormOrder& order, std::span<const NormSum> tensors,
                                     const Groups& groups) {
  if (groups.kind == Groups::tensor) return {tensors.begin(), tensors.end()};
  return group_sums(order, tensors, groups.label, groups.count(tensors.size()));
}

// The sums of a list of which rows have groups: of groups, and of tensors, each the group of its rows.
struct RowSums {
  Table<NormSum> tensors, groups;
};
RowSums sums_of_rows(const NormOrder& order, Table<NormSum>&& rows,
                     std::span<const std::size_t> first_row, const Groups& groups);

// Norms are divided by the scale of the gradients.
struct Norms {
  double total = 0.0;            // over all groups
  Table<double> tensors;         // of this process
  Table<double> groups;          // over all processes
  std::vector<std::size_t> odd;  // tensors whose sum is infinite or NaN
};

// `group`: the sums of groups of these tensors; none where their norms are known already.
Norms norms_of(const NormOrder& order, std::span<const NormSum> tensors, const Groups& groups,
               std::span<const NormSum> group, double grad_scale, Table<double>&& known = {});
// Instead of this process's, the sums of groups over all processes.
void take_sums(Norms& norms, const NormOrder& order, std::span<const NormSum> group,
               double grad_scale);

struct ClipDecision {
  Table<double> coefficients;  // one per group
  bool any_nonfinite = false;  // whether some norm is not finite
  bool clipped = false;
  Action action = Action::nothing;
  Table<double>
      factors;  // of every tensor, to `scale`: coefficient / grad_scale; none where rows have groups
};

// `limits` are thresholds or coefficients, one for each group, or one for all.
ClipDecision decide_clip(const Norms& norms, const Groups& groups, std::span<const double> limits,
                         const ClipOptions& options);

// Measured parts that are multiplied one by one: gradients, or their rows.
struct PartsDecision {
  Norms norms;
  ClipDecision clip;
  Table<double> factors;  // of every part; kSetToZero among them
};
// Part r of gradient i is number first_part[i] + r.
PartsDecision decide_parts(const NormOrder& order, Table<NormSum>&& sums,
                           std::span<const std::size_t> first_part, const Groups& groups,
                           std::span<const double> limits, const ClipOptions& options);

}  // namespace gradclip
