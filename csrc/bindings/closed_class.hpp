// Classes whose objects are made here alone. pybind11 gives one that was made by __new__, without __init__,
// memory that nobody has written to.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <type_traits>
#include <utility>

namespace gradclip::bindings {

// What objects of such a class hold where others need it, too. (With a shared_ptr of its own, pybind11 frees
// the memory twice where it lacks some for its tables.)
template <class T>
struct Shared {
  std::shared_ptr<T> object;
};

// A function of what is held, as a method.
template <class Result, class T, class... Arguments>
auto method(Result (*function)(T&, Arguments...)) {
  return [function](const Shared<std::remove_const_t<T>>& self, Arguments... arguments) -> Result {
    return function(*self.object, std::forward<Arguments>(arguments)...);
  };
}
template <class Result, class T, class... Arguments>
auto method(Result (*function)(const std::shared_ptr<T>&, Arguments...)) {
  return [function](const Shared<std::remove_const_t<T>>& self, Arguments... arguments) -> Result {
    return function(self.object, std::forward<Arguments>(arguments)...);
  };
}
template <class Result, class T, class... Arguments>
auto method(Result (T::*function)(Arguments...)) {
  return [function](const Shared<T>& self, Arguments... arguments) -> Result {
    return (*self.object.*function)(std::forward<Arguments>(arguments)...);
  };
}
template <class Result, class T, class... Arguments>
auto method(Result (T::*function)(Arguments...) const) {
  return [function](const Shared<T>& self, Arguments... arguments) -> Result {
    return (*self.object.*function)(std::forward<Arguments>(arguments)...);
  };
}

inline void close_class(pybind11::handle type) {
  auto* const class_object = reinterpret_cast<PyTypeObject*>(type.ptr());
  class_object->tp_new = [](PyTypeObject* refused, PyObject*, PyObject*) -> PyObject* {
    PyErr_Format(PyExc_TypeError,
                 "%s: expected an object that gradclip makes, got a call of its class",
                 refused->tp_name);
    return nullptr;
  };
  // Called by pybind11 alone, which does not look whether there was memory.
  class_object->tp_alloc = [](PyTypeObject* made, Py_ssize_t items) -> PyObject* {
    PyObject* const object = PyType_GenericAlloc(made, items);
    if (!object) throw pybind11::error_already_set();
    return object;
  };
}

}  // namespace gradclip::bindings
