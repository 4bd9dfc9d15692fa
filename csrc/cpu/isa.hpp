// Which instruction set the kernels use: chosen once, at run time.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.hpp"

namespace gradclip::cpu {

// What this machine can run, best first: of "avx512", "avx2", "baseline".
std::vector<std::string> supported_isas();

// The kernels in use, and their name: the best supported ones unless set_isa chose others.
const Kernels& kernels();
const char* isa_name();

// Throws std::invalid_argument, saying what there is, if `name` is unknown or unsupported here.
void set_isa(const std::string& name);

}  // namespace gradclip::cpu
