#include "cpu/kernels.inc.hpp"

namespace gradclip::cpu {

const Kernels kBaselineKernels = kernels();

}  // namespace gradclip::cpu
