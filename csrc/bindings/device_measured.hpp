// Measure, decide, apply on a device: the twin of measured.hpp. What was measured stays there.
#pragma once

#include <memory>

#include "bindings/arguments.hpp"
#include "bindings/device_gradients.hpp"
#include "bindings/device_pair.hpp"

namespace gradclip::bindings {

class DeviceCall;

class DeviceMeasured {
 public:
  // `pair`: as of Measured.
  DeviceMeasured(std::shared_ptr<DeviceGradients> grads, const MeasureArguments& arguments,
                 std::uintptr_t stream, std::shared_ptr<DevicePair> pair);
  // `norm`: a float64 number on the device.
  DeviceMeasured(std::shared_ptr<DeviceGradients> grads, const py::object& norm,
                 std::uintptr_t stream);

  static DeviceMeasured measure(std::shared_ptr<DeviceGradients> grads,
                                std::shared_ptr<DevicePair> pair, const MeasureCall& call,
                                std::uintptr_t stream);
  // These return what `make` has made and, if asked to raise, what count_nonfinite() returns, else None.
  static py::tuple clip(DeviceGradients& grads, DevicePair* pair, const ClipCall& call,
                        std::uintptr_t stream, const py::object& make);
  py::tuple clip_measured(const py::object& max_norm, const py::object& nonfinite,
                          const py::object& formula, std::uintptr_t stream, const py::object& make);
  py::tuple scale_measured(const py::object& coefficients, const py::object& nonfinite,
                           std::uintptr_t stream, const py::object& make);

  const py::object& memory() const { return memory_; }
  std::size_t groups() const { return groups_; }
  bool is_global() const { return named_.groups.kind == Groups::all; }
  const py::object& group_names() const { return named_.names; }
  py::object group_sizes() const { return bindings::group_sizes(named_, grads_->gradients()); }

 private:
  py::tuple apply(const py::object& limits, bool are_coefficients, ClipOptions options,
                  std::uintptr_t stream, const py::object& make);

  std::shared_ptr<DeviceGradients> grads_;
  std::shared_ptr<DevicePair> pair_;  // null: there is none
  std::shared_ptr<const PairTable> pairs_;
  NamedGroups named_;
  double grad_scale_ = 1.0;
  NormOrder order_;
  bool is_alone_ = false;  // as of Measured
  std::size_t groups_ = 1;
  py::object memory_;  // laid out as cuda::ResultLayout says
  bool is_used_ = false;
};

}  // namespace gradclip::bindings
