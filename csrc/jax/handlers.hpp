// What XLA calls in a compiled program: measure, decide, apply over the CPU engine. python/gradclip/jax has the other
// side of it, and says what each takes.
//
// Sums are handed on in an array of uint32 of shape (parts, 6): a NormSum as the words of value, exponent (two) and
// unit, so that no float type of XLA's rounds them. Limits and factors are (n, 2): the words of a float64.
#pragma once

#include <cstddef>
#include <span>

namespace gradclip::jax {

struct Handler {
  const char* name;
  void* function;  // an XLA_FFI_Handler*
};
std::span<const Handler> handlers();

}  // namespace gradclip::jax
