// Arguments other than the arrays: checked, with messages that say what was expected and what came.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "bindings/gradients.hpp"
#include "core/clip.hpp"
#include "core/norm.hpp"

namespace gradclip::bindings {

namespace py = pybind11;

// A real number: int, float, a NumPy scalar, a 0-d array. TypeError for anything else, bool and
// strings included.
double real_number(const py::object& value, const char* name);
// Positive, infinity allowed or not. ValueError if it is not.
double positive_number(const py::object& value, const char* name, bool may_be_infinite);

double nonnegative_number(const py::object& value, const char* name);

// Groups, and what they are called: a tuple of names or None.
struct NamedGroups {
  Groups groups;
  py::object names = py::none();                   // or, of rows, a sequence that makes them
  std::shared_ptr<const RowTable> rows = nullptr;  // where rows have groups
};

bool is_mapping(const py::object& value);
// The values of a mapping in the order of the names that it is to have, each once.
py::list values_by_name(const py::object& mapping, const py::object& names, const char* argument,
                        const char* what);

// What groups are clipped to (max_norm: not negative, infinity allowed) or multiplied by (coefficients: finite):
// a number; or, unless all share a group, one for each, in a sequence or by the names of the groups. None
// leaves a group alone. Of rows, a sequence or a mapping by the names of the gradients has for each gradient a
// number, None or an array of one for each row; an array has all of them.
Table<double> limits_of_groups(const py::object& value, const NamedGroups& groups,
                               std::size_t tensors, bool are_coefficients);
double finite_number(const py::object& value, const char* name);
// Positive, and with a finite reciprocal.
double grad_scale_number(const py::object& grad_scale);
// A callable or None. One that says which `ord` it was made for must be for this one.
void check_reduce(const py::object& reduce, const NormOrder& order);

NormOrder norm_order(const py::object& ord);
NonFinite nonfinite_policy(const py::object& policy);
// How a clip decides. `formula`: the rounding, "nearest" or "down", or a float that is added to norms.
// `in_float64`: all that is measured is, also by other processes.
ClipOptions clip_options(const py::object& nonfinite, const py::object& formula, double grad_scale,
                         const NormOrder& order, bool in_float64);
// None, "tensor", "row", "sample", "unit", "unit_last"; or labels, of which equal ones share a group: integers or names, in a
// sequence or by the names of gradients.
NamedGroups group_labels(const py::object& groups, const Gradients& grads);
// How many elements each has, as an array.
py::object group_sizes(const NamedGroups& named, const Gradients& grads);

// What was measured is for gradients as they were: it has been used.
[[noreturn]] void refuse_second_use();

// How gradients are to be measured, and clipped, as it was given.
struct MeasureCall {
  const py::object &ord, &groups, &grad_scale, &reduce;

  template <class Reader>
  void recheck(const Gradients& grads, Reader&& reader) const {
    grads.recheck(reader, ord, groups, grad_scale);
  }
};
struct ClipCall {
  MeasureCall measure;
  const py::object &max_norm, &nonfinite, &formula;

  template <class Reader>
  void recheck(const Gradients& grads, Reader&& reader) const {
    grads.recheck(reader, max_norm, measure.ord, measure.groups, measure.grad_scale, nonfinite);
  }
};

// The methods "measure" and "clip" of a class: function(object, call, more ...), of which `more` have `names`.
template <class Class, class Result, class T, class... More, class... Names>
void def_measure(Class& type,
                 Result (*function)(const std::shared_ptr<T>&, const MeasureCall&, More...),
                 const Names&... names) {
  type.def(
      "measure",
      [function](const typename Class::type& self, const py::object& ord, const py::object& groups,
                 const py::object& grad_scale, const py::object& reduce, More... more) -> Result {
        return function(self.object, {ord, groups, grad_scale, reduce}, more...);
      },
      py::arg("ord"), py::arg("groups"), py::arg("grad_scale"), py::arg("reduce"), names...);
}
template <class Class, class Result, class T, class... More, class... Names>
void def_clip(Class& type, Result (*function)(const std::shared_ptr<T>&, const ClipCall&, More...),
              const Names&... names) {
  type.def(
      "clip",
      [function](const typename Class::type& self, const py::object& max_norm,
                 const py::object& ord, const py::object& groups, const py::object& grad_scale,
                 const py::object& nonfinite, const py::object& reduce, const py::object& formula,
                 More... more) -> Result {
        return function(self.object,
                        {{ord, groups, grad_scale, reduce}, max_norm, nonfinite, formula}, more...);
      },
      py::arg("max_norm"), py::arg("ord"), py::arg("groups"), py::arg("grad_scale"),
      py::arg("nonfinite"), py::arg("reduce"), py::arg("formula"), names...);
}

// What says how gradients are measured.
struct MeasureArguments {
  NormOrder order;
  NamedGroups groups;
  double grad_scale;
  py::object reduce;

  MeasureArguments(const Gradients& grads, const MeasureCall& call)
      : order(norm_order(call.ord)),
        groups(group_labels(call.groups, grads)),
        grad_scale(grad_scale_number(call.grad_scale)),
        reduce(call.reduce) {
    check_reduce(reduce, order);
  }
};

}  // namespace gradclip::bindings
