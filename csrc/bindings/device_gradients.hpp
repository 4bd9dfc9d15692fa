// The calls of the CUDA module over gradients that have been read. What they return is described in
// python/gradclip/_cuda.pyi.
#pragma once

#include <list>
#include <mutex>

#include "bindings/arguments.hpp"
#include "bindings/device_reader.hpp"
#include "core/clip.hpp"

namespace gradclip::bindings {

class DeviceGradients {
 public:
  // Read on `stream` of `device`. `allocate(bytes)` makes memory of the device for results, an object
  // with `.ptr` that keeps it. `is_kept`: for many calls. `is_update`: the list is called new in messages.
  DeviceGradients(const py::object& grads, int device, std::uintptr_t stream,
                  const std::string& framework, py::object allocate, bool is_kept, bool is_update);
  ~DeviceGradients();

  py::object norms(const py::object& ord, std::uintptr_t stream);
  // `make(memory, groups, is_global, group_names)` makes the result of a call before anything is written.
  py::object clip_by_value(const py::object& limit, bool to_nearest, std::uintptr_t stream,
                           const py::object& make);
  void scale(const py::object& factor, std::uintptr_t stream);

  const Gradients& gradients() const { return gradients_; }
  DeviceReader& reader() { return reader_; }
  int device() const { return device_; }
  DeviceReader::Framework framework() const { return framework_; }
  // Memory of the device: an object with `.ptr` that keeps it.
  py::object allocate(std::size_t bytes) const { return allocate_(bytes); }

  // (index, NaN count, infinity count) of the tensors that hold such elements. Waits.
  py::list count_nonfinite(cuda::List& list, cuda::Stream stream) const;

 private:
  friend class DeviceCall;

  // What one grouping of the gradients has on the device. Memory of results is used where none can
  // be allocated: while a stream is captured.
  struct Kept {
    NamedGroups named;
    cuda::List list;
    py::object memory;
  };
  Kept& kept(const NamedGroups& named, bool is_capturing);
  py::object allocate_for(const cuda::ResultLayout& layout) const;

  int device_;
  DeviceReader::Framework framework_;
  py::object allocate_;
  DeviceReader reader_;
  Gradients gradients_;
  bool is_kept_;
  std::list<Kept> kept_;
  std::mutex kept_mutex_;  // nothing of Python is done under it
};

}  // namespace gradclip::bindings
