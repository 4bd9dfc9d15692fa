#include "bindings/calls.hpp"

#include <chrono>
#include <cmath>

#include "bindings/arguments.hpp"
#include "bindings/convert.hpp"
#include "bindings/measured.hpp"
#include "core/clip.hpp"
#include "cpu/engine.hpp"

namespace gradclip::bindings {
namespace {

Table<NormSum> measure(const Gradients& grads, const NormOrder& order) {
  return run(grads.nbytes(), [&] { return cpu::measure(grads.spans(), grads.plan(), order); });
}

Table<double> norms_of_tensors(const NormOrder& order, const Table<NormSum>& sums) {
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

}  // namespace

py::object tensor_norms(const Gradients& grads, const py::object& ord) {
  const NormOrder order = norm_order(ord);
  grads.recheck(HostReader{}, ord);
  return to_array(norms_of_tensors(order, measure(grads, order)));
}

py::object row_norms(const Gradients& grads, const py::object& ord) {
  const NormOrder order = norm_order(ord);
  const RowTable rows = grads.rows(RowKind::row);
  grads.recheck(HostReader{}, ord);
  const py::array_t<double> norms = py::module_::import("numpy").attr("zeros")(rows.count());
  auto* const first = reinterpret_cast<double*>(py::detail::array_proxy(norms.ptr())->data);
  run(grads.nbytes(),
      [&] { cpu::row_norms(rows, cpu::make_plan(rows), order, {first, rows.count()}); });
  py::list views;
  for (std::size_t i = 0; i < rows.gradients.size(); ++i)
    views.append(norms[py::slice(static_cast<py::ssize_t>(rows.first[i]),
                                 static_cast<py::ssize_t>(rows.first[i + 1]), 1)]);
  return views;
}

double global_norm(const Gradients& grads, const py::object& ord) {
  const NormOrder order = norm_order(ord);
  grads.recheck(HostReader{}, ord);
  return norm_of_all(order, measure(grads, order));
}

py::object clip_by_value(const Gradients& grads, const py::object& limit, bool to_nearest) {
  const ValueLimit bound{nonnegative_number(limit, "limit"), to_nearest};
  grads.require_real();
  grads.require_writable();
  grads.recheck(HostReader{}, limit);
  const cpu::ValueClip found =
      run(grads.nbytes(), [&] { return cpu::measure_values(grads.spans(), grads.plan(), bound); });
  const NormOrder order{NormOrder::infinity, INFINITY};
  const Table<double> norms = norms_of_tensors(order, found.largest);
  const double total = norm_of_all(order, found.largest);
  std::vector<std::size_t> nonfinite;
  for (std::size_t i = 0; i < norms.size(); ++i)
    if (!is_finite(norms[i])) nonfinite.push_back(i);
  py::object result = make_result(total, norms, to_float(1.0), found.clipped, nonfinite, grads,
                                  py::none(), py::none());
  if (found.clipped) {
    grads.mark_written();
    run(grads.nbytes(),
        [&] { cpu::clip_by_value(grads.spans(), grads.plan(), bound, found.tiles); });
  }
  return result;
}

void scale(const Gradients& grads, const py::object& factor) {
  const double number = finite_number(factor, "factor");
  grads.require_writable();
  grads.recheck(HostReader{}, factor);
  if (number == 1.0) return;
  const Table<double> factors(grads.spans().size(), number);
  grads.mark_written();
  run(grads.nbytes(), [&] { cpu::scale(grads.spans(), grads.plan(), factors); });
}

namespace {

template <class Work>
double seconds_of(const Gradients& grads, Work work) {
  for (const Span& span : grads.spans())
    if (span.layout) throw py::value_error("grads: expected dense arrays for a probe");
  grads.recheck(HostReader{});
  return run(grads.nbytes(), [&] {
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
