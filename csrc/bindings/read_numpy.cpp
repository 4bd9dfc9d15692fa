// numpy.ndarray, read from its struct: a few nanoseconds an array, where the buffer protocol takes 60
// and knows no bfloat16.
#include <atomic>

#include "bindings/gradients.hpp"
#include "bindings/modules.hpp"

namespace gradclip::bindings {
namespace {

using py::detail::npy_api;

PyTypeObject* ndarray_type = nullptr;

// NumPy gives ml_dtypes' types whatever number is free: the scalar type tells.
bool is_bfloat16(PyObject* scalar_type) {
  static std::atomic<PyObject*> bfloat16{nullptr};  // owned for good once somebody has imported it
  if (!bfloat16) {
    const py::object found = imported("ml_dtypes", "bfloat16");
    if (found.is_none()) return false;
    bfloat16 = py::object(found).release().ptr();
  }
  return scalar_type == bfloat16;
}

bool is_masked(PyObject* array) {
  const py::object masked = imported("numpy.ma", "MaskedArray");
  return !masked.is_none() && py::isinstance(array, masked);
}

// The element type of a dtype in native byte order.
GRADCLIP_INLINE std::optional<DType> find(const py::detail::PyArrayDescr1_Proxy& descr) {
  if (descr.byteorder != '=' && descr.byteorder != '|') return std::nullopt;
  switch (descr.type_num) {
    case 23: return DType::float16;  // NPY_HALF
    case npy_api::NPY_FLOAT_: return DType::float32;
    case npy_api::NPY_DOUBLE_: return DType::float64;
    case npy_api::NPY_CFLOAT_: return DType::complex64;
    case npy_api::NPY_CDOUBLE_: return DType::complex128;
    default: break;
  }
  if (is_bfloat16(descr.typeobj)) return DType::bfloat16;
  return std::nullopt;
}

constexpr int kDense = npy_api::NPY_ARRAY_C_CONTIGUOUS_ | npy_api::NPY_ARRAY_F_CONTIGUOUS_;

std::int64_t numel_of(const py::detail::PyArray_Proxy& proxy) {
  std::int64_t numel = 1;
  for (int a = 0; a < proxy.nd; ++a) numel *= proxy.dimensions[a];
  return numel;
}

}  // namespace

void init_numpy() { ndarray_type = npy_api::get().PyArray_Type_; }

std::optional<DType> find_dtype(PyObject* numpy_dtype) {
  return find(*py::detail::array_descriptor1_proxy(numpy_dtype));
}

DType dtype_of(PyObject* numpy_dtype, const EntryName& name) {
  const std::optional<DType> dtype = find_dtype(numpy_dtype);
  if (dtype) return *dtype;
  name.problem(Problem::type_error,
               (std::string("dtype ") + kDTypeNames + " in native byte order").c_str(),
               "dtype " + str_text(numpy_dtype))
      .raise();
}

bool is_numpy_array(PyObject* object) {
  return Py_TYPE(object) == ndarray_type || PyType_IsSubtype(Py_TYPE(object), ndarray_type);
}

void prefetch_shape(PyObject* object) {
  if (Py_TYPE(object) == ndarray_type)
    __builtin_prefetch(py::detail::array_proxy(object)->dimensions);
}

bool read_plain_numpy(PyObject* array, Span& span) {
  if (Py_TYPE(array) != ndarray_type) return false;
  const auto& proxy = *py::detail::array_proxy(array);
  constexpr int kWritable = npy_api::NPY_ARRAY_WRITEABLE_;
  if (!(proxy.flags & kDense) || !(proxy.flags & kWritable)) return false;
  const std::optional<DType> dtype = find_dtype(proxy.descr);
  if (!dtype) return false;
  span = {reinterpret_cast<std::byte*>(proxy.data), numel_of(proxy), nullptr, *dtype};
  return true;
}

Axes numpy_axes(PyObject* array) {
  const auto& proxy = *py::detail::array_proxy(array);
  Axes axes;
  for (int a = 0; a < proxy.nd; ++a) axes.push_back({proxy.dimensions[a], proxy.strides[a]});
  return axes;
}

bool lies_in_its_owner(PyObject* array, const Span& span) {
  PyObject* const base = py::detail::array_proxy(array)->base;
  if (!base || span.numel == 0 || !is_numpy_array(base)) return true;
  const auto& owner = *py::detail::array_proxy(base);
  if (!(owner.flags & npy_api::NPY_ARRAY_OWNDATA_) || !(owner.flags & kDense)) return true;
  // Of one axis of several elements its stride tells; else NumPy is asked, which takes longer.
  const std::int64_t bytes =
      owner.nd == 1 && owner.dimensions[0] > 1
          ? owner.dimensions[0] * owner.strides[0]
          : numel_of(owner) * py::reinterpret_borrow<py::dtype>(owner.descr).itemsize();
  const auto* const begin = reinterpret_cast<const std::byte*>(owner.data);
  return span.data >= begin && span.data + span.extent() <= begin + bytes;
}

void read_numpy(PyObject* array, const EntryName& name, Entry& entry) {
  const auto& proxy = *py::detail::array_proxy(array);
  entry.span.dtype = dtype_of(proxy.descr, name);
  if (Py_TYPE(array) != ndarray_type && is_masked(array))
    name.problem(Problem::type_error, "an array without a mask", "a masked array").raise();

  entry.span.numel = numel_of(proxy);
  auto* const data = reinterpret_cast<std::byte*>(proxy.data);
  if (proxy.flags & kDense) {
    entry.span.data = data;
  } else {
    static_assert(sizeof(ssize_t) == sizeof(std::int64_t));
    set_layout(entry, data,
               {proxy.nd, reinterpret_cast<const std::int64_t*>(proxy.dimensions),
                reinterpret_cast<const std::int64_t*>(proxy.strides), 1},
               name);
  }
  if (!(proxy.flags & npy_api::NPY_ARRAY_WRITEABLE_))
    entry.unwritable = name.problem(Problem::value_error, "writable memory", "a read-only array");
}

}  // namespace gradclip::bindings
