// Arrays of one CUDA device: how they are read, and how the streams of those who made them are ordered
// with the stream of a call.
#pragma once

#include <array>
#include <vector>

#include "bindings/gradients.hpp"
#include "cuda/engine.hpp"

namespace gradclip::bindings {

class DeviceReader {
 public:
  // Whose arrays lie on the call's stream, because it is their current one.
  enum Framework { cupy, torch };
  static Framework framework_named(const std::string& name);

  // `stream` waits for what the producers of the arrays have enqueued until they are read.
  // `kept`: is_kept, as of HostReader.
  DeviceReader(int device, cuda::Stream stream, Framework framework, bool kept,
               bool may_require_grad = false);

  const bool is_kept;
  static constexpr bool kRunsChunks = false;  // a GPU's blocks share the work by themselves

  // A CuPy array, or one with __cuda_array_interface__.
  bool is_device_array(py::handle object) const;
  // One that lies on the call's stream.
  bool is_of_framework(py::handle object) const;
  static void prefetch(PyObject* object) { __builtin_prefetch(object); }
  // A dense cupy.ndarray. False if it is anything else.
  bool read_plain(PyObject* object, Span& span);
  void read(PyObject* object, const EntryName& name, Entry& entry);
  // As of HostReader: what a tensor's memory is now. A CuPy array keeps its own.
  bool read_plain_again(PyObject* object, Span& span) const {
    return read_plain_torch(object, place_, span);
  }
  Again read_again(PyObject* object, const EntryName& name, Entry& entry) const;

  // The same arrays, used again: `stream` waits for what has been enqueued since.
  void wait_for_producers(cuda::Stream stream) const;
  // Whether any of that is asked for: what a captured stream must not do.
  bool has_producers_beside(cuda::Stream stream) const;
  // The producers' streams wait for `stream`; the host does where a producer does not say what its
  // stream is.
  void let_producers_wait(cuda::Stream stream) const;

 private:
  bool is_cupy_array(PyObject* object) const;
  void read_cupy(py::handle array, const EntryName& name, Entry& entry);
  void read_cuda_interface(py::handle object, const EntryName& name, Entry& entry);
  void add_stream(cuda::Stream stream);
  bool is_of_cupys_pool(const py::object& data);
  // `cupys`: the MemoryPointer of a CuPy array.
  bool is_device_memory(const std::byte* data, const py::object* cupys = nullptr);
  void check_memory(const Span& span, const EntryName& name);

  Place place_;
  Framework framework_;
  py::object cupy_array_;  // the type; None if nobody has imported CuPy
  py::object pooled_;      // the type of memory of its pools, once it is asked for
  // Granules of memory whose kind has been asked for.
  static constexpr std::size_t kGranules = 64;
  std::array<std::uintptr_t, kGranules> known_granules_{};  // 0: none; null pointers lie there
  std::vector<cuda::Stream> streams_;                       // of producers, each once
  std::vector<py::object> exporters_;  // arrays of which only __dlpack__ knows the stream
};

}  // namespace gradclip::bindings
