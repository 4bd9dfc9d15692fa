// The work of an engine, and objects of what it gives.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "bindings/gil.hpp"
#include "core/table.hpp"
#include "cpu/float_environment.hpp"

namespace gradclip::bindings {

namespace py = pybind11;

// The engine's work: in the default floating-point environment whatever the caller's is, and, on more than a
// few bytes, without the GIL. (To get it back takes longer than little work does: 5 ms where another thread computes.)
// What is decided between two passes keeps the GIL. No code of the user's runs in either.
inline constexpr std::int64_t kBytesWithGil = std::int64_t{32} << 10;
template <class Work>
auto decide(Work work) {
  const cpu::DefaultFloatEnvironment environment;
  return work();
}
template <class Work>
auto run(std::int64_t bytes, Work work) {
  if (bytes <= kBytesWithGil) return decide(work);
  const GilRelease release;
  return decide(work);
}

// A new reference, or the exception that was set: a lack of memory is a MemoryError, which pybind11's own
// constructors make a RuntimeError of.
inline py::object checked(PyObject* made) {
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

inline py::object to_float(double value) { return checked(PyFloat_FromDouble(value)); }
inline py::object to_index(std::size_t value) { return checked(PyLong_FromSize_t(value)); }
template <class Number>
py::object to_array(const Table<Number>& values) {
  // Not by pybind11, which allocates a shape and strides, and does not look whether a copy could be made.
  const auto& api = py::detail::npy_api::get();
  py::dtype dtype = py::dtype::of<Number>();
  const auto size = static_cast<Py_intptr_t>(values.size());
  py::object array = checked(api.PyArray_NewFromDescr_(api.PyArray_Type_, dtype.release().ptr(), 1,
                                                       &size, nullptr, nullptr, 0, nullptr));
  if (size != 0)
    std::memcpy(py::detail::array_proxy(array.ptr())->data, values.data(),
                values.size() * sizeof(Number));
  return array;
}

inline py::object to_tuple(const std::vector<std::size_t>& values) {
  py::object result = checked(PyTuple_New(static_cast<py::ssize_t>(values.size())));
  for (std::size_t i = 0; i < values.size(); ++i)
    PyTuple_SET_ITEM(result.ptr(), static_cast<py::ssize_t>(i),
                     to_index(values[i]).release().ptr());
  return result;
}

// Gradients by their names, or by their positions where `names` is None.
inline py::object to_named(const std::vector<std::size_t>& indices, const py::object& names) {
  if (names.is_none()) return to_tuple(indices);
  py::object result = checked(PyTuple_New(static_cast<py::ssize_t>(indices.size())));
  for (std::size_t i = 0; i < indices.size(); ++i)
    PyTuple_SET_ITEM(result.ptr(), static_cast<py::ssize_t>(i),
                     Py_NewRef(PyTuple_GET_ITEM(names.ptr(), indices[i])));
  return result;
}

}  // namespace gradclip::bindings
