#pragma once

#include <exception>

#include "cuda/engine.hpp"

namespace gradclip::bindings {

// The current device while it lives.
class OnDevice {
 public:
  explicit OnDevice(int device) : before_(cuda::current_device()) {
    if (device != before_) cuda::set_device(device);
    changed_ = device != before_;
  }
  ~OnDevice() {
    try {
      if (changed_) cuda::set_device(before_);
    } catch (const std::exception&) {
      // It was the current one a moment ago: nothing on it works any more, as the next call will say.
    }
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_;
  bool changed_;
};

}  // namespace gradclip::bindings
