// A Python sequence or mapping of arrays, read into spans in one pass that makes every check.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <atomic>
#include <list>
#include <map>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "bindings/text.hpp"
#include "core/rows.hpp"
#include "core/span.hpp"
#include "cpu/plan.hpp"

namespace gradclip::bindings {

namespace py = pybind11;

// An error that names the entry, to be raised now or, for what only writing minds, when it is tried.
struct Problem {
  enum Kind { type_error, value_error } kind;
  std::string message;
  [[noreturn]] void raise() const;
};

// "grads[3]" or "grads['h.0.attn.w']".
std::string entry_name(const char* list, std::size_t index, const py::object& names);

// The name of an entry, made only when a message needs it.
class EntryName {
 public:
  // Of a list: the argument that it came as.
  EntryName(const char* list, std::size_t index, const py::object& names)
      : argument_(list), index_(index), names_(&names) {}
  // Of an array that is in none.
  explicit EntryName(const char* argument) : argument_(argument) {}
  std::string operator()() const {
    return names_ ? entry_name(argument_, index_, *names_) : argument_;
  }
  // "<name>: expected <expected>, got <got>"
  Problem problem(Problem::Kind kind, const std::string& expected, const std::string& got) const {
    return {kind, (*this)() + ": expected " + expected + ", got " + got};
  }

 private:
  const char* argument_;
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

  // The span with its layout, while the entry lives.
  Span placed() const {
    Span placed = span;
    if (layout) placed.layout = &*layout;
    return placed;
  }
};

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
// The axes of an array, as they are, with strides in bytes of either sign.
using Axes = std::vector<StridedLayout::Axis>;
Axes numpy_axes(PyObject* array);
// So that the first axis is that of the rows. False if there is none.
bool lead_with_rows(Axes& axes, RowKind kind);
// Of what read_torch reads.
std::optional<Axes> find_torch_axes(PyObject* object);
// Of the capsule that an export has made.
std::optional<Axes> find_exported_axes(PyObject* capsule);
// Whether an array's memory lies in that of the array that owns it, where that can be seen: its resize
// (refcheck=False) may have moved it.
bool lies_in_its_owner(PyObject* array, const Span& span);
bool is_torch_tensor(py::handle object);
bool is_jax_array(py::handle object);

// Where the arrays of a call must lie: on the CPU, or on one CUDA device.
struct Place {
  int device = -1;                // the number of the CUDA device
  std::uintptr_t stream = 0;      // of that device: what DLPack exports must be ready for
  bool may_require_grad = false;  // torch tensors, which then are only read
};
void read_dlpack(py::handle object, const EntryName& name, const Place& place, Entry& entry);
// A C-contiguous torch.Tensor or Parameter (no subclass) in that place. False if it is anything else.
// Nothing keeps its storage alive but the tensor.
bool read_plain_torch(PyObject* object, const Place& place, Span& span);
// The same of any layout. False also if it is a tensor that read_dlpack refuses. No code of the user's runs.
bool read_torch(PyObject* object, const EntryName& name, const Place& place, Entry& entry);
// Whether the object is of these two types.
bool is_plain_torch(PyObject* object);

// A shape, and strides in units of `unit` bytes; none means C order. Both may hold anything.
struct Shape {
  std::int64_t axes;
  const std::int64_t* sizes;
  const std::int64_t* strides;
  std::int64_t unit;
};
// Set the span of `entry`, whose dtype is known. ValueError for a shape that no memory has.
void set_layout(Entry& entry, std::byte* data, const Shape& shape, const EntryName& name);

// Raise what went wrong in the entry's own code as an error that names the entry. A lack of memory is
// raised as it is, and so is what is no error of the code (Ctrl-C).
[[noreturn]] void raise_with_name(py::error_already_set& error, const EntryName& name);

// Whether an argument is converted without running code of the user's.
bool is_plain(const py::object& argument);

// How an entry that has been read looks now. `held`: it cannot tell without running code of the user's;
// what it exported holds the memory.
enum class Again { read, held, gone };

// Reads arrays on the CPU.
struct HostReader {
  static constexpr bool kRunsChunks = true;
  // For many calls, between which a torch tensor may be given another storage.
  bool is_kept = false;
  Place place = {};

  static void prefetch(PyObject* object) { prefetch_shape(object); }
  // The common case: a dense, writable array. False if it is anything else.
  bool read_plain(PyObject* object, Span& span) const {
    return read_plain_numpy(object, span) || (!is_kept && read_plain_torch(object, place, span));
  }
  void read(PyObject* object, const EntryName& name, Entry& entry) const;
  // The same two once more; no code of the user's runs.
  bool read_plain_again(PyObject* object, Span& span) const {
    return (read_plain_numpy(object, span) && lies_in_its_owner(object, span)) ||
           read_plain_torch(object, place, span);
  }
  Again read_again(PyObject* object, const EntryName& name, Entry& entry) const;
};

class Gradients {
 public:
  // Throws a Python exception that names the entry which cannot be read. A reader is like HostReader.
  // `argument`: what the list is called in messages. `names`: of a sequence that belongs to another list.
  template <class Reader>
  Gradients(const py::object& grads, Reader&& reader, const char* argument = "grads",
            const py::object& names = py::none())
      : is_kept_(reader.is_kept), argument_(argument), names_(names) {
    take_arrays(grads);
    read_arrays(reader);
  }
  // The layouts of spans point into the object.
  Gradients(const Gradients&) = delete;

  // To be called before memory is touched: between calls of a plan, and where arguments are converted, it
  // may have been given up.
  template <class Reader, class... Arguments>
  void recheck(Reader&& reader, const Arguments&... arguments) const {
    if (is_kept_ || !(is_plain(arguments) && ...)) require_unchanged(reader);
  }
  // Throws if some entry does not lie where it was when it was read. Runs no code of the user's.
  template <class Reader>
  void require_unchanged(Reader&& reader) const {
    for (std::size_t i = 0; i < spans_.size(); ++i) {
      if (i + 8 < spans_.size()) reader.prefetch(PyTuple_GET_ITEM(arrays_.ptr(), i + 8));
      PyObject* const object = PyTuple_GET_ITEM(arrays_.ptr(), i);
      if (object == Py_None) continue;
      Span plain;
      if (reader.read_plain_again(object, plain) && same_memory(plain, spans_[i])) continue;
      const EntryName name = name_at(i);
      Entry now;
      const Again again = reader.read_again(object, name, now);
      if (again == Again::gone || (again == Again::read && !same_memory(now.placed(), spans_[i])))
        refuse_changed(name, now);
    }
  }

  // Throws if some entry must not be written: read-only, immutable, overlapping itself or another one.
  void require_writable() const;
  // Throws if some entry is complex.
  void require_real() const;
  // The rows of every entry. Throws if one has no axes (units: has one unit then), or not as many samples as the
  // others.
  RowTable rows(RowKind kind) const;

  bool is_kept() const { return is_kept_; }
  std::span<const Span> spans() const { return spans_; }
  // Of gradients on the CPU.
  const cpu::ChunkPlan& plan() const { return plan_; }
  std::int64_t nbytes() const { return nbytes_; }
  const py::object& names() const { return names_; }  // tuple of str, or None
  const py::tuple& arrays() const { return arrays_; }
  // Those that are None.
  std::vector<std::size_t> missing() const;
  // Tell autograd that torch tensors are about to change, so that whoever saved one for backward finds out.
  void mark_written() const;
  std::int64_t elements() const;
  // Whether float64 or complex128 is among the dtypes.
  bool has_float64() const;
  // Whether no other is.
  bool has_only_float64() const;

  EntryName name_at(std::size_t i) const { return {argument_, i, names_}; }
  const char* argument() const { return argument_; }
  bool is_missing(std::size_t i) const { return PyTuple_GET_ITEM(arrays_.ptr(), i) == Py_None; }
  // As it is now, or was when the entry was exported. Kernels are given what recheck() finds unchanged.
  StridedArray array_of(std::size_t i) const;

 private:
  template <class Reader>
  void read_arrays(Reader&& reader) {
    const std::size_t count = arrays_.size();
    spans_.reserve(count);
    bool ran_code = false;
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
      const EntryName name = name_at(i);
      Entry entry;
      try {
        reader.read(object, name, entry);
      } catch (py::error_already_set& error) {
        raise_with_name(error, name);
      }
      ran_code = ran_code || entry.owner;
      add(std::move(entry));
    }
    // An export runs code of its own, which may have given another entry other memory.
    if (ran_code) require_unchanged(reader);
    if constexpr (std::remove_cvref_t<Reader>::kRunsChunks)
      make_plan_of_spans();
    else
      count_bytes();
  }
  static bool same_memory(const Span& now, const Span& before) {
    return now.data == before.data && now.numel == before.numel && now.dtype == before.dtype &&
           (now.layout && before.layout ? now.layout->axes == before.layout->axes
                                        : now.layout == before.layout);
  }
  [[noreturn]] static void refuse_changed(const EntryName& name, const Entry& now);
  RowSpan rows_of(std::size_t i, RowKind kind, std::list<StridedLayout>& layouts) const;
  void take_arrays(const py::object& grads);
  void add(Entry&& entry);
  void count_bytes();
  void make_plan_of_spans();
  std::optional<Problem> find_overlaps() const;

  bool is_kept_;
  const char* argument_;
  Table<Span> spans_;
  std::int64_t nbytes_ = 0;
  cpu::ChunkPlan plan_;
  std::list<StridedLayout> layouts_;  // of the spans that are not dense; addresses must stay
  py::tuple arrays_;
  std::map<std::size_t, py::object> owners_;  // by entry
  py::object names_;
  mutable std::optional<Problem> unwritable_;  // the first one
  mutable std::mutex overlaps_mutex_;
  mutable std::atomic<bool> knows_overlaps_ = false;  // looked for when somebody wants to write
};

}  // namespace gradclip::bindings
