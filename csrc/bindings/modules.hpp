// Attributes of objects and of packages that the user may or may not have. gradclip imports none of them.
#pragma once

#include <pybind11/pybind11.h>

namespace gradclip::bindings {

// An attribute, or null without it. What its own code raises (pybind11's hasattr and getattr swallow
// that, Ctrl-C included) goes on.
inline pybind11::object find_attribute(pybind11::handle object, const char* name) {
  PyObject* const value = PyObject_GetAttrString(object.ptr(), name);
  if (!value) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw pybind11::error_already_set();
    PyErr_Clear();
  }
  return pybind11::reinterpret_steal<pybind11::object>(value);
}

// An attribute of a module that somebody has imported; None if nobody has.
inline pybind11::object imported(const char* module, const char* attribute) {
  PyObject* const modules = PyImport_GetModuleDict();  // borrowed
  PyObject* const found = PyDict_GetItemString(modules, module);
  if (!found || found == Py_None) return pybind11::none();
  pybind11::object value = find_attribute(found, attribute);
  return value ? value : pybind11::none();
}

}  // namespace gradclip::bindings
