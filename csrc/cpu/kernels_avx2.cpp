#include "cpu/kernels.inc.hpp"

namespace gradclip::cpu {

const Kernels kAvx2Kernels = kernels();

}  // namespace gradclip::cpu
