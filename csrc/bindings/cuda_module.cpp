// The module gradclip._cuda: registers, and nothing else. Compiled a second time with emulated kernels,
// as gradclip._cuda_emulated, for the tests.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/closed_class.hpp"
#include "bindings/device_gradients.hpp"
#include "bindings/gil.hpp"
#include "bindings/on_device.hpp"

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

PYBIND11_MODULE(GRADCLIP_MODULE, m, py::mod_gil_not_used()) {
  gb::init_numpy();
  m.doc() = "gradclip's CUDA engine; gradclip._device is the way to it.";

  py::class_<DeviceGradients> gradients(m, "Gradients", py::module_local());
  gb::close_class(gradients);
  gradients.def("norms", &DeviceGradients::norms, py::arg("ord"), py::arg("stream"))
      .def("clip", &DeviceGradients::clip, py::arg("max_norm"), py::arg("ord"), py::arg("groups"),
           py::arg("grad_scale"), py::arg("nonfinite"), py::arg("reduce"), py::arg("stream"),
           py::arg("epsilon"), py::arg("make"))
      .def("clip_with_norm", &DeviceGradients::clip_with_norm, py::arg("norm"), py::arg("max_norm"),
           py::arg("stream"), py::arg("epsilon"))
      .def("clip_by_value", &DeviceGradients::clip_by_value, py::arg("limit"),
           py::arg("to_nearest"), py::arg("stream"), py::arg("make"))
      .def("scale", &DeviceGradients::scale, py::arg("factor"), py::arg("stream"))
      .def("require_writable",
           [](const DeviceGradients& grads) { grads.gradients().require_writable(); })
      .def("probe_read", &DeviceGradients::probe_read, py::arg("stream"))
      .def("probe_read_write", &DeviceGradients::probe_read_write, py::arg("stream"))
      .def("__len__", [](const DeviceGradients& grads) { return grads.gradients().spans().size(); })
      .def_property_readonly("names",
                             [](const DeviceGradients& grads) { return grads.gradients().names(); })
      .def_property_readonly(
          "has_float64",
          [](const DeviceGradients& grads) { return grads.gradients().has_float64(); })
      .def_property_readonly(
          "is_nothing", [](const DeviceGradients& grads) { return grads.gradients().is_nothing(); })
      .def_property_readonly(
          "missing", [](const DeviceGradients& grads) { return grads.gradients().missing(); })
      .def_property_readonly("device", &DeviceGradients::device)
      .def_property_readonly(
          "nbytes",
          [](const DeviceGradients& grads) { return grads.gradients().plan().total_bytes; })
      .def_property_readonly("num_elements", [](const DeviceGradients& grads) {
        return grads.gradients().elements();
      });

  m.def(
      "read",
      [](const py::object& grads, int device, std::uintptr_t stream, const std::string& leader,
         py::object allocate, bool is_kept) {
        return std::make_unique<DeviceGradients>(grads, device, stream, leader, std::move(allocate),
                                                 is_kept);
      },
      py::arg("grads"), py::arg("device"), py::arg("stream"), py::arg("leader"),
      py::arg("allocate"), py::arg("is_kept"));

  // Where the parts of a result lie, in bytes.
  m.def(
      "result_layout",
      [](std::size_t tensors, std::size_t groups) {
        const cuda::ResultLayout at{tensors, groups};
        return py::make_tuple(at.total_norm(), at.coefficients(), at.group_norms(), at.norms(),
                              at.flags(), at.nonfinite(), at.bytes());
      },
      py::arg("tensors"), py::arg("groups"));
  m.def(
      "copy_to_host",
      [](std::uintptr_t pointer, std::size_t bytes, int device, std::uintptr_t stream) {
        std::string host(bytes, '\0');
        {
          const gb::OnDevice on_device(device);  // whose default stream it may be
          const gb::GilRelease release;
          cuda::copy_to_host(host.data(), reinterpret_cast<const void*>(pointer), bytes,
                             reinterpret_cast<cuda::Stream>(stream));
        }
        return py::bytes(host);
      },
      py::arg("pointer"), py::arg("bytes"), py::arg("device"), py::arg("stream"));
  m.def(
      "device_of",
      [](std::uintptr_t pointer) {
        return cuda::pointer_info(reinterpret_cast<const void*>(pointer)).device;
      },
      py::arg("pointer"));

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
