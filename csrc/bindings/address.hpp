// Pointers and streams, which Python knows as numbers.
#pragma once

#include <cstdint>

namespace gradclip::bindings {

template <class T>
T* pointer_at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);  // NOLINT(performance-no-int-to-ptr): so they come
}

}  // namespace gradclip::bindings
