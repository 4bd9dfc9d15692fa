#include "emulated_module.hpp"

#include <cuda_runtime.h>
#include <pybind11/stl.h>

#include "bindings/address.hpp"

namespace simt {

namespace {
std::size_t waits_with_gil = 0;
}

void add_emulator(pybind11::module_& m) {
  namespace py = pybind11;
  machine().on_host_wait = [] { waits_with_gil += PyGILState_Check() != 0; };
  m.def(
      "set_machine",
      [](int multiprocessors, bool is_capturing, bool is_busy, unsigned seed,
         unsigned blocks_at_once, bool others_capture, std::uintptr_t busy_stream) {
        machine().multiprocessors = multiprocessors;
        machine().is_capturing = is_capturing;
        machine().is_busy = is_busy;
        machine().others_capture = others_capture;
        machine().broken_captures = 0;
        machine().busy_stream = gradclip::bindings::pointer_at<CUstream_st>(busy_stream);
        machine().contexts.clear();
        machine().memory.clear();
        machine().waits.clear();
        schedule() = {seed, blocks_at_once};
      },
      py::kw_only(), py::arg("multiprocessors") = 1, py::arg("is_capturing") = false,
      py::arg("is_busy") = false, py::arg("seed") = 0, py::arg("blocks_at_once") = 1,
      py::arg("others_capture") = false, py::arg("busy_stream") = 0);
  // Let [begin, end) be memory of a device (-1: of none), the rest of the address space stay.
  m.def(
      "set_memory",
      [](std::uintptr_t begin, std::uintptr_t end, int device, bool managed) {
        machine().memory[begin] = {device, managed};
        machine().memory.try_emplace(end, Machine::Memory{0, false});
      },
      py::arg("begin"), py::arg("end"), py::arg("device"), py::arg("managed"));
  m.def("current_device", [] { return machine().current_device; });
  // Devices on which something made a context, and how often somebody else's capture was broken.
  m.def("contexts", [] { return machine().contexts; });
  m.def("broken_captures", [] { return machine().broken_captures; });
  m.def("unload_kernels", [] { machine().loaded.clear(); });
  m.def("stream_of_last_wait",
        [] { return reinterpret_cast<std::uintptr_t>(machine().last_wait); });
  // Calls of the runtime since the process began, by name.
  m.def("calls", [] { return machine().calls; });
  m.def("bytes_copied", [] { return counters().bytes_copied; });
  // (launches, allocations, copies, host waits) since the process began.
  m.def("counters", [] {
    const Counters& all = counters();
    return py::make_tuple(all.launches, all.allocations, all.copies, all.waits);
  });
  // How often the host might have waited for the device with the GIL in its hands. What the device is at
  // may need the GIL to end: a callback on a stream.
  m.def("waits_with_gil", [] { return waits_with_gil; });
  // (waiting stream, stream that it waits for), in the order in which it was asked for.
  m.def("stream_waits", [] {
    std::vector<std::pair<std::uintptr_t, std::uintptr_t>> waits;
    for (const auto& [waiting, before] : machine().waits)
      waits.emplace_back(reinterpret_cast<std::uintptr_t>(waiting),
                         reinterpret_cast<std::uintptr_t>(before));
    return waits;
  });
}

}  // namespace simt
