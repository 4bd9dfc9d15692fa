#include "cpu/kernels.inc.hpp"

namespace gradclip::cpu {

const Kernels kAvx512Kernels = kernels();

}  // namespace gradclip::cpu
