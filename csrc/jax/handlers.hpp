// What XLA calls in a compiled program: measure, decide, apply over the engine of the device. python/gradclip/jax has
// the other side of it, and says what each takes.
//
// Sums are handed on in an array of uint32 of shape (parts, 6): a NormSum as words (core/sum_words.hpp), so that no float
// type of XLA's rounds them. Limits and factors are (n, 2): the words of a float64.
#pragma once

#include <cstddef>
#include <span>

namespace gradclip::jax {

struct Handler {
  const char* name;
  void* function;  // an XLA_FFI_Handler*
};
std::span<const Handler> handlers();       // of _core, for CPUs
std::span<const Handler> cuda_handlers();  // of _cuda, for NVIDIA's GPUs

}  // namespace gradclip::jax
