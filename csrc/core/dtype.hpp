// Element types, named once. To add one, start here (see CONTRIBUTING.md).
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/platform.hpp"

namespace gradclip {

// The real types come first.
enum class DType : std::uint8_t { float16, bfloat16, float32, float64, complex64, complex128 };
inline constexpr std::size_t kRealTypes = static_cast<std::size_t>(DType::float64) + 1;

// The real type that a complex element is two of; itself for real types.
constexpr DType real_of(DType dtype) {
  if (dtype == DType::complex64) return DType::float32;
  if (dtype == DType::complex128) return DType::float64;
  return dtype;
}

constexpr bool is_complex(DType dtype) { return real_of(dtype) != dtype; }

constexpr std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::float16:
    case DType::bfloat16: return 2;
    case DType::float32: return 4;
    case DType::float64:
    case DType::complex64: return 8;
    case DType::complex128: return 16;
  }
  return 0;
}

constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::float16: return "float16";
    case DType::bfloat16: return "bfloat16";
    case DType::float32: return "float32";
    case DType::float64: return "float64";
    case DType::complex64: return "complex64";
    case DType::complex128: return "complex128";
  }
  return "?";
}

// Every name, for messages.
inline constexpr char kDTypeNames[] =
    "float16, bfloat16, float32, float64, complex64 or complex128";

// The storage of the 16-bit types: C++20 has no arithmetic types for them.
struct Float16 {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

// visit(T{}) with the real type of `dtype`: the one place where a dtype becomes a type.
template <class Visit>
GRADCLIP_INLINE constexpr decltype(auto) visit_real_type(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::float16: return visit(Float16{});
    case DType::bfloat16: return visit(BFloat16{});
    case DType::float32:
    case DType::complex64: return visit(float{});
    case DType::float64:
    case DType::complex128: return visit(double{});
  }
  __builtin_unreachable();
}

}  // namespace gradclip
