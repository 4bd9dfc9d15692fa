// The table of kernels of one instruction set. Kernels trust their input.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.hpp"
#include "core/exact_sum.hpp"

namespace gradclip::cpu {

struct NonFiniteCounts {
  std::int64_t nan = 0, infinity = 0;
};

// For one real type. Data may have any alignment; sizes are in bytes, whole elements.
struct TypeKernels {
  // The sum of one tile (at most order::kTileBytes): of squares, of magnitudes.
  WideValue (*sum_squares)(const std::byte* tile, std::size_t bytes);
  WideValue (*sum_magnitudes)(const std::byte* tile, std::size_t bytes);
  // The largest magnitude as a bit pattern of the type: NaN if there is one.
  std::uint64_t (*largest)(const std::byte* data, std::size_t bytes);
  // Elements beyond the limit (a pattern of the type) get its magnitude; NaN stays. Returns whether
  // there were any; if not, nothing is written.
  bool (*clamp)(std::byte* data, std::size_t bytes, std::uint64_t limit);
  void (*scale)(std::byte* data, std::size_t bytes, double factor);
  // By a factor that is not negative; no element is above the exact product in magnitude.
  void (*scale_down)(std::byte* data, std::size_t bytes, double factor);
  NonFiniteCounts (*count_nonfinite)(const std::byte* data, std::size_t bytes);
  // Real numbers, `count` of them: to float64; back, to nearest or towards zero; and what moved_down() makes.
  void (*widen)(const std::byte* from, double* to, std::size_t count);
  void (*narrow)(const double* from, std::byte* to, std::size_t count);
  void (*narrow_down)(const double* from, std::byte* to, std::size_t count);
  void (*move_down)(const double* from, const double* steps, std::byte* to, std::size_t count);
};

struct Kernels {
  TypeKernels of_real_type[kRealTypes];
  // Of pairs: z becomes z + factor * y, z + factor * sign(y).
  void (*add_scaled)(double* z, const double* y, double factor, std::size_t count);
  void (*add_signs)(double* z, const double* y, double factor, std::size_t count);
  // The machine's own speed, to compare with: read every byte; read and write every byte.
  std::uint32_t (*read)(const std::byte* data, std::size_t bytes);
  void (*read_write)(std::byte* data, std::size_t bytes);

  const TypeKernels& of(DType dtype) const {
    return of_real_type[static_cast<std::size_t>(real_of(dtype))];
  }
};

extern const Kernels kBaselineKernels;
#if defined(GRADCLIP_X86_KERNELS)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace gradclip::cpu
