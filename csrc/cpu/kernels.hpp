// The table of kernels of one instruction set. Kernels trust their input.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.hpp"
#include "core/exact_sum.hpp"
#include "core/pair.hpp"

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
  // The sums of `count` numbers as float64, as PairKernels has it.
  double (*sum_wide_squares)(const std::byte* from, std::size_t count);
  double (*sum_wide_magnitudes)(const std::byte* from, std::size_t count);
  // Real numbers, `count` of them: to float64; back, to nearest or towards zero; and what moved_down() makes.
  void (*widen)(const std::byte* from, double* to, std::size_t count);
  void (*narrow)(const double* from, std::byte* to, std::size_t count);
  void (*narrow_down)(const double* from, std::byte* to, std::size_t count);
  void (*move_down)(const double* from, const double* steps, std::byte* to, std::size_t count);
};

// For the real types of a gradient and of what lies beside it, of which the formula multiplies: in registers, where
// both are dense. Of `count` numbers, at most as many as a tile of float64 has.
struct PairKernels {
  // The sum of squares of what is made of them, if order::can_be_trusted; else that is not it.
  double (*sum_squares)(const std::byte* x, const std::byte* y, std::size_t count,
                        const PairFormula& formula);
  // To nearest.
  void (*write)(std::byte* x, const std::byte* y, std::size_t count, const PairFormula& formula,
                double factor);
};

struct Kernels {
  TypeKernels of_real_type[kRealTypes];
  PairKernels of_real_types[kRealTypes][kRealTypes];
  // Of pairs: z becomes z + factor * y, z + factor * sign(y).
  void (*add_scaled)(double* z, const double* y, double factor, std::size_t count);
  void (*add_signs)(double* z, const double* y, double factor, std::size_t count);
  // The machine's own speed, to compare with: read every byte; read and write every byte.
  std::uint32_t (*read)(const std::byte* data, std::size_t bytes);
  void (*read_write)(std::byte* data, std::size_t bytes);

  const TypeKernels& of(DType dtype) const {
    return of_real_type[static_cast<std::size_t>(real_of(dtype))];
  }
  const PairKernels& of(DType x, DType y) const {
    return of_real_types[static_cast<std::size_t>(real_of(x))]
                        [static_cast<std::size_t>(real_of(y))];
  }
};

extern const Kernels kBaselineKernels;
#if defined(GRADCLIP_X86_KERNELS)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace gradclip::cpu
