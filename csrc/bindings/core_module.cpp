// The module gradclip._core: registers, and nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <string_view>

#include "bindings/calls.hpp"
#include "bindings/closed_class.hpp"
#include "cpu/environment.hpp"
#include "cpu/float_environment.hpp"
#include "cpu/isa.hpp"
#include "cpu/team.hpp"

namespace py = pybind11;
namespace gb = gradclip::bindings;
using gb::Gradients;

namespace {

Gradients readable(const py::object& grads) {
  gradclip::cpu::expect_call();
  return Gradients(grads, gb::HostReader{});
}

Gradients writable(const py::object& grads, bool is_kept = false) {
  gradclip::cpu::expect_call();
  Gradients read(grads, gb::HostReader{is_kept});
  read.find_overlaps();
  return read;
}

// A list without any gradient is likely a mistake: the call has done nothing.
void warn_of_nothing(const Gradients& grads) {
  if (grads.is_nothing()) py::module_::import("gradclip._result").attr("warn_of_nothing")();
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

  m.def(
      "tensor_norms",
      [](const py::object& grads, const py::object& ord) {
        return gb::tensor_norms(readable(grads), ord);
      },
      py::arg("grads"), py::arg("ord"));
  m.def(
      "global_norm",
      [](const py::object& grads, const py::object& ord) {
        return gb::global_norm(readable(grads), ord);
      },
      py::arg("grads"), py::arg("ord"));
  m.def(
      "clip",
      [](const py::object& grads, const py::object& max_norm, const py::object& ord,
         const py::object& groups, const py::object& grad_scale, const py::object& nonfinite,
         const py::object& reduce) {
        const Gradients read = writable(grads);
        py::object result =
            gb::clip(read, max_norm, ord, groups, grad_scale, nonfinite, reduce, 0.0);
        if (reduce.is_none()) warn_of_nothing(read);  // else other processes may have some
        return result;
      },
      py::arg("grads"), py::arg("max_norm"), py::arg("ord"), py::arg("groups"),
      py::arg("grad_scale"), py::arg("nonfinite"), py::arg("reduce"));
  m.def(
      "clip_by_value",
      [](const py::object& grads, const py::object& limit) {
        const Gradients read = writable(grads);
        py::object result = gb::clip_by_value(read, limit, false);
        warn_of_nothing(read);
        return result;
      },
      py::arg("grads"), py::arg("limit"));
  m.def(
      "scale",
      [](const py::object& grads, const py::object& factor) {
        const Gradients read = writable(grads);
        gb::scale(read, factor);
        warn_of_nothing(read);
      },
      py::arg("grads"), py::arg("factor"));
  m.def(
      "probe_read", [](const py::object& grads) { return gb::probe_read(readable(grads)); },
      py::arg("grads"));
  m.def(
      "probe_read_write",
      [](const py::object& grads) { return gb::probe_read_write(writable(grads)); },
      py::arg("grads"));

  py::class_<Gradients> gradients(m, "Gradients");
  gb::close_class(gradients);
  gradients.def("tensor_norms", &gb::tensor_norms, py::arg("ord"))
      .def("global_norm", &gb::global_norm, py::arg("ord"))
      .def("clip", &gb::clip, py::arg("max_norm"), py::arg("ord"), py::arg("groups"),
           py::arg("grad_scale"), py::arg("nonfinite"), py::arg("reduce"), py::arg("epsilon") = 0.0)
      .def("clip_with_norm", &gb::clip_with_norm, py::arg("norm"), py::arg("max_norm"),
           py::arg("epsilon"))
      .def("clip_by_value", &gb::clip_by_value, py::arg("limit"), py::arg("to_nearest") = false)
      .def("scale", &gb::scale, py::arg("factor"))
      .def("require_writable", &Gradients::require_writable)
      .def("__len__", [](const Gradients& grads) { return grads.spans().size(); })
      .def_property_readonly("names", &Gradients::names)
      .def_property_readonly("is_nothing", &Gradients::is_nothing)
      .def_property_readonly("has_float64", &Gradients::has_float64)
      .def_property_readonly("nbytes",
                             [](const Gradients& grads) { return grads.plan().total_bytes; })
      .def_property_readonly("num_elements", &Gradients::elements);

  m.def("Plan", [](const py::object& grads) { return writable(grads, true); }, py::arg("grads"));
  // For one call: torch tensors are borrowed.
  m.def("read", [](const py::object& grads) { return writable(grads); }, py::arg("grads"));

  m.def(
      "set_num_threads",
      [](const py::object& n) { gradclip::cpu::set_num_threads(checked_thread_count(n)); },
      py::arg("n"));
  m.def("get_num_threads", &gradclip::cpu::num_threads);
  m.def("num_started_threads", &gradclip::cpu::num_started_threads);
  m.def("expect_call", &gradclip::cpu::expect_call);
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
  m.def("read_environment", [] {
    gradclip::cpu::init_num_threads();
    if (const auto isa = gradclip::cpu::from_environment("GRADCLIP_ISA"))
      gradclip::cpu::set_isa(*isa);
  });
}
