// torch tensors, borrowed through torch's DLPack exchange API: 50 nanoseconds each, where
// __dlpack__ takes 2 microseconds. https://dmlc.github.io/dlpack/latest/c_api.html
#include <dlpack/dlpack.h>

#include <atomic>

#include "bindings/dlpack.hpp"
#include "bindings/modules.hpp"
#include "cpu/openmp.hpp"

namespace gradclip::bindings {
namespace {

// Of the torch that somebody has imported; kept for good.
struct Torch {
  PyObject* tensor;
  PyObject* parameter;
  PyGetSetDef* requires_grad;
  const DLPackExchangeAPI* exchange;
};

// Null without torch, or with one that has no exchange API (before 2.10): that is looked for once.
const Torch* torch() {
  static std::atomic<const Torch*> known{nullptr};
  static std::atomic<bool> has_none{false};
  if (const Torch* const found = known) return found;
  if (has_none) return nullptr;
  py::object tensor = imported("torch", "Tensor");
  py::object parameter = imported("torch.nn", "Parameter");
  if (tensor.is_none() || parameter.is_none()) return nullptr;
  const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
  constexpr char kName[] = "dlpack_exchange_api";
  if (!PyCapsule_IsValid(capsule.ptr(), kName)) {
    has_none = true;
    return nullptr;
  }
  const auto* exchange =
      static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), kName));
  if (exchange->header.version.major != DLPACK_MAJOR_VERSION ||
      !exchange->dltensor_from_py_object_no_sync)
    return nullptr;
  const py::object requires_grad = py::getattr(tensor, "requires_grad", py::none());
  if (!Py_IS_TYPE(requires_grad.ptr(), &PyGetSetDescr_Type)) return nullptr;
  // What was released lives as long as the process.
  auto* const getter =
      reinterpret_cast<PyGetSetDescrObject*>(requires_grad.inc_ref().ptr())->d_getset;
  cpu::openmp::find();
  known = new Torch{tensor.release().ptr(), parameter.release().ptr(), getter, exchange};
  return known;
}

// Not their subclasses: of a DTensor the pointer and size that are handed out belong together with no
// memory at all.
bool is_plain(const Torch& known, PyObject* object) {
  auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == known.tensor || type == known.parameter;
}

// The memory of a plain tensor, valid as long as the object keeps its storage. False if it is anything
// else, or a tensor that read_dlpack refuses.
bool borrow(PyObject* object, DLTensor& tensor, bool may_require_grad) {
  const Torch* const known = torch();
  if (!known || !is_plain(*known, object)) return false;
  if (!may_require_grad) {
    // By its getter: to look the attribute up takes as long as all the rest.
    PyObject* const requires_grad =
        known->requires_grad->get(object, known->requires_grad->closure);
    if (!requires_grad) throw py::error_already_set();
    Py_DECREF(requires_grad);  // True and False live for ever
    if (requires_grad != Py_False) return false;
  }
  // A view that negates or conjugates is read as it lies in memory: norms and clips see no signs.
  if (known->exchange->dltensor_from_py_object_no_sync(object, &tensor) == 0) return true;
  PyErr_Clear();  // sparse, quantised, meta: read_dlpack says which
  return false;
}

// False also for more elements than can be counted.
bool is_c_contiguous(const DLTensor& tensor, std::int64_t& numel) {
  numel = 1;
  bool dense = true;
  for (int a = tensor.ndim; a-- > 0;) {
    dense = dense && (!tensor.strides || tensor.strides[a] == numel || tensor.shape[a] == 1);
    if (__builtin_mul_overflow(numel, tensor.shape[a], &numel)) return false;
  }
  return dense || numel == 0;
}

}  // namespace

bool is_plain_torch(PyObject* object) {
  const Torch* const known = torch();
  return known && is_plain(*known, object);
}

bool read_torch(PyObject* object, const EntryName& name, const Place& place, Entry& entry) {
  DLTensor tensor;
  if (!borrow(object, tensor, place.may_require_grad)) return false;
  read_tensor(tensor, name, place, entry);
  return true;
}

bool read_plain_torch(PyObject* object, const Place& place, Span& span) {
  DLTensor tensor;
  std::int64_t numel = 0;
  if (!borrow(object, tensor, place.may_require_grad) || !is_at(tensor.device, place) ||
      !is_c_contiguous(tensor, numel))
    return false;
  const std::optional<DType> dtype = find_dtype(tensor.dtype);
  if (!dtype || (!tensor.data && numel != 0)) return false;
  auto* const data = static_cast<std::byte*>(tensor.data);
  span = {data ? data + tensor.byte_offset : nullptr, numel, nullptr, *dtype};
  return true;
}

std::optional<Axes> find_torch_axes(PyObject* object) {
  DLTensor tensor;
  if (!borrow(object, tensor, true)) return std::nullopt;
  return tensor_axes(tensor);
}

}  // namespace gradclip::bindings
