// The module gradclip._cuda: registers, and nothing else. Compiled a second time with emulated kernels,
// as gradclip._cuda_emulated, for the tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/address.hpp"
#include "bindings/closed_class.hpp"
#include "bindings/device_measured.hpp"
#include "bindings/gil.hpp"
#include "bindings/jax_capsules.hpp"

#if defined(GRADCLIP_EMULATED)
#include "emulated_module.hpp"
#define GRADCLIP_MODULE _cuda_emulated
#else
#define GRADCLIP_MODULE _cuda
#endif

namespace py = pybind11;
namespace gb = gradclip::bindings;
namespace cuda = gradclip::cuda;
using gb::DeviceGradients;
using gb::DeviceMeasured;
using gb::Gradients;
using gb::method;
using SharedGradients = gb::Shared<DeviceGradients>;
using SharedPair = gb::Shared<gb::DevicePair>;

namespace {

DeviceMeasured measure(const std::shared_ptr<DeviceGradients>& grads, const gb::MeasureCall& call,
                       std::uintptr_t stream) {
  return DeviceMeasured::measure(grads, nullptr, call, stream);
}
DeviceMeasured measure_pair(const std::shared_ptr<gb::DevicePair>& pair,
                            const gb::MeasureCall& call, std::uintptr_t stream) {
  return DeviceMeasured::measure(pair->gradients(), pair, call, stream);
}
py::tuple clip(const std::shared_ptr<DeviceGradients>& grads, const gb::ClipCall& call,
               std::uintptr_t stream, const py::object& make) {
  return DeviceMeasured::clip(*grads, nullptr, call, stream, make);
}
py::tuple clip_pair(const std::shared_ptr<gb::DevicePair>& pair, const gb::ClipCall& call,
                    std::uintptr_t stream, const py::object& make) {
  return DeviceMeasured::clip(*pair->gradients(), pair.get(), call, stream, make);
}

SharedPair with_params(const std::shared_ptr<DeviceGradients>& grads, const py::object& params,
                       const py::object& l2, const py::object& l1, std::uintptr_t stream) {
  const gb::Pair::Terms terms = gb::Pair::Terms::of_params(l2, l1);
  return {std::make_shared<gb::DevicePair>(grads, params, terms, stream)};
}
SharedPair with_base(const std::shared_ptr<DeviceGradients>& grads, const py::object& base,
                     std::uintptr_t stream) {
  const gb::Pair::Terms terms = gb::Pair::Terms::of_base();
  return {std::make_shared<gb::DevicePair>(grads, base, terms, stream)};
}

DeviceMeasured with_norm(const std::shared_ptr<DeviceGradients>& grads, const py::object& norm,
                         std::uintptr_t stream) {
  return {grads, norm, stream};
}

// What the list tells of itself, as a property.
template <class Result>
auto of_list(Result (Gradients::*function)() const) {
  return [function](const SharedGradients& grads) -> Result {
    return (grads.object->gradients().*function)();
  };
}

}  // namespace

PYBIND11_MODULE(GRADCLIP_MODULE, m, py::mod_gil_not_used()) {
  gb::init_numpy();
  m.doc() = "gradclip's CUDA engine; gradclip._device is the way to it.";

  py::class_<SharedGradients> gradients(m, "Gradients", py::module_local());
  gb::close_class(gradients);
  gradients.def("norms", method(&DeviceGradients::norms), py::arg("ord"), py::arg("stream"))
      .def("with_norm", method(&with_norm), py::arg("norm"), py::arg("stream"))
      .def("clip_by_value", method(&DeviceGradients::clip_by_value), py::arg("limit"),
           py::arg("to_nearest"), py::arg("stream"), py::arg("make"))
      .def("scale", method(&DeviceGradients::scale), py::arg("factor"), py::arg("stream"))
      .def("require_writable", of_list(&Gradients::require_writable))
      .def("__len__",
           [](const SharedGradients& grads) { return grads.object->gradients().spans().size(); })
      .def_property_readonly("names", of_list(&Gradients::names))
      .def_property_readonly("has_float64", of_list(&Gradients::has_float64))
      .def_property_readonly("missing", of_list(&Gradients::missing))
      .def_property_readonly("device", method(&DeviceGradients::device))
      .def_property_readonly(
          "nbytes", [](const SharedGradients& grads) { return grads.object->gradients().nbytes(); })
      .def_property_readonly("num_elements", of_list(&Gradients::elements));

  gb::def_measure(gradients, &measure, py::arg("stream"));
  gb::def_clip(gradients, &clip, py::arg("stream"), py::arg("make"));
  gradients
      .def("with_params", method(&with_params), py::arg("params"), py::arg("l2"), py::arg("l1"),
           py::arg("stream"))
      .def("with_base", method(&with_base), py::arg("base"), py::arg("stream"));

  py::class_<SharedPair> pair(m, "Pair", py::module_local());
  gb::close_class(pair);
  gb::def_measure(pair, &measure_pair, py::arg("stream"));
  gb::def_clip(pair, &clip_pair, py::arg("stream"), py::arg("make"));

  py::class_<DeviceMeasured> measured(m, "Measured", py::module_local());
  gb::close_class(measured);
  measured
      .def("clip", &DeviceMeasured::clip_measured, py::arg("max_norm"), py::arg("nonfinite"),
           py::arg("formula"), py::arg("stream"), py::arg("make"))
      .def("scale", &DeviceMeasured::scale_measured, py::arg("coefficients"), py::arg("nonfinite"),
           py::arg("stream"), py::arg("make"))
      .def_property_readonly("memory", &DeviceMeasured::memory)
      .def_property_readonly("groups", &DeviceMeasured::groups)
      .def_property_readonly("is_global", &DeviceMeasured::is_global)
      .def_property_readonly("group_names", &DeviceMeasured::group_names)
      .def_property_readonly("group_sizes", &DeviceMeasured::group_sizes);

  m.def(
      "read",
      [](const py::object& grads, int device, std::uintptr_t stream, const std::string& framework,
         py::object allocate, bool is_kept, bool is_update) {
        return SharedGradients{std::make_shared<DeviceGradients>(
            grads, device, stream, framework, std::move(allocate), is_kept, is_update)};
      },
      py::arg("grads"), py::arg("device"), py::arg("stream"), py::arg("framework"),
      py::arg("allocate"), py::arg("is_kept"), py::arg("is_update"));

  // Where the parts of a result lie, in bytes.
  m.def(
      "result_layout",
      [](std::size_t tensors, std::size_t groups) {
        const cuda::ResultLayout at{tensors, groups};
        return py::make_tuple(at.total_norm(), at.coefficients(), at.group_norms(), at.group_sums(),
                              at.norms(), at.flags(), at.penalty(), at.nonfinite(), at.bytes());
      },
      py::arg("tensors"), py::arg("groups"));
  m.def(
      "copy_to_host",
      [](std::uintptr_t pointer, std::size_t bytes, int device, std::uintptr_t stream) {
        std::string host(bytes, '\0');
        {
          const cuda::DeviceGuard guard(device);  // whose default stream it may be
          const gb::GilRelease release;
          cuda::copy_to_host(host.data(), gb::pointer_at<void>(pointer), bytes,
                             gb::pointer_at<CUstream_st>(stream));
        }
        return py::bytes(host);
      },
      py::arg("pointer"), py::arg("bytes"), py::arg("device"), py::arg("stream"));
  m.def(
      "device_of",
      [](std::uintptr_t pointer) {
        return cuda::pointer_info(gb::pointer_at<void>(pointer)).device;
      },
      py::arg("pointer"));

  // What jax.ffi.register_ffi_target takes, by name.
  m.def("jax_handlers", [] { return gb::to_capsules(gradclip::jax::cuda_handlers()); });

  m.def("missing", &cuda::missing);
  m.def("device_count", &cuda::device_count);
  m.def(
      "device_info",
      [](int device) {
        const cuda::DeviceInfo info = cuda::device_info(device);
        return py::make_tuple(info.name, info.major, info.minor, info.multiprocessors,
                              info.memory_bytes);
      },
      py::arg("device"));
  m.def("runtime_version", &cuda::runtime_version);
  m.def("driver_version", &cuda::driver_version);
  m.def("architectures", &cuda::architectures);
#if defined(GRADCLIP_EMULATED)
  simt::add_emulator(m);
#endif
}
