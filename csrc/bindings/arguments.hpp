// Arguments other than the arrays: checked, with messages that say what was expected and what came.
#pragma once

#include <pybind11/pybind11.h>

#include "core/clip.hpp"
#include "core/norm.hpp"

namespace gradclip::bindings {

namespace py = pybind11;

// A real number: int, float, a NumPy scalar, a 0-d array. TypeError for anything else, bool and
// strings included.
double real_number(const py::object& value, const char* name);
// Positive, infinity allowed or not. ValueError if it is not.
double positive_number(const py::object& value, const char* name, bool may_be_infinite);

// What norms are clipped to: positive, or 0 where `epsilon` is positive. Infinity is allowed.
double threshold_number(const py::object& max_norm, double epsilon);
// The same; or, unless all share a group, a sequence of such numbers, one for each group.
Table<double> threshold_numbers(const py::object& max_norm, const Groups& groups,
                                std::size_t tensors, double epsilon);
double finite_number(const py::object& value, const char* name);
// Positive, and with a finite reciprocal.
double grad_scale_number(const py::object& grad_scale);
// A callable or None.
void check_reduce(const py::object& reduce);

NormOrder norm_order(const py::object& ord);
NonFinite nonfinite_policy(const py::object& policy);
Groups group_labels(const py::object& groups, std::size_t tensors);

}  // namespace gradclip::bindings
