// A Python sequence or mapping of arrays, read into spans in one pass that makes every check.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <deque>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/plan.hpp"
#include "core/span.hpp"

namespace gradclip::bindings {

namespace py = pybind11;

// An error that names the entry, to be raised now or, for what only writing minds, when it is tried.
struct Problem {
  enum Kind { type_error, value_error } kind;
  std::string message;
  [[noreturn]] void raise() const;
};

// "grads[3]" or "grads['h.0.attn.w']".
std::string entry_name(std::size_t index, const py::object& names);

// The name of an entry, made only when a message needs it.
class EntryName {
 public:
  EntryName(std::size_t index, const py::object& names) : index_(index), names_(&names) {}
  // Of an array that is not one of `grads`.
  explicit EntryName(const char* argument) : argument_(argument) {}
  std::string operator()() const { return argument_ ? argument_ : entry_name(index_, *names_); }
  // "<name>: expected <expected>, got <got>"
  Problem problem(Problem::Kind kind, const std::string& expected, const std::string& got) const {
    return {kind, (*this)() + ": expected " + expected + ", got " + got};
  }

 private:
  const char* argument_ = nullptr;
  std::size_t index_ = 0;
  const py::object* names_ = nullptr;
};

// What an array reader finds out about one entry. The readers check what any use needs and raise;
// what forbids only writing goes to `unwritable` ("writable memory, got a read-only array").
struct Entry {
  Span span;
  std::optional<StridedLayout> layout;
  std::optional<Problem> unwritable;
  py::object owner;  // what keeps the memory alive beside the array itself
};

// "torch.Tensor".
std::string full_type_name(py::handle object);

// To be called once, before any of the following.
void init_numpy();
bool is_numpy_array(PyObject* object);
// The element type of a numpy.dtype; TypeError if gradclip does not know it.
std::optional<DType> find_dtype(PyObject* numpy_dtype);
DType dtype_of(PyObject* numpy_dtype, const EntryName& name);
// Asks the cache for the shape of a numpy.ndarray that will be read soon.
void prefetch_shape(PyObject* object);
// The case that nearly every entry is: a dense, writable numpy.ndarray of a known dtype. False if it is
// anything else.
bool read_plain_numpy(PyObject* object, Span& span);
void read_numpy(PyObject* array, const EntryName& name, Entry& entry);
bool is_torch_tensor(py::handle object);
bool is_jax_array(py::handle object);

// Where the arrays of a call must lie: on the CPU, or on one CUDA device.
struct Place {
  int device = -1;            // the number of the CUDA device
  std::uintptr_t stream = 0;  // of that device: what DLPack exports must be ready for
};
void read_dlpack(py::handle object, const EntryName& name, const Place& place, Entry& entry);
// A C-contiguous plain torch.Tensor or Parameter in that place. False if it is anything else. Nothing keeps
// its storage alive but the tensor.
bool read_plain_torch(PyObject* object, const Place& place, Span& span);

// Set the span of `entry` from a shape and strides in bytes.
void set_layout(Entry& entry, std::byte* data, std::size_t axes, const std::int64_t* shape,
                const std::int64_t* strides);

// Reads arrays on the CPU.
struct HostReader {
  // User code runs while the arrays are in use, which could give a torch tensor another storage.
  bool keeps_storages = false;

  static void prefetch(PyObject* object) { prefetch_shape(object); }
  // The common case: a dense, writable array. False if it is anything else.
  bool read_plain(PyObject* object, Span& span) const {
    return read_plain_numpy(object, span) ||
           (!keeps_storages && read_plain_torch(object, Place{}, span));
  }
  void read(PyObject* object, const EntryName& name, Entry& entry) const;
};

class Gradients {
 public:
  // Throws a Python exception that names the entry which cannot be read. A reader is like HostReader.
  template <class Reader>
  Gradients(const py::object& grads, Reader&& reader) {
    take_arrays(grads);
    const std::size_t count = arrays_.size();
    for (std::size_t i = 0; i < count; ++i) {
      // The last call's kernels have put the array objects out of the cache.
      if (i + 16 < count) __builtin_prefetch(PyTuple_GET_ITEM(arrays_.ptr(), i + 16));
      if (i + 8 < count) reader.prefetch(PyTuple_GET_ITEM(arrays_.ptr(), i + 8));
      PyObject* const object = PyTuple_GET_ITEM(arrays_.ptr(), i);
      Span span;
      if (object == Py_None || reader.read_plain(object, span)) {
        spans_.push_back(span);
        continue;
      }
      Entry entry;
      reader.read(object, EntryName(i, names_), entry);
      add(std::move(entry));
    }
    make_plan_of_spans();
  }
  // The layouts of spans point into the object.
  Gradients(Gradients&&) = default;
  Gradients(const Gradients&) = delete;

  // Look for entries that overlap themselves or one another; require_writable tells what is found.
  void find_overlaps();
  // Throws if some entry must not be written: read-only, immutable, overlapping.
  void require_writable() const;
  // Throws if some entry is complex.
  void require_real() const;

  std::span<const Span> spans() const { return spans_; }
  const Plan& plan() const { return plan_; }
  const py::object& names() const { return names_; }  // tuple of str, or None
  const py::tuple& arrays() const { return arrays_; }
  std::int64_t elements() const;
  // Whether float64 or complex128 is among the dtypes.
  bool has_float64() const;

 private:
  void take_arrays(const py::object& grads);
  void add(Entry&& entry);
  void make_plan_of_spans();

  Table<Span> spans_;
  Plan plan_;
  std::deque<StridedLayout> layouts_;  // of the spans that are not dense; addresses must stay
  py::tuple arrays_;
  std::vector<py::object> owners_;
  py::object names_ = py::none();
  std::optional<Problem> unwritable_;  // the first one
};

}  // namespace gradclip::bindings
