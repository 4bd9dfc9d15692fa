#include "bindings/arguments.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include "cpu/float_environment.hpp"

namespace gradclip::bindings {
namespace {

std::string repr(const py::object& value) { return py::repr(value).cast<std::string>(); }

std::string type_name(const py::object& value) { return Py_TYPE(value.ptr())->tp_name; }

// Whether float(value) would be meant: it also accepts strings, and drops imaginary parts.
bool is_real_scalar(const py::object& value) {
  PyObject* const object = value.ptr();
  if (PyFloat_Check(object)) return true;
  if (PyBool_Check(object) || PyUnicode_Check(object) || PyBytes_Check(object)) return false;
  if (PyLong_Check(object)) return true;
  if (PyComplex_Check(object) || !py::hasattr(value, "__float__")) return false;
  if (py::hasattr(value, "ndim") && value.attr("ndim").cast<int>() != 0) return false;
  const py::object dtype = py::getattr(value, "dtype", py::none());
  const py::object kind = py::getattr(dtype, "kind", py::none());
  if (kind.is_none()) return true;
  // 'V' is bfloat16 of ml_dtypes.
  return std::string("fiuV").find(kind.cast<std::string>()) != std::string::npos;
}

}  // namespace

double real_number(const py::object& value, const char* name) {
  if (!is_real_scalar(value))
    throw py::type_error(std::string(name) + ": expected a real number, got " + type_name(value));
  const double number = PyFloat_AsDouble(value.ptr());
  if (number == -1.0 && PyErr_Occurred()) {
    const bool too_large = PyErr_ExceptionMatches(PyExc_OverflowError);
    if (!too_large && !PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
    PyErr_Clear();
    if (too_large)
      throw py::value_error(std::string(name) +
                            ": expected a number within float64, got a larger one");
    throw py::type_error(std::string(name) + ": expected a real number, got " + type_name(value));
  }
  return number;
}

double positive_number(const py::object& value, const char* name, bool may_be_infinite) {
  const double number = real_number(value, name);
  const cpu::DefaultFloatEnvironment environment;  // in which subnormal numbers are positive
  if (!(number > 0.0) || (!may_be_infinite && std::isinf(number)))
    throw py::value_error(std::string(name) + ": expected a positive" +
                          (may_be_infinite ? "" : " finite") + " number, got " + repr(value));
  return number;
}

namespace {

bool is_sequence_of_numbers(const py::object& value) {
  if (PyList_Check(value.ptr()) || PyTuple_Check(value.ptr())) return true;
  return py::hasattr(value, "ndim") && value.attr("ndim").cast<int>() == 1;
}

}  // namespace

double threshold_number(const py::object& max_norm, double epsilon) {
  if (epsilon == 0.0) return positive_number(max_norm, "max_norm", true);
  const double number = real_number(max_norm, "max_norm");
  if (!is_threshold(number, epsilon))
    throw py::value_error("max_norm: expected a number that is not negative, got " +
                          repr(max_norm));
  return number;
}

Table<double> threshold_numbers(const py::object& max_norm, const Groups& groups,
                                std::size_t tensors, double epsilon) {
  if (groups.kind == Groups::all || !is_sequence_of_numbers(max_norm))
    return {threshold_number(max_norm, epsilon)};
  const auto values = py::reinterpret_steal<py::object>(PySequence_List(max_norm.ptr()));
  if (!values) throw py::error_already_set();
  const auto count = static_cast<std::size_t>(PyList_GET_SIZE(values.ptr()));
  if (count != groups.count(tensors))
    throw py::value_error("max_norm: expected a number or one for each of the " +
                          std::to_string(groups.count(tensors)) + " groups, got " +
                          std::to_string(count));
  Table<double> numbers;
  for (std::size_t g = 0; g < count; ++g) {
    const std::string name = "max_norm[" + std::to_string(g) + "]";
    PyObject* const value = PyList_GET_ITEM(values.ptr(), static_cast<Py_ssize_t>(g));
    numbers.push_back(
        positive_number(py::reinterpret_borrow<py::object>(value), name.c_str(), true));
  }
  return numbers;
}

double finite_number(const py::object& value, const char* name) {
  const double number = real_number(value, name);
  if (!is_finite(number))
    throw py::value_error(std::string(name) + ": expected a finite number, got " + repr(value));
  return number;
}

double grad_scale_number(const py::object& grad_scale) {
  const double scale = positive_number(grad_scale, "grad_scale", false);
  if (!is_finite(1.0 / scale))
    throw py::value_error("grad_scale: expected a number whose reciprocal is finite, got " +
                          repr(grad_scale));
  return scale;
}

void check_reduce(const py::object& reduce) {
  if (!reduce.is_none() && !PyCallable_Check(reduce.ptr()))
    throw py::type_error("reduce: expected a callable or None, got " + type_name(reduce));
}

NormOrder norm_order(const py::object& ord) {
  const double p = positive_number(ord, "ord", true);
  if (p == 2.0) return {NormOrder::two, p};
  if (p == 1.0) return {NormOrder::one, p};
  if (std::isinf(p)) return {NormOrder::infinity, p};
  return {NormOrder::other, p};
}

NonFinite nonfinite_policy(const py::object& policy) {
  if (PyUnicode_Check(policy.ptr())) {
    const auto text = policy.cast<std::string>();
    if (text == "raise") return NonFinite::raise;
    if (text == "skip") return NonFinite::skip;
    if (text == "zero") return NonFinite::zero;
    if (text == "propagate") return NonFinite::propagate;
    throw py::value_error("nonfinite: expected 'raise', 'skip', 'zero' or 'propagate', got " +
                          repr(policy));
  }
  throw py::type_error("nonfinite: expected 'raise', 'skip', 'zero' or 'propagate', got " +
                       type_name(policy));
}

Groups group_labels(const py::object& groups, std::size_t tensors) {
  if (groups.is_none()) return {};
  if (PyUnicode_Check(groups.ptr())) {
    if (groups.cast<std::string>() == "tensor") return {Groups::tensor};
    throw py::value_error("groups: expected None, 'tensor' or one label per gradient, got " +
                          repr(groups));
  }
  if (PyBytes_Check(groups.ptr()) || !PySequence_Check(groups.ptr()))
    throw py::type_error("groups: expected None, 'tensor' or a sequence of labels, got " +
                         type_name(groups));
  if (py::hasattr(groups, "ndim") && groups.attr("ndim").cast<int>() != 1)
    throw py::value_error("groups: expected labels in one dimension, got " +
                          py::str(groups.attr("ndim")).cast<std::string>());
  const auto labels = py::reinterpret_steal<py::object>(PySequence_List(groups.ptr()));
  if (!labels) throw py::error_already_set();
  const auto count = static_cast<std::size_t>(PyList_GET_SIZE(labels.ptr()));
  if (count != tensors)
    throw py::value_error("groups: expected one label for each of the " + std::to_string(tensors) +
                          " gradients, got " + std::to_string(count) + " labels");
  Groups result{Groups::labels};
  result.label.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    const auto label = py::reinterpret_borrow<py::object>(
        PyList_GET_ITEM(labels.ptr(), static_cast<Py_ssize_t>(i)));
    const std::string name = "groups[" + std::to_string(i) + "]";
    if (PyBool_Check(label.ptr()) || !PyIndex_Check(label.ptr()))
      throw py::type_error(name + ": expected an integer label, got " + type_name(label));
    const Py_ssize_t value = PyNumber_AsSsize_t(label.ptr(), nullptr);  // clips what is too large
    if (value == -1 && PyErr_Occurred()) {
      if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
      PyErr_Clear();
      throw py::type_error(name + ": expected an integer label, got " + type_name(label));
    }
    if (value < 0 || static_cast<std::size_t>(value) >= tensors)
      throw py::value_error(name + ": expected a label from 0 to " + std::to_string(tensors - 1) +
                            ", got " + repr(label));
    result.label.push_back(static_cast<std::size_t>(value));
    result.labels_used = std::max(result.labels_used, result.label.back() + 1);
  }
  return result;
}

}  // namespace gradclip::bindings
