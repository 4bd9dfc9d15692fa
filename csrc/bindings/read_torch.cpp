// torch tensors, borrowed through torch's DLPack exchange API: 50 nanoseconds each, where
// __dlpack__ takes 2 microseconds. https://dmlc.github.io/dlpack/latest/c_api.html
#include <dlpack/dlpack.h>

#include <atomic>

#include "bindings/dlpack.hpp"
#include "bindings/modules.hpp"

namespace gradclip::bindings {
namespace {

// Of the torch that somebody has imported; kept for good.
struct Torch {
  PyObject* tensor;
  PyObject* parameter;
  PyGetSetDef* requires_grad;
  const DLPackExchangeAPI* exchange;
};

// Null without torch, or with one that has no exchange API.
const Torch* torch() {
  static std::atomic<const Torch*> known{nullptr};
  if (const Torch* const found = known) return found;
  py::object tensor = imported("torch", "Tensor");
  py::object parameter = imported("torch.nn", "Parameter");
  if (tensor.is_none() || parameter.is_none()) return nullptr;
  const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
  constexpr char kName[] = "dlpack_exchange_api";
  if (!PyCapsule_IsValid(capsule.ptr(), kName)) return nullptr;
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
  known = new Torch{tensor.release().ptr(), parameter.release().ptr(), getter, exchange};
  return known;
}

}  // namespace

bool borrow_torch_tensor(PyObject* object, DLTensor& tensor) {
  const Torch* const known = torch();
  if (!known) return false;
  auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  // Not their subclasses: of a DTensor the pointer and size that are handed out belong together with
  // no memory at all.
  if (type != known->tensor && type != known->parameter) return false;
  // By its getter: to look the attribute up takes as long as all the rest.
  PyObject* const requires_grad = known->requires_grad->get(object, known->requires_grad->closure);
  if (!requires_grad) throw py::error_already_set();
  Py_DECREF(requires_grad);  // True and False live for ever
  if (requires_grad != Py_False) return false;
  // A view that negates or conjugates is read as it lies in memory: norms and clips see no signs.
  if (known->exchange->dltensor_from_py_object_no_sync(object, &tensor) == 0) return true;
  PyErr_Clear();  // sparse, quantised, meta: read_dlpack says which
  return false;
}

bool is_c_contiguous(const DLTensor& tensor, std::int64_t& numel) {
  numel = 1;
  bool dense = true;
  for (int a = tensor.ndim; a-- > 0;) {
    dense = dense && (!tensor.strides || tensor.strides[a] == numel || tensor.shape[a] == 1);
    numel *= tensor.shape[a];
  }
  return dense || numel == 0;
}

bool read_plain_torch(PyObject* object, const Place& place, Span& span) {
  DLTensor tensor;
  std::int64_t numel = 0;
  if (!borrow_torch_tensor(object, tensor) || !is_at(tensor.device, place) ||
      !is_c_contiguous(tensor, numel))
    return false;
  const std::optional<DType> dtype = find_dtype(tensor.dtype);
  if (!dtype || (!tensor.data && numel != 0)) return false;
  span = {static_cast<std::byte*>(tensor.data) + tensor.byte_offset, numel, nullptr, *dtype};
  return true;
}

}  // namespace gradclip::bindings
