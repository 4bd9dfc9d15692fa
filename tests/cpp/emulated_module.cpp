#include "emulated_module.hpp"

#include <cuda_runtime.h>
#include <pybind11/stl.h>

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
         unsigned blocks_at_once) {
        machine().multiprocessors = multiprocessors;
        machine().is_capturing = is_capturing;
        machine().is_busy = is_busy;
        machine().memory.clear();
        machine().waits.clear();
        schedule() = {seed, blocks_at_once};
      },
      py::kw_only(), py::arg("multiprocessors") = 1, py::arg("is_capturing") = false,
      py::arg("is_busy") = false, py::arg("seed") = 0, py::arg("blocks_at_once") = 1);
  // Let [begin, end) be memory of a device (-1: of none), the rest of the address space stay.
  m.def(
      "set_memory",
      [](std::uintptr_t begin, std::uintptr_t end, int device, bool managed) {
        machine().memory[begin] = {device, managed};
        machine().memory.try_emplace(end, Machine::Memory{0, false});
      },
      py::arg("begin"), py::arg("end"), py::arg("device"), py::arg("managed"));
  m.def("current_device", [] { return machine().current_device; });
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
