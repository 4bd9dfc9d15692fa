// The calls of the module over gradients that have been read. What they return is described in
// python/gradclip/_core.pyi.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "bindings/gradients.hpp"

namespace gradclip::bindings {

py::object tensor_norms(const Gradients& grads, const py::object& ord);
// A list of arrays, of the norms of the rows of each gradient.
py::object row_norms(const Gradients& grads, const py::object& ord);
double global_norm(const Gradients& grads, const py::object& ord);
// The limit is rounded to the type of each tensor: to nearest or towards zero.
py::object clip_by_value(const Gradients& grads, const py::object& limit, bool to_nearest);
void scale(const Gradients& grads, const py::object& factor);

// Seconds that this machine needs to read, or to read and write, the same memory.
double probe_read(const Gradients& grads);
double probe_read_write(const Gradients& grads);

}  // namespace gradclip::bindings
