// What tests in Python ask of the emulator: the machine that it shows, and what a call has done.
#pragma once

#include <pybind11/pybind11.h>

namespace simt {

void add_emulator(pybind11::module_& m);

}  // namespace simt
