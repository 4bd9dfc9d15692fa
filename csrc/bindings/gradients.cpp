#include "bindings/gradients.hpp"

#include <algorithm>

#include "bindings/dlpack.hpp"

namespace gradclip::bindings {

void Problem::raise() const {
  if (kind == type_error) throw py::type_error(message);
  throw py::value_error(message);
}

std::string entry_name(std::size_t index, const py::object& names) {
  if (names.is_none()) return "grads[" + std::to_string(index) + "]";
  const py::object name = py::reinterpret_borrow<py::tuple>(names)[index];
  return "grads[" + py::repr(name).cast<std::string>() + "]";
}

std::string full_type_name(py::handle object) {
  const py::handle type = py::type::handle_of(object);
  return type.attr("__module__").cast<std::string>() + "." +
         type.attr("__qualname__").cast<std::string>();
}

void set_layout(Entry& entry, std::byte* data, std::size_t axes, const std::int64_t* shape,
                const std::int64_t* strides) {
  entry.span.data = data;
  if (entry.span.numel == 0) return;
  std::vector<StridedLayout::Axis> list(axes);
  for (std::size_t a = 0; a < axes; ++a) list[a] = {shape[a], strides[a]};
  OrderedAxes ordered = order_axes(data, entry.span.itemsize(), std::move(list));
  entry.span.data = ordered.data;
  entry.layout = std::move(ordered.layout);
}

void HostReader::read(PyObject* object, const EntryName& name, Entry& entry) const {
  DLTensor tensor;
  if (is_numpy_array(object))
    read_numpy(object, name, entry);
  else if (!keeps_storages && borrow_torch_tensor(object, tensor))
    read_tensor(tensor, name, Place{}, entry);
  else
    read_dlpack(object, name, Place{}, entry);
}

void Gradients::add(Entry&& entry) {
  if (entry.layout) {
    layouts_.push_back(std::move(*entry.layout));
    entry.span.layout = &layouts_.back();
  }
  if (entry.unwritable && !unwritable_) unwritable_ = std::move(entry.unwritable);
  spans_.push_back(entry.span);
  if (entry.owner) owners_.push_back(std::move(entry.owner));
}

void Gradients::take_arrays(const py::object& grads) {
  const auto wrong_kind = [&](const char* hint) {
    throw py::type_error("grads: expected a sequence or a mapping of arrays, got " +
                         std::string(Py_TYPE(grads.ptr())->tp_name) + hint);
  };
  PyObject* const object = grads.ptr();
  // A tuple of our own: what is read runs user code (__dlpack__), which may change a list.
  if (PyList_CheckExact(object) || PyTuple_CheckExact(object)) {
    arrays_ = py::tuple(grads);
  } else if (PyUnicode_Check(object) || PyBytes_Check(object) || PyByteArray_Check(object)) {
    wrong_kind("");
  } else if (is_numpy_array(object) || py::hasattr(grads, "__dlpack__") ||
             py::hasattr(grads, "__cuda_array_interface__")) {
    wrong_kind("; put a single array in a list");
  } else if (PyDict_Check(object) ||
             py::isinstance(grads, py::module_::import("collections.abc").attr("Mapping"))) {
    py::list keys, items;
    for (const py::handle item : py::list(grads.attr("items")())) {
      if (!PyTuple_Check(item.ptr()) || PyTuple_GET_SIZE(item.ptr()) != 2)
        throw py::type_error("grads: expected items() of pairs, got " +
                             py::repr(item).cast<std::string>());
      const py::tuple pair = py::reinterpret_borrow<py::tuple>(item);
      if (!PyUnicode_Check(pair[0].ptr()))
        throw py::type_error("grads: expected names (str) as keys, got the key " +
                             py::repr(pair[0]).cast<std::string>());
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

  spans_.reserve(arrays_.size());
}

void Gradients::make_plan_of_spans() {
  Table<std::int64_t> bytes(spans_.size());
  for (std::size_t i = 0; i < spans_.size(); ++i) bytes[i] = spans_[i].nbytes();
  plan_ = make_plan(bytes);
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

void Gradients::find_overlaps() {
  if (unwritable_) return;
  for (std::size_t i = 0; i < spans_.size(); ++i) {
    if (!overlaps_itself(spans_[i])) continue;
    unwritable_ =
        EntryName(i, names_).problem(Problem::value_error, "elements that do not share memory",
                                     "an array that overlaps itself (broadcast or as_strided)");
    return;
  }
  if (const auto shared = find_shared_memory(spans_))
    unwritable_ = EntryName(shared->second, names_)
                      .problem(Problem::value_error, "memory of its own",
                               "memory shared with " + entry_name(shared->first, names_));
}

void Gradients::require_writable() const {
  if (unwritable_) unwritable_->raise();
}

void Gradients::require_real() const {
  for (std::size_t i = 0; i < spans_.size(); ++i)
    if (spans_[i].numel != 0 && is_complex(spans_[i].dtype))
      EntryName(i, names_)
          .problem(Problem::type_error, "a real dtype (complex numbers have no order)",
                   name_of(spans_[i].dtype))
          .raise();
}

}  // namespace gradclip::bindings
