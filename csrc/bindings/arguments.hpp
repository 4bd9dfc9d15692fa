// Arguments other than the arrays: checked, with messages that say what was expected and what came.
#pragma once

#include <pybind11/pybind11.h>

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
  py::object names = py::none();
};

// What norms are clipped to, not negative, infinity allowed: a number; or, unless all share a group, one for
// each group, in a sequence or by the names of the groups. None leaves a group alone.
Table<double> threshold_numbers(const py::object& max_norm, const NamedGroups& groups,
                                std::size_t tensors);
double finite_number(const py::object& value, const char* name);
// Positive, and with a finite reciprocal.
double grad_scale_number(const py::object& grad_scale);
// A callable or None. One that says which `ord` it was made for must be for this one.
void check_reduce(const py::object& reduce, const NormOrder& order);

NormOrder norm_order(const py::object& ord);
NonFinite nonfinite_policy(const py::object& policy);
// Labels, of which equal ones share a group: integers or names, in a sequence or by the names of gradients.
NamedGroups group_labels(const py::object& groups, const Gradients& grads);

}  // namespace gradclip::bindings
