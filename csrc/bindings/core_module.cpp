// The module gradclip._core: registers, and nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <string_view>

#include "bindings/calls.hpp"
#include "bindings/closed_class.hpp"
#include "bindings/convert.hpp"
#include "bindings/jax_capsules.hpp"
#include "bindings/measured.hpp"
#include "cpu/environment.hpp"
#include "cpu/float_environment.hpp"
#include "cpu/isa.hpp"
#include "cpu/team.hpp"
#include "cpu/thread_count.hpp"
#include "cpu/workers.hpp"

namespace py = pybind11;
namespace gb = gradclip::bindings;
using gb::Gradients;
using gb::Measured;
using gb::method;
using SharedGradients = gb::Shared<Gradients>;
using SharedPair = gb::Shared<gb::Pair>;

namespace {

SharedGradients read_gradients(const py::object& grads, bool is_kept, bool is_update) {
  return {std::make_shared<Gradients>(grads, gb::HostReader{is_kept}, is_update ? "new" : "grads")};
}

SharedPair with_params(const std::shared_ptr<const Gradients>& grads, const py::object& params,
                       const py::object& l2, const py::object& l1) {
  const gb::Pair::Terms terms = gb::Pair::Terms::of_params(l2, l1);
  return {std::make_shared<gb::Pair>(grads, params, terms, gb::HostReader{}, gb::second_reader())};
}
SharedPair with_base(const std::shared_ptr<const Gradients>& grads, const py::object& base) {
  const gb::Pair::Terms terms = gb::Pair::Terms::of_base();
  return {std::make_shared<gb::Pair>(grads, base, terms, gb::HostReader{}, gb::second_reader())};
}

Measured measure(const std::shared_ptr<const Gradients>& grads, const gb::MeasureCall& call) {
  return Measured::measure(grads, nullptr, call);
}
Measured measure_pair(const std::shared_ptr<const gb::Pair>& pair, const gb::MeasureCall& call) {
  return Measured::measure(pair->gradients(), pair, call);
}
py::object clip(const std::shared_ptr<const Gradients>& grads, const gb::ClipCall& call) {
  return Measured::clip(grads, nullptr, call);
}
py::object clip_pair(const std::shared_ptr<const gb::Pair>& pair, const gb::ClipCall& call) {
  return Measured::clip(pair->gradients(), pair, call);
}

// What was measured, and how many gradients were given.
py::tuple accumulate(const py::object& into, const py::object& grads, const py::object& scale,
                     const py::object& reduce) {
  gb::check_reduce(reduce, gradclip::NormOrder{});
  const gb::Pair::Terms terms = gb::Pair::Terms::of_scale(scale);
  const auto accumulators = std::make_shared<const Gradients>(into, gb::HostReader{}, "into");
  const gb::Pair pair(accumulators, grads, terms, gb::HostReader{}, gb::second_reader());
  pair.require_writable();
  const std::size_t missing = pair.second().missing().size();
  return py::make_tuple(Measured(pair, reduce), pair.second().spans().size() - missing);
}

int checked_thread_count(const py::object& n) {
  if (PyBool_Check(n.ptr()) || !PyIndex_Check(n.ptr()))
    throw py::type_error("n: expected an integer number of threads, got " +
                         std::string(Py_TYPE(n.ptr())->tp_name));
  const Py_ssize_t count = PyNumber_AsSsize_t(n.ptr(), nullptr);  // clips what is too large
  if (count == -1 && PyErr_Occurred()) throw py::error_already_set();
  // The engine says what is wrong with a number that is too small or too large.
  return static_cast<int>(std::clamp<Py_ssize_t>(count, INT_MIN, INT_MAX));
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  gb::init_numpy();
  m.doc() = "gradclip's CPU engine; gradclip._api is the public face of it.";

  py::class_<SharedGradients> gradients(m, "Gradients");
  gb::close_class(gradients);
  gradients.def("tensor_norms", method(&gb::tensor_norms), py::arg("ord"))
      .def("row_norms", method(&gb::row_norms), py::arg("ord"))
      .def("global_norm", method(&gb::global_norm), py::arg("ord"))
      .def(
          "measure_shards",
          [](const SharedGradients& grads, const py::object& ord, const py::object& groups,
             const py::object& grad_scale, bool is_wide, const py::object& sums) {
            return Measured::of_shards(grads.object, {ord, groups, grad_scale, py::none()}, is_wide,
                                       sums);
          },
          py::arg("ord"), py::arg("groups"), py::arg("grad_scale"), py::arg("is_wide"),
          py::arg("sums") = py::none())
      .def(
          "with_norm",
          [](const SharedGradients& grads, double norm) { return Measured(grads.object, norm); },
          py::arg("norm"))
      .def("clip_by_value", method(&gb::clip_by_value), py::arg("limit"),
           py::arg("to_nearest") = false)
      .def("scale", method(&gb::scale), py::arg("factor"))
      .def("probe_read", method(&gb::probe_read))
      .def("probe_read_write", method(&gb::probe_read_write))
      .def("require_writable", method(&Gradients::require_writable))
      .def("__len__", [](const SharedGradients& grads) { return grads.object->spans().size(); })
      .def_property_readonly("names", method(&Gradients::names))
      .def_property_readonly("has_float64", method(&Gradients::has_float64))
      .def_property_readonly("nbytes",
                             [](const SharedGradients& grads) { return grads.object->nbytes(); })
      .def_property_readonly("num_elements", method(&Gradients::elements));

  gb::def_measure(gradients, &measure);
  gb::def_clip(gradients, &clip);
  gradients
      .def("with_params", method(&with_params), py::arg("params"), py::arg("l2"), py::arg("l1"))
      .def("with_base", method(&with_base), py::arg("base"));

  py::class_<SharedPair> pair(m, "Pair");
  gb::close_class(pair);
  gb::def_measure(pair, &measure_pair);
  gb::def_clip(pair, &clip_pair);
  pair.def_property_readonly(
      "names", [](const SharedPair& both) { return both.object->gradients()->names(); });

  py::class_<Measured> measured_class(m, "Measured");
  gb::close_class(measured_class);
  measured_class
      .def("clip", &Measured::clip_measured, py::arg("max_norm"), py::arg("nonfinite"),
           py::arg("formula"))
      .def("scale", &Measured::scale_measured, py::arg("coefficients"), py::arg("nonfinite"))
      .def_property_readonly(
          "sum_words", [](const Measured& measured) { return gb::to_array(measured.sum_words()); })
      .def_property_readonly(
          "nonfinite_counts",
          [](const Measured& measured) { return gb::to_array(measured.nonfinite_counts()); })
      .def("join", &Measured::join_words, py::arg("words"), py::arg("counts"))
      .def_property_readonly("total_norm",
                             [](const Measured& measured) { return measured.norms().total; })
      .def_property_readonly(
          "norms", [](const Measured& measured) { return gb::to_array(measured.norms().tensors); })
      .def_property_readonly(
          "group_norms",
          [](const Measured& measured) { return gb::to_array(measured.norms().groups); })
      .def_property_readonly(
          "group_sums",
          [](const Measured& measured) { return gb::to_array(measured.group_sums()); })
      .def_property_readonly("nonfinite",
                             [](const Measured& measured) {
                               return gb::to_named(measured.nonfinite(),
                                                   measured.gradients().names());
                             })
      .def_property_readonly("missing",
                             [](const Measured& measured) {
                               const Gradients& grads = measured.gradients();
                               return gb::to_named(grads.missing(), grads.names());
                             })
      .def_property_readonly("names",
                             [](const Measured& measured) { return measured.gradients().names(); })
      .def_property_readonly("group_names", &Measured::group_names)
      .def_property_readonly("group_sizes", &Measured::group_sizes)
      .def_property_readonly("penalty", &Measured::penalty)
      .def_property_readonly("is_global", &Measured::is_global);

  // `is_kept`: for many calls. For one, torch tensors are borrowed: no other thread may give a tensor other
  // memory while it runs.
  // `is_update`: the list is called new in messages.
  m.def("read", &read_gradients, py::arg("grads"), py::arg("is_kept") = false,
        py::arg("is_update") = false);

  m.def("accumulate", &accumulate, py::arg("into"), py::arg("grads"), py::arg("scale"),
        py::arg("reduce"));

  m.def(
      "set_num_threads",
      [](const py::object& n) { gradclip::cpu::set_num_threads(checked_thread_count(n)); },
      py::arg("n"));
  m.def("get_num_threads", &gradclip::cpu::num_threads);
  m.def("num_started_threads", &gradclip::cpu::team::num_started);
  m.def("helpers_of_last_call", &gradclip::cpu::helpers_of_last_call);
  using Environment = gradclip::cpu::DefaultFloatEnvironment;
  m.def("enter_float_environment", [] {
    const Environment::State saved = Environment::enter();
    return py::bytes(reinterpret_cast<const char*>(&saved), sizeof(saved));
  });
  m.def(
      "leave_float_environment",
      [](const py::bytes& saved) {
        Environment::State state{};
        const auto text = static_cast<std::string_view>(saved);
        if (text.size() != sizeof(state))
          throw py::value_error("saved: expected what enter_float_environment returned");
        std::memcpy(&state, text.data(), sizeof(state));
        Environment::leave(state);
      },
      py::arg("saved"));
  m.def("set_isa", &gradclip::cpu::set_isa, py::arg("name"));
  m.def("get_isa", &gradclip::cpu::isa_name);
  m.def("supported_isas", &gradclip::cpu::supported_isas);
  // What jax.ffi.register_ffi_target takes, by name.
  m.def("jax_handlers", [] { return gb::to_capsules(gradclip::jax::handlers()); });
  m.def("read_environment", [] {
    gradclip::cpu::init_num_threads();
    if (const auto isa = gradclip::cpu::from_environment("GRADCLIP_ISA"))
      gradclip::cpu::set_isa(*isa);
  });
}
