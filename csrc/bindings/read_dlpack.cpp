// Anything else with __dlpack__: torch tensors, jax arrays, whatever follows the protocol.
// https://dmlc.github.io/dlpack/latest/python_spec.html
#include "bindings/address.hpp"
#include "bindings/dlpack.hpp"
#include "bindings/modules.hpp"

namespace gradclip::bindings {
namespace {

// What torch's __dlpack__ would hand out as something else than it is, or refuse without saying why.
void check_torch(py::handle tensor, const EntryName& name, bool may_require_grad) {
  if (!is_torch_tensor(tensor)) return;
  const py::object plain = imported("torch", "Tensor");
  const auto value_problem = [&](const char* expected, const char* got) {
    name.problem(Problem::value_error, expected, got).raise();
  };
  const py::handle type = py::type::handle_of(tensor);
  const py::object parameter = imported("torch.nn", "Parameter");
  if (!type.is(plain) && !type.is(parameter))
    name.problem(Problem::type_error, "a plain torch.Tensor", full_type_name(tensor)).raise();
  if (!may_require_grad && tensor.attr("requires_grad").cast<bool>())
    value_problem("a tensor that does not require grad",
                  "one that does (pass its .grad, or .detach() it)");
  if (!py::object(tensor.attr("layout")).is(imported("torch", "strided"))) {
    value_problem("a dense (strided) tensor",
                  ("a tensor of layout " + str_text(tensor.attr("layout"))).c_str());
  }
  if (tensor.attr("is_meta").cast<bool>())
    value_problem("a tensor with memory", "a tensor on the meta device");
}

// What is exported of a tensor: an alias, for an export of the tensor itself would not keep the storage
// that it has now. A conjugate view, which torch's __dlpack__ refuses, as it lies in memory: norms and
// clips see no signs. (A negative view it hands out as it lies there.)
py::object alias_of(py::object object) {
  if (!is_torch_tensor(object)) return object;
  object = object.attr("detach")();
  return object.attr("is_conj")().cast<bool>() ? object.attr("conj")() : object;
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
  const py::object device = object.attr("__dlpack_device__")();
  try {
    const auto [type, id] = device.cast<std::pair<int, int>>();
    check_device(type, id, name, place);
  } catch (const py::cast_error&) {
    name.problem(Problem::type_error, "a device (type, number) from __dlpack_device__",
                 "something else")
        .raise();
  }
}

py::object export_capsule(const py::object& object, const Place& place) {
  py::dict arguments;
  // The legacy default stream is called 1: 0 would be ambiguous. The per-thread one, 2, waits for it by
  // itself, and PyTorch knows only that.
  if (place.device >= 0)
    arguments["stream"] = place.stream == 0 || place.stream == 2 ? 1 : place.stream;
  const py::object method = object.attr("__dlpack__");
  try {
    return method(py::arg("max_version") = py::make_tuple(DLPACK_MAJOR_VERSION, 0), **arguments);
  } catch (py::error_already_set& error) {
    // Before DLPack 1.0 there was no max_version.
    if (!error.matches(PyExc_TypeError)) throw;
    return method(**arguments);
  }
}

DType dtype_of(const DLDataType& type, const EntryName& name) {
  if (const std::optional<DType> known = find_dtype(type)) return *known;
  // By code; where the name does not hold the bits, they follow.
  static constexpr const char* kCodes[] = {"int", "uint", "float", "opaque", "bfloat", "complex"};
  static constexpr const char* kNames[] = {
      "bool",           "float8_e3m4",     "float8_e4m3",   "float8_e4m3b11fnuz",
      "float8_e4m3fn",  "float8_e4m3fnuz", "float8_e5m2",   "float8_e5m2fnuz",
      "float8_e8m0fnu", "float6_e2m3fn",   "float6_e3m2fn", "float4_e2m1fn"};
  const std::string bits = std::to_string(type.bits);
  const std::size_t code = type.code, codes = std::size(kCodes);
  const std::string got = code < codes ? kCodes[code] + bits
                          : code - codes < std::size(kNames)
                              ? kNames[code - codes]
                              : "number " + std::to_string(code) + " of " + bits + " bits";
  name.problem(Problem::type_error, (std::string("dtype ") + kDTypeNames).c_str(),
               "dtype " + got + (type.lanes == 1 ? "" : "x" + std::to_string(type.lanes)))
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
  std::uintptr_t address = 0;
  if (tensor.data && __builtin_add_overflow(reinterpret_cast<std::uintptr_t>(tensor.data),
                                            tensor.byte_offset, &address))
    name.problem(Problem::value_error, "elements within memory",
                 "an offset of " + std::to_string(tensor.byte_offset) + " bytes")
        .raise();
  // DLPack counts strides in elements.
  set_layout(entry, pointer_at<std::byte>(address),
             {tensor.ndim, tensor.shape, tensor.strides, entry.span.itemsize()}, name);
}

Axes tensor_axes(const DLTensor& tensor) {
  const std::int64_t itemsize = tensor.dtype.bits / 8;
  Axes axes(static_cast<std::size_t>(tensor.ndim));
  std::int64_t dense = itemsize;
  for (std::size_t a = axes.size(); a-- > 0; dense *= tensor.shape[a])
    axes[a] = {tensor.shape[a], tensor.strides ? tensor.strides[a] * itemsize : dense};
  return axes;
}

std::optional<Axes> find_exported_axes(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, "dltensor_versioned"))
    return tensor_axes(static_cast<const DLManagedTensorVersioned*>(
                           PyCapsule_GetPointer(capsule, "dltensor_versioned"))
                           ->dl_tensor);
  if (PyCapsule_IsValid(capsule, "dltensor"))
    return tensor_axes(
        static_cast<const DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"))->dl_tensor);
  return std::nullopt;
}

bool is_torch_tensor(py::handle object) {
  const py::object tensor = imported("torch", "Tensor");
  return !tensor.is_none() && py::isinstance(object, tensor);
}

bool is_jax_array(py::handle object) {
  const py::object array = imported("jax", "Array");
  return !array.is_none() && py::isinstance(object, array);
}

// Why an object without an export is none, as far as it can be said.
std::string not_an_array(py::handle object) {
  std::string type = full_type_name(object);
  if (is_jax_array(object))
    return "a " + type + " that is being traced (inside of jax.jit and jax.grad use gradclip.jax)";
  if (PyDict_Check(object.ptr()) || PyList_Check(object.ptr()) || PyTuple_Check(object.ptr()))
    return type + " (of nested containers pass the leaves: jax.tree.leaves(grads))";
  return type;
}

void read_dlpack(py::handle object, const EntryName& name, const Place& place, Entry& entry) {
  if (PyType_Check(object.ptr()) || !find_attribute(object, "__dlpack__") ||
      !find_attribute(object, "__dlpack_device__"))
    name.problem(Problem::type_error, "an array (numpy.ndarray, or an object with __dlpack__)",
                 not_an_array(object))
        .raise();
  check_torch(object, name, place.may_require_grad);
  const py::object is_deleted =
      is_jax_array(object) ? find_attribute(object, "is_deleted") : py::object();
  if (is_deleted && is_deleted().cast<bool>())
    name.problem(Problem::value_error, "an array with memory",
                 "a jax.Array that was deleted (donated)")
        .raise();
  ask_device(object, name, place);
  // The capsule is not consumed: it frees what it holds when the last reference to it goes.
  entry.owner = export_capsule(alias_of(py::reinterpret_borrow<py::object>(object)), place);
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
                                    "a jax.Array, which is immutable (gradclip.jax.clip)");
}

}  // namespace gradclip::bindings
