#include "bindings/calls.hpp"

#include <chrono>
#include <cmath>

#include "bindings/arguments.hpp"
#include "bindings/gil.hpp"
#include "core/clip.hpp"
#include "cpu/engine.hpp"
#include "cpu/float_environment.hpp"

namespace gradclip::bindings {
namespace {

// All arithmetic, also that from sums to norms, is done in it; but no user code.
using Environment = cpu::DefaultFloatEnvironment;

py::array_t<double> to_array(const Table<double>& values) {
  return py::array_t<double>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::tuple to_tuple(const std::vector<std::size_t>& values) {
  py::tuple result(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) result[i] = values[i];
  return result;
}

Table<NormSum> measure(const Gradients& grads, const NormOrder& order) {
  const GilRelease release;
  return cpu::measure(grads.spans(), grads.plan(), order);
}

Table<double> norms_of(const NormOrder& order, const Table<NormSum>& sums) {
  const Environment environment;
  Table<double> norms;
  norms.reserve(sums.size());
  for (const NormSum& sum : sums) norms.push_back(norm_of(order, sum));
  return norms;
}

double norm_of_all(const NormOrder& order, const Table<NormSum>& sums) {
  const Environment environment;
  return norm_of(order, group_sums(order, sums, {}, 1)[0]);
}

// Hand this process's sums to the caller's `reduce` and take the sums over all processes.
Table<NormSum> reduce_sums(const py::object& reduce, const NormOrder& order,
                           const Table<NormSum>& sums) {
  Table<double> plain;
  {
    const Environment environment;
    for (const NormSum& sum : sums) plain.push_back(to_plain(order, sum));
  }
  const py::object returned = reduce(to_array(plain));
  const auto any = py::array::ensure(returned);
  if (!any) throw py::error_already_set();
  const char kind = any.dtype().kind();
  if (kind != 'f' && kind != 'i' && kind != 'u')
    throw py::type_error("reduce: expected an array of float64 sums, got dtype " +
                         py::str(any.dtype()).cast<std::string>());
  const auto reduced = py::array_t<double, py::array::forcecast>::ensure(any);
  if (!reduced) throw py::error_already_set();
  if (reduced.ndim() != 1 || reduced.shape(0) != static_cast<py::ssize_t>(plain.size()))
    throw py::value_error("reduce: expected sums of shape (" + std::to_string(plain.size()) +
                          ",), got shape " + py::str(reduced.attr("shape")).cast<std::string>());
  Table<NormSum> result;
  for (py::ssize_t g = 0; g < reduced.shape(0); ++g) {
    const double sum = reduced.at(g);
    if (sum < 0.0)
      throw py::value_error("reduce: expected sums that are not negative, got " +
                            std::to_string(sum) + " for group " + std::to_string(g));
    result.push_back(from_plain(sum + 0.0));  // no -0
  }
  return result;
}

// (index, NaN count, infinity count) of those tensors that hold such elements. A sum that is not finite
// need not mean that: the magnitude of a finite complex128 element can be beyond float64.
py::list count_nonfinite(const Gradients& grads, const std::vector<std::size_t>& tensors) {
  py::list counts;
  for (const std::size_t i : tensors) {
    cpu::NonFiniteCounts count;
    {
      const GilRelease release;
      count = cpu::count_nonfinite(grads.spans()[i]);
    }
    if (count.nan + count.infinity > 0) counts.append(py::make_tuple(i, count.nan, count.infinity));
  }
  return counts;
}

void scale_all(const Gradients& grads, double factor) {
  const Table<double> factors(grads.spans().size(), factor);
  const GilRelease release;
  cpu::scale(grads.spans(), grads.plan(), factors);
}

}  // namespace

py::array_t<double> tensor_norms(const Gradients& grads, const py::object& ord) {
  const NormOrder order = norm_order(ord);
  return to_array(norms_of(order, measure(grads, order)));
}

double global_norm(const Gradients& grads, const py::object& ord) {
  const NormOrder order = norm_order(ord);
  return norm_of_all(order, measure(grads, order));
}

py::tuple clip(const Gradients& grads, const py::object& max_norm, const py::object& ord,
               const py::object& groups, const py::object& grad_scale, const py::object& nonfinite,
               const py::object& reduce, double epsilon) {
  const NormOrder order = norm_order(ord);
  const std::size_t tensors = grads.spans().size();
  const Groups grouping = group_labels(groups, tensors);
  const Table<double> thresholds = threshold_numbers(max_norm, grouping, tensors, epsilon);
  const double scale = grad_scale_number(grad_scale);
  const NonFinite policy = nonfinite_policy(nonfinite);
  check_reduce(reduce);
  grads.require_writable();

  const Table<NormSum> sums = measure(grads, order);
  Table<NormSum> group = [&] {
    const Environment environment;
    return sums_of_groups(order, sums, grouping);
  }();
  const bool reduced = !reduce.is_none();
  if (reduced) group = reduce_sums(reduce, order, group);
  const ClipDecision decision = [&] {
    const Environment environment;
    return decide_clip(order, sums, grouping, group, reduced, thresholds, scale, policy, epsilon);
  }();

  const py::list counts = count_nonfinite(grads, decision.nonfinite);
  py::tuple nonfinite_entries(counts.size());
  for (std::size_t i = 0; i < counts.size(); ++i)
    nonfinite_entries[i] = py::reinterpret_borrow<py::tuple>(counts[i])[0];
  const bool refused = decision.nonfinite_norm && policy == NonFinite::raise;
  if (decision.action != ClipDecision::nothing) {
    const GilRelease release;
    if (decision.action == ClipDecision::scale)
      cpu::scale(grads.spans(), grads.plan(), decision.factors);
    else
      cpu::set_to_zero(grads.spans(), grads.plan());
  }
  const py::object coefficient = grouping.kind == Groups::all
                                     ? py::object(py::float_(decision.coefficients[0]))
                                     : py::object(to_array(decision.coefficients));
  return py::make_tuple(decision.total_norm, to_array(decision.norms), coefficient,
                        decision.clipped, nonfinite_entries, grads.names(),
                        to_array(decision.group_norms), refused ? py::object(counts) : py::none());
}

void clip_with_norm(const Gradients& grads, double norm, const py::object& max_norm,
                    double epsilon) {
  const double coefficient = clip_coefficient(norm, threshold_number(max_norm, epsilon), epsilon);
  grads.require_writable();
  if (coefficient != 1.0) scale_all(grads, coefficient);
}

py::tuple clip_by_value(const Gradients& grads, const py::object& limit) {
  const double bound = positive_number(limit, "limit", true);
  grads.require_real();
  grads.require_writable();
  cpu::ValueClip result;
  {
    const GilRelease release;
    result = cpu::clip_by_value(grads.spans(), grads.plan(), bound);
  }
  const NormOrder order{NormOrder::infinity, INFINITY};
  const Table<double> norms = norms_of(order, result.largest);
  const double total = norm_of_all(order, result.largest);
  std::vector<std::size_t> nonfinite;
  for (std::size_t i = 0; i < norms.size(); ++i)
    if (!is_finite(norms[i])) nonfinite.push_back(i);
  return py::make_tuple(total, to_array(norms), 1.0, result.clipped, to_tuple(nonfinite),
                        grads.names(), to_array({total}), py::none());
}

void scale(const Gradients& grads, const py::object& factor) {
  const double number = finite_number(factor, "factor");
  grads.require_writable();
  if (number != 1.0) scale_all(grads, number);
}

namespace {

template <class Work>
double seconds_of(const Gradients& grads, Work work) {
  for (const Span& span : grads.spans())
    if (span.layout) throw py::value_error("grads: expected dense arrays for a probe");
  const GilRelease release;
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
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
