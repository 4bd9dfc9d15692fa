#include "fiber.hpp"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
namespace {

constexpr std::size_t kStackBytes = std::size_t{256} << 10, kGuardBytes = 4096;

// Where resume() was called; one fiber at a time runs.
ucontext_t resumer;
Fiber* running = nullptr;
[[maybe_unused]] void* resumer_state = nullptr;
[[maybe_unused]] const void* resumer_stack = nullptr;
[[maybe_unused]] std::size_t resumer_stack_bytes = 0;
void (*body_of_next)() = nullptr;

#if defined(__SANITIZE_ADDRESS__)
void before_switch(void** state, const void* stack, std::size_t bytes) {
  __sanitizer_start_switch_fiber(state, stack, bytes);
}
void after_switch(void* state, const void** stack, std::size_t* bytes) {
  __sanitizer_finish_switch_fiber(state, stack, bytes);
}
#else
void before_switch(void**, const void*, std::size_t) {}
void after_switch(void*, const void**, std::size_t*) {}
#endif

void entry() {
  after_switch(nullptr, &resumer_stack, &resumer_stack_bytes);
  body_of_next();
  Fiber::leave(true);
  std::abort();  // nobody resumes a fiber that has ended
}

}  // namespace

Fiber::Fiber() {
  void* const memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  // A stack that grows too far is an error here and now.
  mprotect(memory, kGuardBytes, PROT_NONE);
  stack_ = static_cast<std::byte*>(memory) + kGuardBytes;
}

Fiber::~Fiber() { munmap(stack_ - kGuardBytes, kStackBytes + kGuardBytes); }

void Fiber::start(void (*body)()) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, kStackBytes);  // frames of a fiber that was left
#endif
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  body_of_next = body;
  makecontext(&context_, entry, 0);
}

void Fiber::resume() {
  running = this;
  before_switch(&resumer_state, stack_, kStackBytes);
  swapcontext(&resumer, &context_);
  after_switch(resumer_state, nullptr, nullptr);
  running = nullptr;
}

void Fiber::leave(bool for_good) {
  Fiber* const self = running;
  before_switch(for_good ? nullptr : &self->sanitizer_state_, resumer_stack, resumer_stack_bytes);
  swapcontext(&self->context_, &resumer);
  after_switch(self->sanitizer_state_, &resumer_stack, &resumer_stack_bytes);
}

}  // namespace simt
