// Measure, decide, apply: what was measured of gradients on the CPU, and the way from there to memory.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

#include "bindings/arguments.hpp"
#include "bindings/gradients.hpp"
#include "bindings/pair.hpp"
#include "core/clip.hpp"
#include "cpu/engine.hpp"

namespace gradclip::bindings {

using WordArray = py::array_t<std::int64_t, py::array::c_style>;

// A tensor that holds elements which are not finite.
struct NonFiniteEntry {
  std::size_t tensor;
  cpu::NonFiniteCounts elements;
};

// A gradclip.ClipResult (group_norms: None where all gradients are one group): made before anything is written, so that nothing can fail after.
py::object make_result(double total, const Table<double>& norms, const py::object& coefficient,
                       bool clipped, const std::vector<std::size_t>& nonfinite,
                       const Gradients& grads, const py::object& group_norms,
                       const py::object& group_names, double penalty = 0.0);

class Measured {
 public:
  // In one pass. Calls `reduce`, unless it is None, with the sums of the groups. `pair`, here and below: what is
  // measured and written is made of the gradients and what it has beside them.
  Measured(std::shared_ptr<const Gradients> grads, const MeasureArguments& arguments,
           std::shared_ptr<const Pair> pair);
  // What accumulators become, in one pass: written, and measured as they are then. Calls `reduce` as above.
  Measured(const Pair& accumulation, const py::object& reduce);
  // As somebody has measured: all gradients together have this norm. Those of tensors are not known.
  Measured(std::shared_ptr<const Gradients> grads, double norm);

  // Of shards: this process's part of every gradient. Its sums are words, which all processes that have a part add
  // as integers (for the maximum norm: of which they take the greatest), and `join_words` takes. `is_wide`: the places of
  // any sum, not of 16 and 32 bits alone. `sums`: what somebody else has measured; or None.
  static Measured of_shards(const std::shared_ptr<const Gradients>& grads, const MeasureCall& call,
                            bool is_wide, const py::object& sums);
  const Table<std::int64_t>& sum_words() const { return words_; }
  // This process's elements of every gradient that are NaN, and that are infinite, in turns.
  Table<std::int64_t> nonfinite_counts() const;
  void join_words(const WordArray& words, const WordArray& counts);

  // All arguments are checked before anything is measured.
  static Measured measure(std::shared_ptr<const Gradients> grads, std::shared_ptr<const Pair> pair,
                          const MeasureCall& call);
  static py::object clip(std::shared_ptr<const Gradients> grads, std::shared_ptr<const Pair> pair,
                         const ClipCall& call);

  // Once: what is in memory afterwards was not measured.
  py::object clip_measured(const py::object& max_norm, const py::object& nonfinite,
                           const py::object& formula);
  py::object scale_measured(const py::object& coefficients, const py::object& nonfinite);

  const Gradients& gradients() const { return *grads_; }
  const Norms& norms() const { return norms_; }
  const py::object& group_names() const { return named_.names; }
  py::object group_sizes() const { return bindings::group_sizes(named_, *grads_); }
  double penalty() const { return penalty_; }
  bool is_global() const { return named_.groups.kind == Groups::all; }
  // Tensors with elements that are not finite.
  std::vector<std::size_t> nonfinite() const;
  // This process's, as `reduce` gets them; none of rows without one.
  Table<double> group_sums() const;

 private:
  Measured() = default;
  const WordGrid& grid() const { return is_wide_ ? kWideGrid : kNarrowGrid; }
  std::size_t words_of_one() const {
    return order_.kind == NormOrder::infinity ? 1 : grid().words();
  }
  void require_unchanged() const;
  void require_first_use() const;
  void join(const py::object& reduce);
  void measure_pair(Table<NormSum>& sums);
  void write(const ClipDecision& decision, const ClipOptions& options) const;
  py::object apply(const Table<double>& limits, const ClipOptions& options);

  std::shared_ptr<const Gradients> grads_;
  std::shared_ptr<const Pair> pair_;  // null: there is none
  std::shared_ptr<const PairTable> pairs_;
  double penalty_ = 0.0;
  NormOrder order_;
  NamedGroups named_;
  double grad_scale_ = 1.0;
  bool is_alone_ = false;  // no other process has measured, nor somebody else
  bool is_wide_ = false;
  Table<NormSum> sums_;        // of this process's groups
  Table<std::int64_t> words_;  // of its shards
  Norms norms_;
  std::vector<NonFiniteEntry> nonfinite_;
  bool is_used_ = false;
};

}  // namespace gradclip::bindings
