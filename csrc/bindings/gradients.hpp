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
  EntryName(std::size_t index, const py::object& names) : index_(index), names_(names) {}
  std::string operator()() const { return entry_name(index_, names_); }
  // "<name>: expected <expected>, got <got>"
  Problem problem(Problem::Kind kind, const std::string& expected, const std::string& got) const {
    return {kind, (*this)() + ": expected " + expected + ", got " + got};
  }

 private:
  std::size_t index_;
  const py::object& names_;
};

// What an array reader finds out about one entry. The readers check what any use needs and raise;
// what forbids only writing goes to `unwritable` ("writable memory, got a read-only array").
struct Entry {
  Span span;
  std::optional<StridedLayout> layout;
  std::optional<Problem> unwritable;
  py::object owner;  // what keeps the memory alive beside the array itself
};

// To be called once, before any of the following.
void init_numpy();
bool is_numpy_array(PyObject* object);
// Asks the cache for the shape of a numpy.ndarray that will be read soon.
void prefetch_shape(PyObject* object);
// The case that nearly every entry is: a dense, writable numpy.ndarray of a known dtype. False if it is
// anything else.
bool read_plain_numpy(PyObject* object, Span& span);
void read_numpy(PyObject* array, const EntryName& name, Entry& entry);
void read_dlpack(py::handle object, const EntryName& name, Entry& entry);

// Set the span of `entry` from a shape and strides in bytes.
void set_layout(Entry& entry, std::byte* data, std::size_t axes, const std::int64_t* shape,
                const std::int64_t* strides);

class Gradients {
 public:
  // Throws a Python exception that names the entry which cannot be read.
  explicit Gradients(const py::object& grads);
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

 private:
  void read_entry(PyObject* object);

  Table<Span> spans_;
  Plan plan_;
  std::deque<StridedLayout> layouts_;  // of the spans that are not dense; addresses must stay
  py::tuple arrays_;
  std::vector<py::object> owners_;
  py::object names_ = py::none();
  std::optional<Problem> unwritable_;  // the first one
};

}  // namespace gradclip::bindings
