#include "cpu/isa.hpp"

#include <atomic>
#include <stdexcept>

namespace gradclip::cpu {
namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool supported;
};

// Best first, and never destroyed: a daemon thread may be in a kernel while the process exits. The
// feature lists are those of the compile flags in CMakeLists.txt.
const std::vector<Isa>& isas() {
  static const auto& all = *new std::vector<Isa>([] {
    std::vector<Isa> list;
#if defined(GRADCLIP_X86_KERNELS)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    list.push_back({"avx512", &kAvx512Kernels, avx512});
    list.push_back({"avx2", &kAvx2Kernels, avx2});
#endif
    list.push_back({"baseline", &kBaselineKernels, true});
    return list;
  }());
  return all;
}

const Isa* best_isa() {
  const Isa* best = &isas().front();
  while (!best->supported) ++best;
  return best;
}

std::atomic<const Isa*> current{best_isa()};

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (isa.supported) names.emplace_back(isa.name);
  return names;
}

const Kernels& kernels() { return *current.load(std::memory_order_relaxed)->kernels; }
const char* isa_name() { return current.load(std::memory_order_relaxed)->name; }

void set_isa(const std::string& name) {
  std::string choices;
  for (const Isa& isa : isas()) {
    if (isa.supported && name == isa.name) {
      current.store(&isa, std::memory_order_relaxed);
      return;
    }
    if (isa.supported) choices += std::string(choices.empty() ? "" : ", ") + isa.name;
  }
  throw std::invalid_argument("GRADCLIP_ISA: expected one of " + choices +
                              " (what this machine supports), got '" + name + "'");
}

}  // namespace gradclip::cpu
