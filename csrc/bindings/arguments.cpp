#include "bindings/arguments.hpp"

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

#include "bindings/convert.hpp"
#include "bindings/modules.hpp"
#include "bindings/text.hpp"
#include "cpu/float_environment.hpp"

namespace gradclip::bindings {
namespace {

std::string type_name(const py::object& value) { return Py_TYPE(value.ptr())->tp_name; }

// The number of axes of an array; none of what says nothing of any.
std::optional<long> find_axes(const py::object& value) {
  const py::object axes = find_attribute(value, "ndim");
  if (!axes || !PyLong_Check(axes.ptr())) return std::nullopt;
  return PyLong_AsLong(axes.ptr());
}

// Whether float(value) would be meant: it also accepts strings, and drops imaginary parts.
bool is_real_scalar(const py::object& value) {
  PyObject* const object = value.ptr();
  if (PyFloat_Check(object)) return true;
  if (PyBool_Check(object) || PyUnicode_Check(object) || PyBytes_Check(object)) return false;
  if (PyLong_Check(object)) return true;
  if (PyComplex_Check(object) || !find_attribute(value, "__float__")) return false;
  if (const auto axes = find_axes(value); axes && *axes != 0) return false;
  const py::object dtype = find_attribute(value, "dtype");
  const py::object kind = dtype ? find_attribute(dtype, "kind") : py::object();
  if (!kind) return true;
  // 'V' is bfloat16 of ml_dtypes.
  return std::string("fiuV").find(str_text(kind)) != std::string::npos;
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
                          (may_be_infinite ? "" : " finite") + " number, got " + repr_text(value));
  return number;
}

double nonnegative_number(const py::object& value, const char* name) {
  const double number = real_number(value, name);
  const cpu::DefaultFloatEnvironment environment;
  if (!is_usable({}, number))
    throw py::value_error(std::string(name) + ": expected a number that is not negative, got " +
                          repr_text(value));
  return number;
}

namespace {

bool is_sequence_of_numbers(const py::object& value) {
  if (PyList_Check(value.ptr()) || PyTuple_Check(value.ptr())) return true;
  return find_axes(value) == 1;
}

}  // namespace

bool is_mapping(const py::object& value) {
  if (PyDict_Check(value.ptr())) return true;
  if (PyFloat_Check(value.ptr()) || PyLong_Check(value.ptr()) || PyList_Check(value.ptr()))
    return false;  // at once
  return py::isinstance(value, py::module_::import("collections.abc").attr("Mapping"));
}

py::list values_by_name(const py::object& mapping, const py::object& names, const char* argument,
                        const char* what) {
  const std::string name(argument);
  if (names.is_none())
    throw py::type_error(name + ": expected a sequence, since the " + what +
                         " of this call have no names, got a mapping");
  py::list values;
  for (const py::handle key : names) {
    if (!mapping.contains(key))
      throw py::value_error(name + ": expected an entry for each of the " + what +
                            ", got none for " + repr_text(key));
    values.append(mapping[key]);
  }
  if (py::len(mapping) != values.size()) {
    for (const py::handle key : mapping)
      if (!names.contains(key))
        throw py::value_error(name + ": expected the names of " + what + ", got " + repr_text(key));
  }
  return values;
}

namespace {

// A limit or more of rows: a number, None, or so many of an array. Appended to `limits`.
void add_limits_of_rows(const py::object& value, std::size_t rows, const std::string& name,
                        bool are_coefficients, Table<double>& limits) {
  if (value.is_none() || is_real_scalar(value)) {
    const double limit = value.is_none()    ? (are_coefficients ? 1.0 : infinity())
                         : are_coefficients ? finite_number(value, name.c_str())
                                            : nonnegative_number(value, name.c_str());
    limits.insert(limits.end(), rows, limit);
    return;
  }
  const std::string expected = "a number or an array of " + std::to_string(rows) + " numbers";
  const py::object any = [&] {
    try {
      return py::object(py::module_::import("numpy").attr("asarray")(value));
    } catch (py::error_already_set& error) {
      if (!error.matches(PyExc_TypeError) && !error.matches(PyExc_ValueError)) throw;
      py::raise_from(error, PyExc_TypeError,
                     (name + ": expected " + expected +
                      " on the CPU (of a GPU, one array for the rows of all gradients), got " +
                      type_name(value))
                         .c_str());
      throw py::error_already_set();
    }
  }();
  const py::object dtype = any.attr("dtype");
  const std::optional<DType> known = find_dtype(dtype.ptr());  // bfloat16 among them
  const bool is_real = known && !is_complex(*known);
  if (!is_real && std::string("fiu").find(str_text(dtype.attr("kind"))) == std::string::npos)
    throw py::type_error(name + ": expected " + expected + ", got one of dtype " + str_text(dtype));
  const py::array_t<double> numbers = any.attr("astype")("float64");
  if (numbers.ndim() != 1 || static_cast<std::size_t>(numbers.size()) != rows)
    throw py::value_error(name + ": expected " + expected + ", got one of shape " +
                          str_text(any.attr("shape")));
  const cpu::DefaultFloatEnvironment environment;
  const auto limit_of = numbers.unchecked<1>();
  for (py::ssize_t r = 0; r < numbers.size(); ++r) {
    const double limit = limit_of(r);
    if (!is_usable({.are_coefficients = are_coefficients}, limit))
      throw py::value_error(name + "[" + std::to_string(r) + "]: expected a " +
                            (are_coefficients ? "finite number" : "number that is not negative") +
                            ", got " + repr_text(py::float_(limit)));
    limits.push_back(limit);
  }
}

Table<double> limits_of_rows(const py::object& value, const NamedGroups& groups,
                             const std::string& argument, bool are_coefficients) {
  const RowTable& rows = *groups.rows;
  Table<double> limits;
  limits.reserve(rows.count());
  const bool by_name = is_mapping(value);
  if (!by_name && !PyList_Check(value.ptr()) && !PyTuple_Check(value.ptr())) {
    add_limits_of_rows(value, rows.count(), argument, are_coefficients, limits);
    return limits;
  }
  const py::object names = groups.names.attr("gradients");
  const auto values = by_name ? values_by_name(value, names, argument.c_str(), "gradients")
                              : py::reinterpret_steal<py::object>(PySequence_List(value.ptr()));
  if (!values) throw py::error_already_set();
  const auto count = static_cast<std::size_t>(PyList_GET_SIZE(values.ptr()));
  if (count != rows.gradients.size())
    throw py::value_error(
        argument + ": expected a number, an array of " + std::to_string(rows.count()) +
        " numbers, or one of these for each of the " + std::to_string(rows.gradients.size()) +
        " gradients, got " + std::to_string(count));
  for (std::size_t i = 0; i < count; ++i) {
    const std::string place = by_name ? repr_text(names[py::int_(i)]) : std::to_string(i);
    add_limits_of_rows(py::reinterpret_borrow<py::object>(
                           PyList_GET_ITEM(values.ptr(), static_cast<Py_ssize_t>(i))),
                       static_cast<std::size_t>(rows.gradients[i].count),
                       std::string(argument).append("[").append(place).append("]"),
                       are_coefficients, limits);
  }
  return limits;
}

}  // namespace

Table<double> limits_of_groups(const py::object& value, const NamedGroups& groups,
                               std::size_t tensors, bool are_coefficients) {
  const std::string argument = are_coefficients ? "coefficients" : "max_norm";
  const auto number = [&](const py::object& one, const std::string& name) {
    return are_coefficients ? finite_number(one, name.c_str())
                            : nonnegative_number(one, name.c_str());
  };
  if (groups.groups.kind == Groups::row && !is_real_scalar(value))
    return limits_of_rows(value, groups, argument, are_coefficients);
  const bool by_name = is_mapping(value);
  if (!by_name && (groups.groups.kind == Groups::all || !is_sequence_of_numbers(value)))
    return {number(value, argument)};
  const auto values = by_name ? values_by_name(value, groups.names, argument.c_str(), "groups")
                              : py::reinterpret_steal<py::object>(PySequence_List(value.ptr()));
  if (!values) throw py::error_already_set();
  const auto count = static_cast<std::size_t>(PyList_GET_SIZE(values.ptr()));
  const std::size_t expected = groups.groups.count(tensors);
  if (count != expected)
    throw py::value_error(argument + ": expected a number or one for each of the " +
                          std::to_string(expected) + " groups, got " + std::to_string(count));
  Table<double> numbers;
  for (std::size_t g = 0; g < count; ++g) {
    const auto one = py::reinterpret_borrow<py::object>(
        PyList_GET_ITEM(values.ptr(), static_cast<Py_ssize_t>(g)));
    if (one.is_none()) {  // left alone
      numbers.push_back(are_coefficients ? 1.0 : infinity());
      continue;
    }
    const std::string place = by_name ? repr_text(groups.names[py::int_(g)]) : std::to_string(g);
    numbers.push_back(number(one, std::string(argument).append("[").append(place).append("]")));
  }
  return numbers;
}

double finite_number(const py::object& value, const char* name) {
  const double number = real_number(value, name);
  if (!is_finite(number))
    throw py::value_error(std::string(name) + ": expected a finite number, got " +
                          repr_text(value));
  return number;
}

double grad_scale_number(const py::object& grad_scale) {
  const double scale = positive_number(grad_scale, "grad_scale", false);
  const cpu::DefaultFloatEnvironment environment;
  if (!is_finite(1.0 / scale))
    throw py::value_error("grad_scale: expected a number whose reciprocal is finite, got " +
                          repr_text(grad_scale));
  return scale;
}

namespace {

std::string text_of(const NormOrder& order) { return repr_text(py::float_(order.p)); }

}  // namespace

void check_reduce(const py::object& reduce, const NormOrder& order) {
  if (reduce.is_none()) return;
  if (!PyCallable_Check(reduce.ptr()))
    throw py::type_error("reduce: expected a callable or None, got " + type_name(reduce));
  const py::object made_for = find_attribute(reduce, "ord");
  if (!made_for || !(PyFloat_Check(made_for.ptr()) || PyLong_Check(made_for.ptr())))
    return;  // the caller's own, which knows what it adds up
  const NormOrder its_own = norm_order(made_for);
  if (its_own.kind != order.kind || its_own.p != order.p)
    throw py::value_error("reduce: expected one for the ord of this call, " + text_of(order) +
                          ", got one that was made for ord=" + text_of(its_own));
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
    const auto is = [&](const char* text) {
      return PyUnicode_CompareWithASCIIString(policy.ptr(), text) == 0;
    };
    if (is("raise")) return NonFinite::raise;
    if (is("skip")) return NonFinite::skip;
    if (is("zero")) return NonFinite::zero;
    if (is("propagate")) return NonFinite::propagate;
    throw py::value_error("nonfinite: expected 'raise', 'skip', 'zero' or 'propagate', got " +
                          repr_text(policy));
  }
  throw py::type_error("nonfinite: expected 'raise', 'skip', 'zero' or 'propagate', got " +
                       type_name(policy));
}

ClipOptions clip_options(const py::object& nonfinite, const py::object& formula, double grad_scale,
                         const NormOrder& order, bool in_float64) {
  ClipOptions options{nonfinite_policy(nonfinite), grad_scale};
  if (PyFloat_CheckExact(formula.ptr())) {
    options.epsilon = PyFloat_AS_DOUBLE(formula.ptr());
    return options;
  }
  const auto is = [&](const char* text) {
    return PyUnicode_CompareWithASCIIString(formula.ptr(), text) == 0;
  };
  if (!PyUnicode_Check(formula.ptr()))
    throw py::type_error("rounding: expected 'nearest' or 'down', got " + type_name(formula));
  if (is("down"))
    options.norm_error = norm_error_bound(order, in_float64);
  else if (!is("nearest"))
    throw py::value_error("rounding: expected 'nearest' or 'down', got " + repr_text(formula));
  return options;
}

void refuse_second_use() {
  throw py::value_error(
      "measured: expected gradients as they were measured, got ones that this has clipped or "
      "scaled "
      "before; measure again");
}

namespace {

std::size_t label_number(const py::object& label, std::size_t i, std::size_t allowed) {
  const std::string name = "groups[" + std::to_string(i) + "]";
  const auto refuse = [&] {
    throw py::type_error(name + ": expected an integer label, or a name as the others are, got " +
                         type_name(label));
  };
  if (PyBool_Check(label.ptr()) || !PyIndex_Check(label.ptr())) refuse();
  const Py_ssize_t value = PyNumber_AsSsize_t(label.ptr(), nullptr);  // clips what is too large
  if (value == -1 && PyErr_Occurred()) {
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
    PyErr_Clear();
    refuse();
  }
  if (value < 0 || static_cast<std::size_t>(value) >= allowed)
    throw py::value_error(name + ": expected a label from 0 to " + std::to_string(allowed - 1) +
                          ", got " + repr_text(label));
  return static_cast<std::size_t>(value);
}

NamedGroups groups_of_rows(const Gradients& grads, RowKind kind) {
  const auto rows = std::make_shared<const RowTable>(grads.rows(kind));
  const bool are_samples = kind == RowKind::sample;
  NamedGroups named{{are_samples ? Groups::sample : Groups::row}, py::none(), rows};
  if (are_samples) {
    for (const RowSpan& gradient : rows->gradients)
      named.groups.used = std::max(named.groups.used, static_cast<std::size_t>(gradient.count));
    return named;
  }
  named.groups.used = rows->count();
  const py::object first = checked(PyTuple_New(static_cast<Py_ssize_t>(rows->first.size())));
  for (std::size_t i = 0; i < rows->first.size(); ++i)
    PyTuple_SET_ITEM(first.ptr(), static_cast<Py_ssize_t>(i),
                     to_index(rows->first[i]).release().ptr());
  named.names = py::module_::import("gradclip._result").attr("RowNames")(grads.names(), first);
  return named;
}

}  // namespace

NamedGroups group_labels(const py::object& groups, const Gradients& grads) {
  if (groups.is_none()) return {};
  const std::size_t tensors = grads.spans().size();
  if (PyUnicode_Check(groups.ptr())) {
    const std::string text = str_text(groups);
    if (text == "tensor") return {{Groups::tensor}, grads.names()};
    if (text == "row") return groups_of_rows(grads, RowKind::row);
    if (text == "sample") return groups_of_rows(grads, RowKind::sample);
    if (text == "unit") return groups_of_rows(grads, RowKind::unit);
    if (text == "unit_last") return groups_of_rows(grads, RowKind::unit_last);
    throw py::value_error(
        "groups: expected None, 'tensor', 'row', 'sample', 'unit', 'unit_last' or one label per "
        "gradient, got " +
        repr_text(groups));
  }
  const bool by_name = is_mapping(groups);
  if (!by_name && (PyBytes_Check(groups.ptr()) || !PySequence_Check(groups.ptr())))
    throw py::type_error(
        "groups: expected None, 'tensor', 'row', 'sample', 'unit', 'unit_last', a sequence or a "
        "mapping of labels, got " +
        type_name(groups));
  if (const auto axes = find_axes(groups); axes && *axes != 1)
    throw py::value_error("groups: expected labels in one dimension, got " + std::to_string(*axes));
  const auto labels = by_name ? values_by_name(groups, grads.names(), "groups", "gradients")
                              : py::reinterpret_steal<py::object>(PySequence_List(groups.ptr()));
  if (!labels) throw py::error_already_set();
  const auto count = static_cast<std::size_t>(PyList_GET_SIZE(labels.ptr()));
  if (count != tensors)
    throw py::value_error("groups: expected one label for each of the " + std::to_string(tensors) +
                          " gradients, got " + std::to_string(count) + " labels");
  NamedGroups result{{Groups::labels}};
  // Numbers of groups with names, some of which may have no gradient.
  if (const py::object names = find_attribute(groups, "group_names")) {
    result.names = py::tuple(names);
    result.groups.used = py::len(names);
  }
  const std::size_t numbers_allowed = std::max(tensors, result.groups.used);
  std::vector<std::size_t>& numbers = result.groups.label;
  numbers.reserve(count);
  // Names are numbered in the order in which they first appear.
  const bool are_names = count > 0 && PyUnicode_Check(PyList_GET_ITEM(labels.ptr(), 0));
  py::dict number_of;
  for (std::size_t i = 0; i < count; ++i) {
    const auto label = py::reinterpret_borrow<py::object>(
        PyList_GET_ITEM(labels.ptr(), static_cast<Py_ssize_t>(i)));
    if (!are_names) {
      numbers.push_back(label_number(label, i, numbers_allowed));
    } else {
      if (!PyUnicode_Check(label.ptr()))
        throw py::type_error("groups[" + std::to_string(i) + "]: expected a name, got " +
                             type_name(label));
      numbers.push_back(number_of.attr("setdefault")(label, number_of.size()).cast<std::size_t>());
    }
    result.groups.used = std::max(result.groups.used, numbers.back() + 1);
  }
  if (are_names) result.names = py::tuple(number_of);
  return result;
}

py::object group_sizes(const NamedGroups& named, const Gradients& grads) {
  const std::span<const Span> spans = grads.spans();
  Table<std::int64_t> sizes(named.groups.count(spans.size()), 0);
  if (!named.rows) {
    for (std::size_t i = 0; i < spans.size(); ++i) sizes[named.groups.of(i)] += spans[i].numel;
    return to_array(sizes);
  }
  const bool are_samples = named.groups.kind == Groups::sample;
  for (std::size_t i = 0; i < spans.size(); ++i) {
    const RowSpan& rows = named.rows->gradients[i];
    const std::size_t first = are_samples ? 0 : named.rows->first[i];
    for (std::int64_t row = 0; row < rows.count; ++row)
      sizes[first + static_cast<std::size_t>(row)] += rows.numel;
  }
  return to_array(sizes);
}

}  // namespace gradclip::bindings
