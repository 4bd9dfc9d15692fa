// Types of packages that the user may or may not have imported. gradclip never imports them.
#pragma once

#include <pybind11/pybind11.h>

namespace gradclip::bindings {

// An attribute of a module that somebody has imported; None if nobody has.
inline pybind11::object imported(const char* module, const char* attribute) {
  PyObject* const modules = PyImport_GetModuleDict();  // borrowed
  PyObject* const found = PyDict_GetItemString(modules, module);
  if (!found || found == Py_None) return pybind11::none();
  return pybind11::getattr(found, attribute, pybind11::none());
}

}  // namespace gradclip::bindings
