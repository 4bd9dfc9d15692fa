// Anything else with __dlpack__: torch tensors, jax arrays, whatever follows the protocol.
// https://dmlc.github.io/dlpack/latest/python_spec.html
#include "bindings/dlpack.hpp"
#include "bindings/modules.hpp"

namespace gradclip::bindings {
namespace {

// What torch's __dlpack__ would hand out as something else than it is, or refuse without saying why.
void check_torch(py::handle tensor, const EntryName& name) {
  if (!is_torch_tensor(tensor)) return;
  const py::object plain = imported("torch", "Tensor");
  const auto value_problem = [&](const char* expected, const char* got) {
    name.problem(Problem::value_error, expected, got).raise();
  };
  const py::handle type = py::type::handle_of(tensor);
  const py::object parameter = imported("torch.nn", "Parameter");
  if (!type.is(plain) && !type.is(parameter))
    name.problem(Problem::type_error, "a plain torch.Tensor", full_type_name(tensor)).raise();
  if (tensor.attr("requires_grad").cast<bool>())
    value_problem("a tensor that does not require grad",
                  "one that does (pass its .grad, or .detach() it)");
  if (!py::object(tensor.attr("layout")).is(imported("torch", "strided"))) {
    const auto layout = py::str(tensor.attr("layout")).cast<std::string>();
    value_problem("a dense (strided) tensor", ("a tensor of layout " + layout).c_str());
  }
  if (tensor.attr("is_meta").cast<bool>())
    value_problem("a tensor with memory", "a tensor on the meta device");
}

// Of a conjugate view, which torch's __dlpack__ refuses, what lies in memory: norms and clips see no signs.
// (A negative view it hands out as it lies there.)
py::object without_conjugation(py::object tensor) {
  const bool is_conjugate = is_torch_tensor(tensor) && tensor.attr("is_conj")().cast<bool>();
  return is_conjugate ? tensor.attr("conj")() : tensor;
}

std::string device_name(int type, int id) {
  const std::string number = std::string(" ") + std::to_string(id);
  switch (type) {
    case kDLCUDA: return "CUDA device" + number;
    case kDLCUDAManaged: return "managed memory of CUDA device" + number;
    case kDLROCM: return "ROCm device" + number;
    case kDLMetal: return "Metal device" + number;
    case kDLOneAPI: return "oneAPI device" + number;
    default: return "DLPack device type " + std::to_string(type) + ", number" + number;
  }
}

// What went wrong in the object's own code, as an error that names the entry.
// Ctrl-C is not such a thing.
[[noreturn]] void raise_from(py::error_already_set& error, const EntryName& name) {
  if (!error.matches(PyExc_Exception)) throw error;
  const std::string got =
      full_type_name(error.value()) + ": " + py::str(error.value()).cast<std::string>();
  const Problem problem =
      name.problem(Problem::value_error, "an array that DLPack can export", got);
  py::raise_from(error, PyExc_ValueError, problem.message.c_str());
  throw py::error_already_set();
}

// Pinned host memory is the CPU's.
bool is_host(int type) { return type == kDLCPU || type == kDLCUDAHost || type == kDLROCMHost; }

void check_device(int type, int id, const EntryName& name, const Place& place) {
  if (is_at({static_cast<DLDeviceType>(type), id}, place)) return;
  name.problem(Problem::value_error,
               place.device < 0 ? "memory on the CPU"
                                : "memory on " + device_name(kDLCUDA, place.device),
               is_host(type) ? "an array on the CPU" : "an array on " + device_name(type, id))
      .raise();
}

// Before anything is exported: an export from a GPU may wait for it, or fail.
void ask_device(py::handle object, const EntryName& name, const Place& place) {
  try {
    const py::object device = object.attr("__dlpack_device__")();
    const auto [type, id] = device.cast<std::pair<int, int>>();
    check_device(type, id, name, place);
  } catch (py::error_already_set& error) {
    raise_from(error, name);
  } catch (const py::cast_error&) {
    name.problem(Problem::type_error, "a device (type, number) from __dlpack_device__",
                 "something else")
        .raise();
  }
}

py::object export_capsule(py::handle object, const EntryName& name, const Place& place) {
  py::dict arguments;
  // The legacy default stream is called 1: 0 would be ambiguous.
  if (place.device >= 0) arguments["stream"] = place.stream == 0 ? 1 : place.stream;
  try {
    const py::object method = object.attr("__dlpack__");
    try {
      return method(py::arg("max_version") = py::make_tuple(DLPACK_MAJOR_VERSION, 0), **arguments);
    } catch (py::error_already_set& error) {
      // Before DLPack 1.0 there was no max_version.
      if (!error.matches(PyExc_TypeError)) throw;
      return method(**arguments);
    }
  } catch (py::error_already_set& error) {
    raise_from(error, name);
  }
}

DType dtype_of(const DLDataType& type, const EntryName& name) {
  if (const std::optional<DType> known = find_dtype(type)) return *known;
  static constexpr const char* kCodes[] = {"int",    "uint",    "float", "opaque",
                                           "bfloat", "complex", "bool"};
  const std::string code = type.code < 7 ? kCodes[type.code] : "code" + std::to_string(type.code);
  name.problem(Problem::type_error,
               "dtype float16, bfloat16, float32, float64, complex64 or complex128",
               "dtype " + code + std::to_string(type.bits) +
                   (type.lanes == 1 ? "" : "x" + std::to_string(type.lanes)))
      .raise();
}

}  // namespace

std::optional<DType> find_dtype(const DLDataType& type) {
  if (type.lanes != 1) return std::nullopt;
  if (type.code == kDLFloat && type.bits == 16) return DType::float16;
  if (type.code == kDLFloat && type.bits == 32) return DType::float32;
  if (type.code == kDLFloat && type.bits == 64) return DType::float64;
  if (type.code == kDLBfloat && type.bits == 16) return DType::bfloat16;
  if (type.code == kDLComplex && type.bits == 64) return DType::complex64;
  if (type.code == kDLComplex && type.bits == 128) return DType::complex128;
  return std::nullopt;
}

bool is_at(const DLDevice& device, const Place& place) {
  return place.device < 0 ? is_host(device.device_type)
                          : device.device_type == kDLCUDA && device.device_id == place.device;
}

void read_tensor(const DLTensor& tensor, const EntryName& name, const Place& place, Entry& entry) {
  check_device(tensor.device.device_type, tensor.device.device_id, name, place);
  entry.span.dtype = dtype_of(tensor.dtype, name);
  const auto axes = static_cast<std::size_t>(tensor.ndim);
  std::int64_t bytes = entry.span.itemsize();
  for (std::size_t a = 0; a < axes; ++a)
    if (__builtin_mul_overflow(bytes, tensor.shape[a], &bytes))
      name.problem(Problem::value_error, "at most 2^63 bytes", "a larger (expanded) array").raise();
  entry.span.numel = bytes / entry.span.itemsize();
  // DLPack counts strides in elements, and none means C order.
  std::vector<std::int64_t> strides(axes);
  std::int64_t dense = 1;
  for (std::size_t a = axes; a-- > 0;) {
    strides[a] = (tensor.strides ? tensor.strides[a] : dense) * entry.span.itemsize();
    dense *= tensor.shape[a];
  }
  if (!tensor.data && entry.span.numel != 0)
    name.problem(Problem::value_error, "an array with memory", "one without").raise();
  set_layout(entry, static_cast<std::byte*>(tensor.data) + tensor.byte_offset, axes, tensor.shape,
             strides.data());
}

bool is_torch_tensor(py::handle object) {
  const py::object tensor = imported("torch", "Tensor");
  return !tensor.is_none() && py::isinstance(object, tensor);
}

bool is_jax_array(py::handle object) {
  const py::object array = imported("jax", "Array");
  return !array.is_none() && py::isinstance(object, array);
}

void read_dlpack(py::handle object, const EntryName& name, const Place& place, Entry& entry) {
  if (PyType_Check(object.ptr()) || !py::hasattr(object, "__dlpack__") ||
      !py::hasattr(object, "__dlpack_device__"))
    name.problem(Problem::type_error, "an array (numpy.ndarray, or an object with __dlpack__)",
                 full_type_name(object))
        .raise();
  check_torch(object, name);
  ask_device(object, name, place);
  // The capsule is not consumed: it frees what it holds when the last reference to it goes.
  entry.owner =
      export_capsule(without_conjugation(py::reinterpret_borrow<py::object>(object)), name, place);
  PyObject* const capsule = entry.owner.ptr();
  if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
    const auto* managed = static_cast<const DLManagedTensorVersioned*>(
        PyCapsule_GetPointer(capsule, "dltensor_versioned"));
    if (managed->version.major != DLPACK_MAJOR_VERSION)
      name.problem(Problem::value_error, "DLPack " + std::to_string(DLPACK_MAJOR_VERSION),
                   "version " + std::to_string(managed->version.major))
          .raise();
    read_tensor(managed->dl_tensor, name, place, entry);
    if (managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY)
      entry.unwritable = name.problem(Problem::value_error, "writable memory", "a read-only array");
    else if (managed->flags & DLPACK_FLAG_BITMASK_IS_COPIED)
      entry.unwritable = name.problem(Problem::value_error, "the array's own memory",
                                      "a copy made by its __dlpack__");
  } else if (PyCapsule_IsValid(capsule, "dltensor")) {
    const auto* managed =
        static_cast<const DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    read_tensor(managed->dl_tensor, name, place, entry);
  } else {
    name.problem(Problem::type_error, "a DLPack capsule from __dlpack__",
                 full_type_name(entry.owner))
        .raise();
  }
  // Without a version there is no read-only flag: jax arrays must be known by their type.
  if (is_jax_array(object))
    entry.unwritable = name.problem(Problem::type_error, "an array that can be written",
                                    "a jax.Array, which is immutable");
}

}  // namespace gradclip::bindings
