#include "bindings/calls.hpp"

#include <chrono>
#include <cmath>
#include <cstring>

#include "bindings/arguments.hpp"
#include "bindings/gil.hpp"
#include "core/clip.hpp"
#include "cpu/engine.hpp"
#include "cpu/float_environment.hpp"

namespace gradclip::bindings {
namespace {

// The engine's work: without the GIL, and in the default floating-point environment whatever the caller's
// is. What is decided between two passes keeps the GIL. No code of the user's runs in either.
template <class Work>
auto decide(Work work) {
  const cpu::DefaultFloatEnvironment environment;
  return work();
}
template <class Work>
auto run(Work work) {
  const GilRelease release;
  return decide(work);
}

// A new reference, or the exception that was set: a lack of memory is a MemoryError, which pybind11's own
// constructors make a RuntimeError of.
py::object checked(PyObject* made) {
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

py::object to_float(double value) { return checked(PyFloat_FromDouble(value)); }
py::object to_index(std::size_t value) { return checked(PyLong_FromSize_t(value)); }
py::object to_array(const Table<double>& values) {
  // Not made of the values by pybind11, which does not look whether its copy could be made.
  py::array_t<double> array(static_cast<py::ssize_t>(values.size()));
  if (!values.empty())
    std::memcpy(array.mutable_data(), values.data(), values.size() * sizeof(double));
  return array;
}

py::object to_tuple(const std::vector<std::size_t>& values) {
  py::object result = checked(PyTuple_New(static_cast<py::ssize_t>(values.size())));
  for (std::size_t i = 0; i < values.size(); ++i)
    PyTuple_SET_ITEM(result.ptr(), static_cast<py::ssize_t>(i),
                     to_index(values[i]).release().ptr());
  return result;
}

Table<NormSum> measure(const Gradients& grads, const NormOrder& order) {
  return run([&] { return cpu::measure(grads.spans(), grads.plan(), order); });
}

Table<double> norms_of(const NormOrder& order, const Table<NormSum>& sums) {
  return decide([&] {
    Table<double> norms;
    norms.reserve(sums.size());
    for (const NormSum& sum : sums) norms.push_back(norm_of(order, sum));
    return norms;
  });
}

double norm_of_all(const NormOrder& order, const Table<NormSum>& sums) {
  return decide([&] { return norm_of(order, group_sums(order, sums, {}, 1)[0]); });
}

// Hand this process's sums to the caller's `reduce` and take the sums over all processes. What its code
// raises, also as an array is made of what it returns, goes on as it is.
Table<NormSum> reduce_sums(const py::object& reduce, const NormOrder& order,
                           const Table<NormSum>& sums) {
  Table<double> plain;
  decide([&] {
    for (const NormSum& sum : sums) plain.push_back(to_plain(order, sum));
  });
  const py::object as_array = py::module_::import("numpy").attr("asarray");
  const py::array any = as_array(reduce(to_array(plain)));
  const char kind = any.dtype().kind();
  if (kind != 'f' && kind != 'i' && kind != 'u')
    throw py::type_error("reduce: expected an array of float64 sums, got dtype " +
                         str_text(any.dtype()));
  const py::array_t<double> reduced = as_array(any, "float64");
  if (reduced.ndim() != 1 || reduced.shape(0) != static_cast<py::ssize_t>(plain.size()))
    throw py::value_error("reduce: expected sums of shape (" + std::to_string(plain.size()) +
                          ",), got shape " + str_text(reduced.attr("shape")));
  Table<NormSum> result;
  decide([&] {
    for (py::ssize_t g = 0; g < reduced.shape(0); ++g) {
      const double sum = reduced.at(g);
      if (sum < 0.0)
        throw py::value_error("reduce: expected sums that are not negative, got " +
                              std::to_string(sum) + " for group " + std::to_string(g));
      result.push_back(from_plain(sum + 0.0));  // no -0
    }
  });
  return result;
}

struct Counts {
  std::size_t tensor;
  cpu::NonFiniteCounts elements;
};

// Of those tensors that hold elements which are not finite. A sum that is not finite need not mean that:
// the magnitude of a finite complex128 element can be beyond float64.
std::vector<Counts> count_nonfinite(const Gradients& grads,
                                    const std::vector<std::size_t>& tensors) {
  std::vector<Counts> counts;
  if (tensors.empty()) return counts;
  run([&] {
    for (const std::size_t i : tensors) {
      const cpu::NonFiniteCounts count = cpu::count_nonfinite(grads.spans()[i]);
      if (count.nan + count.infinity > 0) counts.push_back({i, count});
    }
  });
  return counts;
}

// What a call returns: made by gradclip._result before anything is written, so that nothing can fail after.
// `counts`, if given, makes it raise.
py::object make_result(double total, const Table<double>& norms, const py::object& coefficient,
                       bool clipped, const std::vector<std::size_t>& nonfinite,
                       const Gradients& grads, const Table<double>& group_norms,
                       const py::object& group_names, const std::vector<Counts>* counts = nullptr) {
  py::object listed = py::none();
  if (counts) {
    listed = checked(PyList_New(0));
    for (const auto& [tensor, elements] : *counts) {
      const py::object entry = checked(Py_BuildValue("(nLL)", static_cast<Py_ssize_t>(tensor),
                                                     static_cast<long long>(elements.nan),
                                                     static_cast<long long>(elements.infinity)));
      if (PyList_Append(listed.ptr(), entry.ptr()) != 0) throw py::error_already_set();
    }
  }
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> storage;
  const py::object& make =
      storage
          .call_once_and_store_result(
              [] { return checked(PyImport_ImportModule("gradclip._result")).attr("make_result"); })
          .get_stored();
  const py::object total_object = to_float(total), norms_array = to_array(norms),
                   indices = to_tuple(nonfinite), missing = to_tuple(grads.missing()),
                   group_array = to_array(group_norms);
  PyObject* const arguments[] = {
      total_object.ptr(), norms_array.ptr(), coefficient.ptr(),   clipped ? Py_True : Py_False,
      indices.ptr(),      missing.ptr(),     grads.names().ptr(), group_array.ptr(),
      group_names.ptr(),  listed.ptr()};
  return checked(PyObject_Vectorcall(make.ptr(), arguments, std::size(arguments), nullptr));
}

void scale_all(const Gradients& grads, double factor) {
  const Table<double> factors(grads.spans().size(), factor);
  grads.mark_written();
  run([&] { cpu::scale(grads.spans(), grads.plan(), factors); });
}

}  // namespace

py::object tensor_norms(const Gradients& grads, const py::object& ord) {
  const NormOrder order = norm_order(ord);
  grads.recheck(HostReader{}, ord);
  return to_array(norms_of(order, measure(grads, order)));
}

double global_norm(const Gradients& grads, const py::object& ord) {
  const NormOrder order = norm_order(ord);
  grads.recheck(HostReader{}, ord);
  return norm_of_all(order, measure(grads, order));
}

py::object clip(const Gradients& grads, const py::object& max_norm, const py::object& ord,
                const py::object& groups, const py::object& grad_scale, const py::object& nonfinite,
                const py::object& reduce, double epsilon) {
  const NormOrder order = norm_order(ord);
  const std::size_t tensors = grads.spans().size();
  const NamedGroups named = group_labels(groups, grads);
  const Groups& grouping = named.groups;
  const Table<double> thresholds = threshold_numbers(max_norm, named, tensors);
  const double scale = grad_scale_number(grad_scale);
  const NonFinite policy = nonfinite_policy(nonfinite);
  check_reduce(reduce, order);
  grads.require_writable();
  grads.recheck(HostReader{}, max_norm, ord, groups, grad_scale, nonfinite);

  const Table<NormSum> sums = measure(grads, order);
  Table<NormSum> group = decide([&] { return sums_of_groups(order, sums, grouping); });
  const bool reduced = !reduce.is_none();
  if (reduced) {
    group = reduce_sums(reduce, order, group);
    grads.require_unchanged(HostReader{});
  }
  const ClipDecision decision = decide([&] {
    return decide_clip(order, sums, grouping, group, reduced, thresholds, scale, policy, epsilon);
  });

  const std::vector<Counts> counts = count_nonfinite(grads, decision.nonfinite);
  std::vector<std::size_t> nonfinite_tensors;
  for (const Counts& count : counts) nonfinite_tensors.push_back(count.tensor);
  const bool refused = decision.nonfinite_norm && policy == NonFinite::raise;
  const py::object coefficient = grouping.kind == Groups::all ? to_float(decision.coefficients[0])
                                                              : to_array(decision.coefficients);
  py::object result = make_result(decision.total_norm, decision.norms, coefficient,
                                  decision.clipped, nonfinite_tensors, grads, decision.group_norms,
                                  named.names, refused ? &counts : nullptr);
  if (decision.action != ClipDecision::nothing) {
    grads.mark_written();
    run([&] {
      if (decision.action == ClipDecision::scale)
        cpu::scale(grads.spans(), grads.plan(), decision.factors);
      else
        cpu::set_to_zero(grads.spans(), grads.plan());
    });
  }
  return result;
}

void clip_with_norm(const Gradients& grads, double norm, const py::object& max_norm,
                    double epsilon) {
  const double threshold = nonnegative_number(max_norm, "max_norm");
  const double coefficient = decide([&] { return clip_coefficient(norm, threshold, epsilon); });
  grads.require_writable();
  grads.recheck(HostReader{}, max_norm);
  if (coefficient != 1.0) scale_all(grads, coefficient);
}

py::object clip_by_value(const Gradients& grads, const py::object& limit, bool to_nearest) {
  const ValueLimit bound{nonnegative_number(limit, "limit"), to_nearest};
  grads.require_real();
  grads.require_writable();
  grads.recheck(HostReader{}, limit);
  const cpu::ValueClip found =
      run([&] { return cpu::measure_values(grads.spans(), grads.plan(), bound); });
  const NormOrder order{NormOrder::infinity, INFINITY};
  const Table<double> norms = norms_of(order, found.largest);
  const double total = norm_of_all(order, found.largest);
  std::vector<std::size_t> nonfinite;
  for (std::size_t i = 0; i < norms.size(); ++i)
    if (!is_finite(norms[i])) nonfinite.push_back(i);
  py::object result = make_result(total, norms, to_float(1.0), found.clipped, nonfinite, grads,
                                  {total}, py::none());
  if (found.clipped) {
    grads.mark_written();
    run([&] { cpu::clip_by_value(grads.spans(), grads.plan(), bound, found.tiles); });
  }
  return result;
}

void scale(const Gradients& grads, const py::object& factor) {
  const double number = finite_number(factor, "factor");
  grads.require_writable();
  grads.recheck(HostReader{}, factor);
  if (number != 1.0) scale_all(grads, number);
}

namespace {

template <class Work>
double seconds_of(const Gradients& grads, Work work) {
  for (const Span& span : grads.spans())
    if (span.layout) throw py::value_error("grads: expected dense arrays for a probe");
  grads.recheck(HostReader{});
  return run([&] {
    const auto start = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  });
}

}  // namespace

double probe_read(const Gradients& grads) {
  return seconds_of(grads, [&] { cpu::probe_read(grads.spans(), grads.plan()); });
}

double probe_read_write(const Gradients& grads) {
  grads.require_writable();
  return seconds_of(grads, [&] { cpu::probe_read_write(grads.spans(), grads.plan()); });
}

}  // namespace gradclip::bindings
