// What the readers of DLPack tensors share.
#pragma once

#include <dlpack/dlpack.h>

#include <optional>

#include "bindings/gradients.hpp"

namespace gradclip::bindings {

std::optional<DType> find_dtype(const DLDataType& type);
bool is_at(const DLDevice& device, const Place& place);
// Check device and dtype, and set span and layout.
void read_tensor(const DLTensor& tensor, const EntryName& name, const Place& place, Entry& entry);

// The memory of a plain torch.Tensor or Parameter, valid as long as the object keeps its storage. False
// if it is anything else, or a tensor that read_dlpack refuses.
bool borrow_torch_tensor(PyObject* object, DLTensor& tensor);

}  // namespace gradclip::bindings
