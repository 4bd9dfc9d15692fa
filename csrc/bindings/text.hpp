// What messages say of objects, whatever these are: a text is made of any, and none of them raises.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace gradclip::bindings {

namespace py = pybind11;

// str(object) and repr(object); what UTF-8 cannot hold (lone surrogates) is escaped.
std::string str_text(py::handle object);
std::string repr_text(py::handle object);
// "torch.Tensor".
std::string full_type_name(py::handle object);

}  // namespace gradclip::bindings
