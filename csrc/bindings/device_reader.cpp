#include "bindings/device_reader.hpp"

#include <algorithm>

#include "bindings/address.hpp"
#include "bindings/gil.hpp"
#include "bindings/modules.hpp"

namespace gradclip::bindings {
namespace {

// An attribute by a name that is made once.
struct Attribute {
  explicit Attribute(const char* text) : name(PyUnicode_InternFromString(text)) {}
  py::object of(py::handle object) const {
    PyObject* const value = PyObject_GetAttr(object.ptr(), name);
    if (!value) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
  }
  PyObject* name;
};

std::byte* address_of(const py::object& number) {
  void* const address = PyLong_AsVoidPtr(number.ptr());
  if (!address && PyErr_Occurred()) throw py::error_already_set();
  return static_cast<std::byte*>(address);
}

std::int64_t integer(const py::object& number) {
  const long long value = PyLong_AsLongLong(number.ptr());
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

std::vector<std::int64_t> integers(const py::object& sequence) {
  std::vector<std::int64_t> values;
  for (const py::handle item : sequence)
    values.push_back(integer(py::reinterpret_borrow<py::object>(item)));
  return values;
}

py::object numpy_dtype(const py::object& typestr, const EntryName& name) {
  try {
    return py::dtype::from_args(typestr);
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError) && !error.matches(PyExc_ValueError)) throw;
    name.problem(Problem::type_error, "a NumPy typestr", repr_text(typestr)).raise();
  }
}

// A CuPy array's MemoryPointer, and the address that it holds.
py::object data_of_cupy(py::handle array) {
  static const Attribute data("data");
  return data.of(array);
}
std::byte* address_of_cupy(const py::object& data) {
  static const Attribute ptr("ptr");
  return address_of(ptr.of(data));
}

// Set span and layout from a shape; `strides` in bytes, or None for C order.
void set_layout(Entry& entry, std::byte* data, const py::object& shape, const py::object& strides,
                const EntryName& name) {
  const std::vector<std::int64_t> sizes = integers(shape);
  std::vector<std::int64_t> steps;
  if (!strides.is_none()) {
    steps = integers(strides);
    if (steps.size() != sizes.size())
      name.problem(Problem::value_error, "a stride for each axis",
                   "shape " + repr_text(shape) + " and strides " + repr_text(strides))
          .raise();
  }
  set_layout(entry, data,
             {static_cast<std::int64_t>(sizes.size()), sizes.data(),
              strides.is_none() ? nullptr : steps.data(), 1},
             name);
}

// The kernels load elements as wholes.
bool is_aligned(const Span& span) {
  const auto size = static_cast<std::int64_t>(size_of(real_of(span.dtype)));
  if (reinterpret_cast<std::uintptr_t>(span.data) % static_cast<std::uintptr_t>(size) != 0)
    return false;
  if (!span.layout) return true;
  return std::ranges::all_of(span.layout->axes,
                             [&](const auto& axis) { return axis.stride % size == 0; });
}

}  // namespace

DeviceReader::Framework DeviceReader::framework_named(const std::string& name) {
  return name == "torch" ? torch : cupy;
}

DeviceReader::DeviceReader(int device, cuda::Stream stream, Framework framework, bool kept,
                           bool may_require_grad)
    : is_kept(kept),
      place_{device, reinterpret_cast<std::uintptr_t>(stream), may_require_grad},
      framework_(framework),
      cupy_array_(imported("cupy", "ndarray")) {}

bool DeviceReader::is_cupy_array(PyObject* object) const {
  if (cupy_array_.is_none()) return false;
  auto* const type = reinterpret_cast<PyTypeObject*>(cupy_array_.ptr());
  return Py_TYPE(object) == type || PyType_IsSubtype(Py_TYPE(object), type);
}

bool DeviceReader::is_device_array(py::handle object) const {
  return is_cupy_array(object.ptr()) || find_attribute(object, "__cuda_array_interface__");
}

bool DeviceReader::is_of_framework(py::handle object) const {
  return framework_ == cupy ? is_cupy_array(object.ptr()) : is_torch_tensor(object);
}

bool DeviceReader::read_plain(PyObject* object, Span& span) {
  if (framework_ == torch)  // which says itself that this is memory of the device
    return !is_kept && read_plain_torch(object, place_, span);
  if (framework_ != cupy || !is_cupy_array(object)) return false;
  static const Attribute dtype("dtype"), size("size"), is_dense("_c_contiguous");
  if (is_dense.of(object).ptr() != Py_True) return false;
  const std::optional<DType> type = find_dtype(dtype.of(object).ptr());
  if (!type) return false;
  const py::object data = data_of_cupy(object);
  const Span plain{address_of_cupy(data), integer(size.of(object)), nullptr, *type};
  if (plain.numel != 0 && !(is_aligned(plain) && is_device_memory(plain.data, &data))) return false;
  span = plain;
  return true;
}

void DeviceReader::read(PyObject* object, const EntryName& name, Entry& entry) {
  if (is_numpy_array(object))
    name.problem(Problem::value_error, "memory on CUDA device " + std::to_string(place_.device),
                 "a NumPy array (on the CPU)")
        .raise();
  if (is_cupy_array(object)) {
    read_cupy(object, name, entry);
    if (framework_ != cupy) {  // on CuPy's current stream, as its arrays are taken to be
      const py::object stream = imported("cupy.cuda", "get_current_stream")(place_.device);
      add_stream(reinterpret_cast<cuda::Stream>(address_of(stream.attr("ptr"))));
      cuda::wait_for(pointer_at<CUstream_st>(place_.stream), streams_.back());
    }
  } else if (is_torch_tensor(object)) {
    read_dlpack(object, name, place_, entry);
    // Ordered with the call's stream by the export; back again, torch has to be asked.
    if (framework_ != torch) {
      const py::object stream = imported("torch.cuda", "current_stream")(place_.device);
      add_stream(reinterpret_cast<cuda::Stream>(address_of(stream.attr("cuda_stream"))));
    }
  } else if (!PyType_Check(object) && !is_jax_array(object) &&
             find_attribute(object, "__cuda_array_interface__")) {
    read_cuda_interface(object, name, entry);
  } else {
    read_dlpack(object, name, place_, entry);
    exporters_.push_back(py::reinterpret_borrow<py::object>(object));
  }
  check_memory(entry.span, name);
}

Again DeviceReader::read_again(PyObject* object, const EntryName& name, Entry& entry) const {
  if (read_torch(object, name, place_, entry)) return Again::read;
  return is_plain_torch(object) ? Again::gone : Again::held;
}

void DeviceReader::read_cupy(py::handle array, const EntryName& name, Entry& entry) {
  entry.span.dtype = dtype_of(py::object(array.attr("dtype")).ptr(), name);
  set_layout(entry, address_of_cupy(data_of_cupy(array)), array.attr("shape"),
             array.attr("strides"), name);
}

// https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html, version 3
void DeviceReader::read_cuda_interface(py::handle object, const EntryName& name, Entry& entry) {
  const py::object interface = object.attr("__cuda_array_interface__");
  entry.owner = interface;  // made by code that may have done anything to earlier entries
  const auto field = [&](const char* key) -> py::object {
    if (!PyDict_Check(interface.ptr()) || !interface.contains(key))
      name.problem(Problem::type_error, "a __cuda_array_interface__",
                   "one without '" + std::string(key) + "'")
          .raise();
    return interface[key];
  };
  const auto get = interface.attr("get");
  const py::object data = field("data");
  if (!PyTuple_Check(data.ptr()) || PyTuple_GET_SIZE(data.ptr()) != 2)
    name.problem(Problem::type_error, "a __cuda_array_interface__ with data (pointer, read-only)",
                 repr_text(data))
        .raise();
  const py::tuple pointer = data;
  if (!py::object(get("mask")).is_none())
    name.problem(Problem::type_error, "an array without a mask", "a masked array").raise();
  entry.span.dtype = dtype_of(numpy_dtype(field("typestr"), name).ptr(), name);
  set_layout(entry, address_of(pointer[0]), field("shape"), get("strides"), name);
  if (py::cast<bool>(pointer[1]))
    entry.unwritable = name.problem(Problem::value_error, "writable memory", "a read-only array");
  const py::object stream = get("stream");
  if (stream.is_none()) return;  // the producer asks for no order
  if (integer(stream) == 0)
    name.problem(Problem::value_error, "a stream (1 is the legacy default one)", "stream 0")
        .raise();
  add_stream(reinterpret_cast<cuda::Stream>(address_of(stream)));
  cuda::wait_for(pointer_at<CUstream_st>(place_.stream), streams_.back());
}

void DeviceReader::add_stream(cuda::Stream stream) {
  const auto at = std::ranges::find(streams_, stream);
  if (at != streams_.end()) streams_.erase(at);
  streams_.push_back(stream);
}

// What CuPy has allocated from a pool lies where it says.
bool DeviceReader::is_of_cupys_pool(const py::object& data) {
  if (!pooled_) pooled_ = imported("cupy.cuda.memory", "PooledMemory");
  static const Attribute mem("mem"), device_id("device_id");
  return Py_TYPE(mem.of(data).ptr()) == reinterpret_cast<PyTypeObject*>(pooled_.ptr()) &&
         integer(device_id.of(data)) == place_.device;
}

// A driver call for each of a thousand arrays would cost more than the kernels. Memory of two kinds or
// devices never shares 2 MB of addresses: that is the page of the device.
bool DeviceReader::is_device_memory(const std::byte* data, const py::object* cupys) {
  const std::uintptr_t granule = reinterpret_cast<std::uintptr_t>(data) >> 21;
  std::uintptr_t& known = known_granules_[granule % kGranules];
  if (known == granule && granule != 0) return true;
  if (!cupys || !is_of_cupys_pool(*cupys)) {
    const cuda::PointerInfo info = cuda::pointer_info(data);
    if (info.device != place_.device || info.managed) return false;
  }
  known = granule;
  return true;
}

void DeviceReader::check_memory(const Span& span, const EntryName& name) {
  if (span.numel == 0) return;
  if (!is_device_memory(span.data)) {
    const cuda::PointerInfo info = cuda::pointer_info(span.data);
    const std::string device = "CUDA device " + std::to_string(info.device);
    name.problem(Problem::value_error, "memory on CUDA device " + std::to_string(place_.device),
                 info.managed       ? "managed memory"
                 : info.device >= 0 ? "an array on " + device
                                    : "an array whose memory is on no CUDA device")
        .raise();
  }
  if (!is_aligned(span))
    name.problem(Problem::value_error, "elements at multiples of their size in memory",
                 "a misaligned array of " + std::string(name_of(span.dtype)))
        .raise();
}

void DeviceReader::wait_for_producers(cuda::Stream stream) const {
  for (const cuda::Stream producer : streams_) cuda::wait_for(stream, producer);
  const auto number = reinterpret_cast<std::uintptr_t>(stream);
  for (const py::object& object : exporters_)
    object.attr("__dlpack__")(py::arg("stream") = number == 0 ? 1 : number);
}

bool DeviceReader::has_producers_beside(cuda::Stream stream) const {
  return !exporters_.empty() ||
         std::ranges::any_of(streams_, [&](cuda::Stream producer) { return producer != stream; });
}

void DeviceReader::let_producers_wait(cuda::Stream stream) const {
  for (const cuda::Stream producer : streams_) cuda::wait_for(producer, stream);
  if (exporters_.empty()) return;
  const GilRelease release;
  cuda::synchronize(stream);
}

}  // namespace gradclip::bindings
