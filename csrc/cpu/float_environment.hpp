// Kernels run in the default floating-point environment whatever the caller has set: a process that
// flushes subnormal numbers to zero (torch.set_flush_denormal, -ffast-math in any loaded library)
// would get other bits, and lose gradients below 1e-38.
#pragma once

#include <cfenv>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace gradclip::cpu {

class DefaultFloatEnvironment {
 public:
#if defined(__SSE2__)
  using State = unsigned;
  static State enter() {
    const State saved = _mm_getcsr();
    // Exception flags aside. Writing costs more than reading: only where it differs.
    if ((saved & ~kFlags) != kDefault) _mm_setcsr(kDefault);
    return saved;
  }
  static void leave(const State& saved) {
    if ((saved & ~kFlags) != kDefault) _mm_setcsr(saved);
  }

 private:
  static constexpr unsigned kFlags = 0x3f, kDefault = 0x1f80;
#else
  using State = std::fenv_t;
  static State enter() {
    State saved;
    std::fegetenv(&saved);
    std::fesetenv(FE_DFL_ENV);
    return saved;
  }
  static void leave(const State& saved) { std::fesetenv(&saved); }
#endif

 public:
  DefaultFloatEnvironment() : saved_(enter()) {}
  ~DefaultFloatEnvironment() { leave(saved_); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  State saved_;
};

}  // namespace gradclip::cpu
