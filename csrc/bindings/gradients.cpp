#include "bindings/gradients.hpp"

#include <algorithm>
#include <stdexcept>

#include "bindings/dlpack.hpp"
#include "bindings/modules.hpp"

namespace gradclip::bindings {

void Problem::raise() const {
  if (kind == type_error) throw py::type_error(message);
  throw py::value_error(message);
}

std::string entry_name(const char* list, std::size_t index, const py::object& names) {
  const std::string place = names.is_none()
                                ? std::to_string(index)
                                : repr_text(py::reinterpret_borrow<py::tuple>(names)[index]);
  return std::string(list).append("[").append(place).append("]");
}

void set_layout(Entry& entry, std::byte* data, const Shape& shape, const EntryName& name) {
  const std::int64_t itemsize = entry.span.itemsize();
  const auto refuse = [&](const std::string& expected, const std::string& got) {
    name.problem(Problem::value_error, expected, got).raise();
  };
  constexpr auto kMaxAxes = static_cast<std::int64_t>(StridedLayout::kMaxAxes);
  if (shape.axes < 0 || shape.axes > kMaxAxes)
    refuse("an array of 0 to 64 axes", "one of " + std::to_string(shape.axes));
  if (shape.axes > 0 && !shape.sizes) refuse("an array with a shape", "one without");
  const auto axes = static_cast<std::size_t>(shape.axes);
  std::int64_t bytes = itemsize;
  for (std::size_t a = 0; a < axes; ++a) {
    if (shape.sizes[a] < 0)
      refuse("axes of 0 or more elements", "one of " + std::to_string(shape.sizes[a]));
    if (__builtin_mul_overflow(bytes, shape.sizes[a], &bytes))
      refuse("at most 2^63 bytes", "a larger (expanded) array");
  }
  entry.span.data = data;
  entry.span.numel = bytes / itemsize;
  if (bytes == 0) return;
  if (!data) refuse("an array with memory", "one without");

  std::vector<StridedLayout::Axis> list(axes);
  // The lowest and the highest byte, seen from the first element.
  std::int64_t lowest = 0, highest = itemsize - 1, dense = itemsize;
  bool is_possible = true;
  for (std::size_t a = axes; a-- > 0; dense *= shape.sizes[a]) {
    if (shape.sizes[a] == 1) {
      list[a] = {1, itemsize};  // the stride of one element may be anything
      continue;
    }
    std::int64_t stride = dense, reach = 0;
    if (shape.strides)
      is_possible = is_possible && !__builtin_mul_overflow(shape.strides[a], shape.unit, &stride);
    is_possible = is_possible && !__builtin_mul_overflow(shape.sizes[a] - 1, stride, &reach);
    std::int64_t& end = reach < 0 ? lowest : highest;
    is_possible = is_possible && !__builtin_add_overflow(end, reach, &end);
    list[a] = {shape.sizes[a], stride};
  }
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  if (!is_possible || address > INT64_MAX || static_cast<std::int64_t>(address) < -lowest ||
      static_cast<std::int64_t>(address) > INT64_MAX - highest)
    refuse("elements within memory", "strides that reach beyond its addresses");
  OrderedAxes ordered = order_axes(data, itemsize, std::move(list));
  entry.span.data = ordered.data;
  entry.layout = std::move(ordered.layout);
}

void raise_with_name(py::error_already_set& error, const EntryName& name) {
  if (!error.matches(PyExc_Exception) || error.matches(PyExc_MemoryError)) throw error;
  const Problem problem =
      name.problem(Problem::value_error, "an array that can be read",
                   full_type_name(error.value()) + ": " + str_text(error.value()));
  py::raise_from(error, PyExc_ValueError, problem.message.c_str());
  throw py::error_already_set();
}

bool is_plain(const py::object& argument) {
  PyObject* const object = argument.ptr();
  return PyFloat_CheckExact(object) || PyLong_CheckExact(object) || PyUnicode_CheckExact(object) ||
         object == Py_None;
}

void HostReader::read(PyObject* object, const EntryName& name, Entry& entry) const {
  if (is_numpy_array(object))
    read_numpy(object, name, entry);
  else if (is_kept || !read_torch(object, name, place, entry))
    read_dlpack(object, name, place, entry);
}

Again HostReader::read_again(PyObject* object, const EntryName& name, Entry& entry) const {
  if (is_numpy_array(object)) {
    read_numpy(object, name, entry);
    return lies_in_its_owner(object, entry.placed()) ? Again::read : Again::gone;
  }
  if (read_torch(object, name, place, entry)) return Again::read;
  return is_plain_torch(object) ? Again::gone : Again::held;
}

void Gradients::refuse_changed(const EntryName& name, const Entry& now) {
  name.problem(Problem::value_error, "the memory that was read before",
               "an array that has been given other memory since (" +
                   (now.span.data
                        ? std::to_string(now.span.numel) + " elements of " + name_of(now.span.dtype)
                        : std::string("none that can be read")) +
                   "); nothing was written")
      .raise();
}

void Gradients::add(Entry&& entry) {
  if (entry.layout) {
    layouts_.push_back(std::move(*entry.layout));
    entry.span.layout = &layouts_.back();
  }
  if (entry.unwritable && !unwritable_) unwritable_ = std::move(entry.unwritable);
  if (entry.owner) owners_.emplace(spans_.size(), std::move(entry.owner));
  spans_.push_back(entry.span);
}

void Gradients::take_arrays(const py::object& grads) {
  const auto wrong_kind = [&](const char* hint) {
    throw py::type_error(std::string(argument_) +
                         ": expected a sequence or a mapping of arrays, got " +
                         std::string(Py_TYPE(grads.ptr())->tp_name) + hint);
  };
  PyObject* const object = grads.ptr();
  // A tuple of our own: what is read runs user code (__dlpack__), which may change a list.
  if (PyList_CheckExact(object) || PyTuple_CheckExact(object)) {
    arrays_ = py::tuple(grads);
  } else if (PyUnicode_Check(object) || PyBytes_Check(object) || PyByteArray_Check(object)) {
    wrong_kind("");
  } else if (is_numpy_array(object) || find_attribute(grads, "__dlpack__") ||
             find_attribute(grads, "__cuda_array_interface__")) {
    wrong_kind("; put a single array in a list");
  } else if (PyDict_Check(object) ||
             py::isinstance(grads, py::module_::import("collections.abc").attr("Mapping"))) {
    py::list keys, items;
    for (const py::handle item : py::list(grads.attr("items")())) {
      if (!PyTuple_Check(item.ptr()) || PyTuple_GET_SIZE(item.ptr()) != 2)
        throw py::type_error(std::string(argument_) + ": expected items() of pairs, got " +
                             repr_text(item));
      const py::tuple pair = py::reinterpret_borrow<py::tuple>(item);
      if (!PyUnicode_Check(pair[0].ptr()))
        throw py::type_error(std::string(argument_) +
                             ": expected names (str) as keys, got the key " + repr_text(pair[0]));
      keys.append(pair[0]);
      items.append(pair[1]);
    }
    names_ = py::tuple(keys);
    arrays_ = py::tuple(items);
  } else {
    PyObject* const tuple = PySequence_Tuple(object);
    if (!tuple) {
      if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
      PyErr_Clear();
      wrong_kind("");
    }
    arrays_ = py::reinterpret_steal<py::tuple>(tuple);
  }
}

void Gradients::count_bytes() {
  for (const Span& span : spans_)
    if (__builtin_add_overflow(nbytes_, span.nbytes(), &nbytes_))
      throw std::length_error("grads: expected at most 2^63 bytes together, got more");
}

void Gradients::make_plan_of_spans() {
  Table<std::int64_t> bytes(spans_.size());
  for (std::size_t i = 0; i < spans_.size(); ++i) bytes[i] = spans_[i].nbytes();
  plan_ = cpu::make_plan(bytes);
  nbytes_ = plan_.total_bytes;
}

std::vector<std::size_t> Gradients::missing() const {
  std::vector<std::size_t> found;
  for (std::size_t i = 0; i < spans_.size(); ++i)
    if (is_missing(i)) found.push_back(i);
  return found;
}

void Gradients::mark_written() const {
  if (imported("torch", "Tensor").is_none()) return;
  py::list tensors;
  for (std::size_t i = 0; i < spans_.size(); ++i) {
    const py::handle object = PyTuple_GET_ITEM(arrays_.ptr(), i);
    if (is_plain_torch(object.ptr()) && PyList_Append(tensors.ptr(), object.ptr()) != 0)
      throw py::error_already_set();
  }
  if (!tensors.empty()) py::module_::import("gradclip._dispatch").attr("mark_written")(tensors);
}

std::int64_t Gradients::elements() const {
  std::int64_t elements = 0;
  for (const Span& span : spans_) elements += span.numel;
  return elements;
}

bool Gradients::has_float64() const {
  return std::ranges::any_of(
      spans_, [](const Span& span) { return real_of(span.dtype) == DType::float64; });
}

std::optional<Problem> Gradients::find_overlaps() const {
  for (std::size_t i = 0; i < spans_.size(); ++i) {
    if (!overlaps_itself(spans_[i])) continue;
    return name_at(i).problem(Problem::value_error, "elements that do not share memory",
                              "an array that overlaps itself (expanded, broadcast or "
                              "as_strided): clone() the tensor, copy() the array");
  }
  if (const auto shared = find_shared_memory(spans_, spans_.size()))
    return name_at(shared->second)
        .problem(Problem::value_error, "memory of its own",
                 "memory shared with " + name_at(shared->first)());
  return std::nullopt;
}

bool Gradients::has_only_float64() const {
  return std::ranges::all_of(spans_, [](const Span& span) {
    return span.numel == 0 || real_of(span.dtype) == DType::float64;
  });
}

void Gradients::require_writable() const {
  if (!knows_overlaps_.load(std::memory_order_acquire)) {
    std::optional<Problem> found = find_overlaps();  // a name's own code may run: under no lock
    const std::scoped_lock lock(overlaps_mutex_);
    if (!unwritable_) unwritable_ = std::move(found);
    knows_overlaps_.store(true, std::memory_order_release);
  }
  if (unwritable_) unwritable_->raise();
}

StridedArray Gradients::array_of(std::size_t i) const {
  const Span& span = spans_[i];
  const py::handle object = PyTuple_GET_ITEM(arrays_.ptr(), i);
  const auto owner = owners_.find(i);
  const auto find_axes = [&]() -> std::optional<Axes> {
    if (is_numpy_array(object.ptr())) return numpy_axes(object.ptr());
    if (auto axes = find_torch_axes(object.ptr())) return axes;
    if (owner != owners_.end()) return find_exported_axes(owner->second.ptr());
    return std::nullopt;
  };
  StridedArray array{span.data, span.itemsize(), {}};
  if (auto axes = find_axes()) {
    array.axes = std::move(*axes);
  } else {  // of a device: a CuPy array, or a __cuda_array_interface__
    const bool is_interface = owner != owners_.end();
    const auto field = [&](const char* name) {
      return is_interface ? owner->second.attr("get")(name) : py::object(object.attr(name));
    };
    const py::tuple shape(field("shape"));
    const py::object strides = field("strides");
    array.axes.resize(shape.size());
    std::int64_t dense = array.itemsize;
    for (std::size_t a = shape.size(); a-- > 0; dense *= array.axes[a].size)
      array.axes[a] = {shape[a].cast<std::int64_t>(),
                       strides.is_none() ? dense : py::tuple(strides)[a].cast<std::int64_t>()};
  }
  for (const auto& axis : array.axes)
    if (axis.stride < 0 && axis.size > 1) array.data -= (axis.size - 1) * axis.stride;
  return array;
}

bool lead_with_rows(Axes& axes, RowKind kind) {
  if (kind == RowKind::unit || kind == RowKind::unit_last) {
    if (axes.size() < 2)
      axes.insert(axes.begin(), {1, 0});
    else if (kind == RowKind::unit_last)
      std::ranges::rotate(axes, axes.end() - 1);
  }
  return !axes.empty();
}

RowSpan Gradients::rows_of(std::size_t i, RowKind kind, std::list<StridedLayout>& layouts) const {
  StridedArray array = array_of(i);
  if (!lead_with_rows(array.axes, kind))
    name_at(i)
        .problem(Problem::value_error,
                 kind == RowKind::sample ? "an array with a first axis, that of the samples"
                                         : "an array with a first axis, that of its rows",
                 "one without axes (g.reshape(1) has one row)")
        .raise();
  const auto [count, stride] = array.axes[0];
  if (std::ranges::any_of(array.axes, [](const auto& axis) { return axis.size == 0; }))
    return {array.data, count, 0, 0, nullptr, spans_[i].dtype};
  RowSpan rows{array.data, count, stride, 1, nullptr, spans_[i].dtype};
  for (std::size_t a = 1; a < array.axes.size(); ++a) rows.numel *= array.axes[a].size;
  OrderedAxes row =
      order_axes(array.data, array.itemsize, {array.axes.begin() + 1, array.axes.end()});
  rows.first = row.data;
  if (row.layout) rows.layout = &layouts.emplace_back(std::move(*row.layout));
  return rows;
}

RowTable Gradients::rows(RowKind kind) const {
  RowTable table;
  table.kind = kind;
  std::optional<std::size_t> with_samples;
  for (std::size_t i = 0; i < spans_.size(); ++i) {
    table.add(is_missing(i) ? RowSpan{} : rows_of(i, kind, table.layouts));
    if (kind != RowKind::sample || is_missing(i)) continue;
    if (!with_samples) with_samples = i;
    const std::int64_t expected = table.gradients[*with_samples].count;
    if (table.gradients[i].count != expected)
      name_at(i)
          .problem(Problem::value_error,
                   std::to_string(expected) + " samples along the first axis, as " +
                       name_at(*with_samples)() + " has",
                   std::to_string(table.gradients[i].count))
          .raise();
  }
  return table;
}

void Gradients::require_real() const {
  for (std::size_t i = 0; i < spans_.size(); ++i)
    if (spans_[i].numel != 0 && is_complex(spans_[i].dtype))
      name_at(i)
          .problem(Problem::type_error, "a real dtype (complex numbers have no order)",
                   name_of(spans_[i].dtype))
          .raise();
}

}  // namespace gradclip::bindings
