#include "bindings/text.hpp"

namespace gradclip::bindings {
namespace {

// What an exception in the object's own code leaves to say. Ctrl-C and a lack of memory go on.
std::string unprintable(py::handle object) {
  if (!PyErr_ExceptionMatches(PyExc_Exception) || PyErr_ExceptionMatches(PyExc_MemoryError))
    throw py::error_already_set();
  PyErr_Clear();
  return "<an unprintable " + std::string(Py_TYPE(object.ptr())->tp_name) + ">";
}

// `text` is a new reference to a str, or null with an exception.
std::string encoded(PyObject* text, py::handle object) {
  const auto owned = py::reinterpret_steal<py::object>(text);
  const auto bytes = py::reinterpret_steal<py::object>(
      text ? PyUnicode_AsEncodedString(text, "utf-8", "backslashreplace") : nullptr);
  if (!bytes) return unprintable(object);
  return {PyBytes_AS_STRING(bytes.ptr()), static_cast<std::size_t>(PyBytes_GET_SIZE(bytes.ptr()))};
}

}  // namespace

std::string str_text(py::handle object) { return encoded(PyObject_Str(object.ptr()), object); }
std::string repr_text(py::handle object) { return encoded(PyObject_Repr(object.ptr()), object); }

std::string full_type_name(py::handle object) {
  const auto type = py::reinterpret_borrow<py::object>(py::type::handle_of(object));
  const auto part = [&](const char* name) -> py::object {
    PyObject* const value = PyObject_GetAttrString(type.ptr(), name);
    if (!value) PyErr_Clear();
    auto owned = py::reinterpret_steal<py::object>(value);
    return owned && PyUnicode_Check(owned.ptr()) ? owned : py::object();
  };
  const py::object module = part("__module__"), name = part("__qualname__");
  const std::string own = name ? str_text(name) : std::string(Py_TYPE(object.ptr())->tp_name);
  return module ? str_text(module) + "." + own : own;
}

}  // namespace gradclip::bindings
