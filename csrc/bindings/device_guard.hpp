#pragma once

#include <exception>

#include "cuda/engine.hpp"

namespace gradclip::bindings {

// The current device while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : before_(cuda::current_device()) {
    if (device != before_) cuda::set_device(device);
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    try {
      if (changed_) cuda::set_device(before_);
    } catch (const std::exception&) {
      return;  // It was the current one a moment ago: nothing works any more, as the next call will say.
    }
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_;
  bool changed_;
};

}  // namespace gradclip::bindings
