// Handlers as jax.ffi.register_ffi_target takes them, by name.
#pragma once

#include <pybind11/pybind11.h>

#include <span>

#include "jax/handlers.hpp"

namespace gradclip::bindings {

inline pybind11::dict to_capsules(std::span<const jax::Handler> handlers) {
  pybind11::dict capsules;
  for (const jax::Handler& handler : handlers)
    capsules[handler.name] = pybind11::capsule(handler.function, "xla._CUSTOM_CALL_TARGET");
  return capsules;
}

}  // namespace gradclip::bindings
