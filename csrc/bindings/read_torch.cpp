// torch tensors, borrowed through torch's DLPack exchange API: a tenth of a microsecond each, where
// __dlpack__ takes two. https://dmlc.github.io/dlpack/latest/c_api.html
#include <dlpack/dlpack.h>

#include <atomic>
#include <cstring>

#include "bindings/dlpack.hpp"
#include "bindings/modules.hpp"

namespace gradclip::bindings {
namespace {

// Of the torch that somebody has imported; kept for good.
struct Torch {
  PyObject* tensor;
  PyObject* parameter;
  const DLPackExchangeAPI* exchange;
};

std::atomic<const Torch*> torch_known{nullptr};

// Null without torch, or with one that has no exchange API.
const Torch* torch() {
  if (const Torch* const found = torch_known) return found;
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
  torch_known = new Torch{tensor.release().ptr(), parameter.release().ptr(), exchange};
  return torch_known;
}

// Whether an attribute, or what a method of that name returns, is False.
bool is_false(PyObject* value) {
  if (!value) throw py::error_already_set();
  Py_DECREF(value);  // True and False live for ever
  return value == Py_False;
}

}  // namespace

void prefetch_torch(PyObject* object) {
  const Torch* const known = torch_known.load(std::memory_order_relaxed);
  if (!known || reinterpret_cast<PyObject*>(Py_TYPE(object)) != known->tensor) return;
  // Behind the head, torch 2 keeps a flag and the pointer to the tensor proper. Where it does not, what is
  // asked for here is wrong, and that costs nothing but time.
  const char* tensor;
  std::memcpy(&tensor, reinterpret_cast<const char*>(object) + sizeof(PyObject) + sizeof(void*),
              sizeof(tensor));
  for (int line = 0; line < 3; ++line) __builtin_prefetch(tensor + 64 * line);
}

bool borrow_torch_tensor(PyObject* object, DLTensor& tensor) {
  const Torch* const known = torch();
  if (!known) return false;
  auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  // Not their subclasses: of a DTensor the pointer and size that are handed out belong together with
  // no memory at all.
  if (type != known->tensor && type != known->parameter) return false;
  static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  static PyObject* const is_conj = PyUnicode_InternFromString("is_conj");
  if (!is_false(PyObject_GetAttr(object, requires_grad))) return false;
  if (known->exchange->dltensor_from_py_object_no_sync(object, &tensor) != 0) {
    PyErr_Clear();  // sparse, quantised, meta: read_dlpack says which
    return false;
  }
  // Views that are not what lies in memory.
  if (!is_false(PyObject_CallMethodNoArgs(object, is_neg))) return false;
  return tensor.dtype.code != kDLComplex || is_false(PyObject_CallMethodNoArgs(object, is_conj));
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
