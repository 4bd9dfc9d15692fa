// Gradients on a device and a second list of arrays there.
#pragma once

#include "bindings/address.hpp"
#include "bindings/device_gradients.hpp"
#include "bindings/pair.hpp"

namespace gradclip::bindings {

class DevicePair {
 public:
  // Read on `stream`.
  DevicePair(std::shared_ptr<DeviceGradients> grads, const py::object& second,
             const Pair::Terms& terms, std::uintptr_t stream)
      : grads_(std::move(grads)),
        reader_(grads_->device(), pointer_at<CUstream_st>(stream), grads_->framework(), false,
                true),
        pair_([&] {
          const cuda::DeviceGuard guard(grads_->device());
          return Pair({grads_, &grads_->gradients()}, second, terms, grads_->reader(), reader_);
        }()) {}

  const std::shared_ptr<DeviceGradients>& gradients() const { return grads_; }
  const Pair& pair() const { return pair_; }
  DeviceReader& reader() { return reader_; }

 private:
  std::shared_ptr<DeviceGradients> grads_;
  DeviceReader reader_;
  Pair pair_;
};

}  // namespace gradclip::bindings
