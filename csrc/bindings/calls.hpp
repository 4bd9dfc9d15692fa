// The calls of the module over gradients that have been read. What they return is described in
// python/gradclip/_core.pyi.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "bindings/gradients.hpp"

namespace gradclip::bindings {

py::object tensor_norms(const Gradients& grads, const py::object& ord);
double global_norm(const Gradients& grads, const py::object& ord);
py::object clip(const Gradients& grads, const py::object& max_norm, const py::object& ord,
                const py::object& groups, const py::object& grad_scale, const py::object& nonfinite,
                const py::object& reduce, double epsilon);
// By a norm that has been measured. `epsilon` is added to it.
void clip_with_norm(const Gradients& grads, double norm, const py::object& max_norm,
                    double epsilon);
// The limit is rounded to the type of each tensor: to nearest or towards zero.
py::object clip_by_value(const Gradients& grads, const py::object& limit, bool to_nearest);
void scale(const Gradients& grads, const py::object& factor);

// Seconds that this machine needs to read, or to read and write, the same memory.
double probe_read(const Gradients& grads);
double probe_read_write(const Gradients& grads);

}  // namespace gradclip::bindings
