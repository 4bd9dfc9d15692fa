// The calls of the CUDA module over gradients that have been read. What they return is described in
// python/gradclip/_cuda.pyi.
#pragma once

#include <list>
#include <mutex>

#include "bindings/device_reader.hpp"
#include "core/clip.hpp"

namespace gradclip::bindings {

class DeviceGradients {
 public:
  // Read on `stream` of `device`. `allocate(bytes)` makes memory of the device for results, an object
  // with `.ptr` that keeps it. `is_kept`: for many calls.
  DeviceGradients(const py::object& grads, int device, std::uintptr_t stream,
                  const std::string& leader, py::object allocate, bool is_kept);
  ~DeviceGradients();

  // `make(memory, groups, is_global, group_names)` makes the result of a call before anything is written.
  py::object norms(const py::object& ord, std::uintptr_t stream);
  py::tuple clip(const py::object& max_norm, const py::object& ord, const py::object& groups,
                 const py::object& grad_scale, const py::object& nonfinite,
                 const py::object& reduce, std::uintptr_t stream, double epsilon,
                 const py::object& make);
  // As of calls.hpp; `norm` is a float64 number on the device.
  void clip_with_norm(const py::object& norm, const py::object& max_norm, std::uintptr_t stream,
                      double epsilon);
  py::object clip_by_value(const py::object& limit, bool to_nearest, std::uintptr_t stream,
                           const py::object& make);
  void scale(const py::object& factor, std::uintptr_t stream);
  // The device's own speed over the same memory, to be timed by the caller.
  void probe_read(std::uintptr_t stream);
  void probe_read_write(std::uintptr_t stream);

  const Gradients& gradients() const { return gradients_; }
  int device() const { return device_; }

 private:
  // What one grouping of the gradients has on the device. Memory of results is used where none can
  // be allocated: while a stream is captured.
  struct Kept {
    Groups groups;
    cuda::List list;
    py::object memory;
  };
  class Call;

  Kept& kept(const Groups& groups, bool is_capturing);
  py::object allocate_for(const cuda::ResultLayout& layout) const;
  py::list count_nonfinite(cuda::List& list, cuda::Stream stream) const;

  int device_;
  DeviceReader::Leader leader_;
  py::object allocate_;
  DeviceReader reader_;
  Gradients gradients_;
  bool is_kept_;
  std::list<Kept> kept_;
  std::mutex kept_mutex_;  // nothing of Python is done under it
};

}  // namespace gradclip::bindings
