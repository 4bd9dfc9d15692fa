// Classes whose objects are made here alone. pybind11 gives one that was made by __new__, without __init__,
// memory that nobody has written to.
#pragma once

#include <pybind11/pybind11.h>

namespace gradclip::bindings {

inline void close_class(pybind11::handle type) {
  reinterpret_cast<PyTypeObject*>(type.ptr())->tp_new = [](PyTypeObject* refused, PyObject*,
                                                           PyObject*) -> PyObject* {
    PyErr_Format(PyExc_TypeError,
                 "%s: expected an object that gradclip makes, got a call of its class",
                 refused->tp_name);
    return nullptr;
  };
}

}  // namespace gradclip::bindings
