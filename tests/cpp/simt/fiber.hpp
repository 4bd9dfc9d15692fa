// A fiber: a function with a stack of its own, which can be left in its middle and gone on with.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <functional>

namespace simt {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Begin `body` at the next resume(). A fiber that was left in its middle is forgotten.
  void start(void (*body)());
  // Run until the fiber leaves itself or its body ends.
  void resume();
  // Leave the fiber that runs; `for_good` at the end of its body.
  static void leave(bool for_good);

 private:
  std::byte* stack_;
  ucontext_t context_;
  void* sanitizer_state_ = nullptr;
};

}  // namespace simt
