// One call on gradients of a device.
#pragma once

#include <optional>

#include "bindings/address.hpp"
#include "bindings/arguments.hpp"
#include "bindings/device_gradients.hpp"
#include "bindings/device_pair.hpp"
#include "bindings/gil.hpp"

namespace gradclip::bindings {

inline cuda::Stream as_stream(std::uintptr_t number) { return pointer_at<CUstream_st>(number); }
inline std::byte* pointer_of(const py::object& memory) {
  return pointer_at<std::byte>(memory.attr("ptr").cast<std::uintptr_t>());
}

// The device is the current one, the stream is ordered with the producers' before and after,
// and the list is ready: of gradients, or of `pairs`, whose second arrays `pair` has read.
class DeviceCall {
 public:
  DeviceCall(DeviceGradients& all, std::uintptr_t stream, const NamedGroups& named = {},
             DevicePair* pair = nullptr, const PairTable* pairs = nullptr)
      : all_(all), pair_(pair), stream_(as_stream(stream)), guard_(all.device_) {
    is_capturing_ = cuda::is_capturing(stream_);
    if (pair && is_capturing_)
      throw std::runtime_error(
          "grads: expected no second arrays while the stream is captured into a CUDA graph, for "
          "they are read and placed at each call");
    if (all.is_kept_ && is_capturing_ && all.reader_.has_producers_beside(stream_))
      throw std::runtime_error(
          "grads: expected a Plan of arrays that are all on the stream which is captured into a "
          "CUDA graph, got some whose producers have streams of their own");
    if (all.is_kept_ && !pair) {
      kept_ = &all.kept(named, is_capturing_);
    } else {
      const GilRelease release;
      own_.emplace(all.gradients_.spans(), named.groups, named.rows.get(), all.device_, stream_,
                   pairs);
    }
    if (all.is_kept_) all.reader_.wait_for_producers(stream_);
  }
  // Where an exception ends it, too: what was enqueued will run.
  ~DeviceCall() {
    if (is_over_) return;
    try {
      end();
    } catch (const std::exception&) {
      return;  // The exception that is under way says more.
    }
  }
  void end() {
    is_over_ = true;
    own_.reset();
    all_.reader_.let_producers_wait(stream_);
    if (pair_) pair_->reader().let_producers_wait(stream_);
  }

  cuda::List& list() { return kept_ ? kept_->list : *own_; }
  cuda::Stream stream() const { return stream_; }
  bool is_capturing() const { return is_capturing_; }
  py::object allocate() {
    return is_capturing_ ? kept_->memory : all_.allocate_for(list().layout());
  }

 private:
  DeviceGradients& all_;
  DevicePair* pair_;
  cuda::Stream stream_;
  cuda::DeviceGuard guard_;
  bool is_capturing_ = false, is_over_ = false;
  std::optional<cuda::List> own_;
  DeviceGradients::Kept* kept_ = nullptr;
};

}  // namespace gradclip::bindings
