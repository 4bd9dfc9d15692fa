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
Axes tensor_axes(const DLTensor& tensor);

}  // namespace gradclip::bindings
