// Bit patterns of floating-point numbers, and conversions that are exact or rounded to nearest even
// on every machine, with or without hardware for them.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "core/dtype.hpp"
#include "core/platform.hpp"

namespace gradclip {

static_assert(std::endian::native == std::endian::little,
              "numbers are taken apart as they lie in memory");

template <class To, class From>
GRADCLIP_INLINE To bit_copy(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Patterns as unsigned integers: with the sign cleared they are ordered as the magnitudes are,
// infinity above every number and NaN above infinity.
template <class T>
struct FloatBits;
template <>
struct FloatBits<Float16> {
  using Word = std::uint16_t;
  static constexpr Word sign = 0x8000, infinity = 0x7c00;
};
template <>
struct FloatBits<BFloat16> {
  using Word = std::uint16_t;
  static constexpr Word sign = 0x8000, infinity = 0x7f80;
};
template <>
struct FloatBits<float> {
  using Word = std::uint32_t;
  static constexpr Word sign = 0x80000000u, infinity = 0x7f800000u;
};
template <>
struct FloatBits<double> {
  using Word = std::uint64_t;
  static constexpr Word sign = 0x8000000000000000u, infinity = 0x7ff0000000000000u;
};

GRADCLIP_INLINE bool is_nan(double x) { return x != x; }
GRADCLIP_INLINE bool is_finite(double x) {
  return (bit_copy<std::uint64_t>(x) & FloatBits<double>::infinity) != FloatBits<double>::infinity;
}
GRADCLIP_INLINE double quiet_nan() { return bit_copy<double>(std::uint64_t{0x7ff8000000000000u}); }
GRADCLIP_INLINE double infinity() { return bit_copy<double>(FloatBits<double>::infinity); }

// 2^exponent for -1022 <= exponent <= 1023.
GRADCLIP_INLINE double power_of_two(int exponent) {
  return bit_copy<double>(static_cast<std::uint64_t>(exponent + 1023) << 52);
}

GRADCLIP_INLINE float to_float(BFloat16 x) {
  return bit_copy<float>(static_cast<std::uint32_t>(x.bits) << 16);
}
GRADCLIP_INLINE float to_float(Float16 x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  const std::uint32_t magnitude = static_cast<std::uint32_t>(x.bits & 0x7fffu) << 13;
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  if (magnitude >= 0x0f800000u) return bit_copy<float>(sign | 0x70000000u | magnitude);  // inf, NaN
  // The exponent is 112 too low; the product also normalises subnormal numbers. It is exact.
  const float scaled = bit_copy<float>(magnitude) * bit_copy<float>(0x77800000u);
  return bit_copy<float>(sign | bit_copy<std::uint32_t>(scaled));
#endif
}
GRADCLIP_INLINE float to_float(float x) { return x; }

GRADCLIP_INLINE double to_double(Float16 x) { return to_float(x); }
GRADCLIP_INLINE double to_double(BFloat16 x) { return to_float(x); }
GRADCLIP_INLINE double to_double(float x) { return x; }
GRADCLIP_INLINE double to_double(double x) { return x; }

GRADCLIP_INLINE BFloat16 to_bfloat16(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  BFloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#else
  const std::uint32_t bits = bit_copy<std::uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    return {static_cast<std::uint16_t>((bits >> 16) | 0x40u)};  // keep NaN a NaN
  return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}
GRADCLIP_INLINE Float16 to_float16(float x) {
#if defined(__CUDA_ARCH__)
  Float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#else
  const std::uint32_t bits = bit_copy<std::uint32_t>(x);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 moves the last bit of a subnormal half to the last bit of a float.
    half = bit_copy<std::uint32_t>(bit_copy<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<std::uint16_t>(sign | half)};
#endif
}

// Towards zero.
GRADCLIP_INLINE BFloat16 truncated_to_bfloat16(float x) {
  const std::uint32_t bits = bit_copy<std::uint32_t>(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<std::uint16_t>((bits >> 16) | (nan ? 0x40u : 0u))};
}
GRADCLIP_INLINE Float16 truncated_to_float16(float x) {
#if defined(__CUDA_ARCH__)
  Float16 result;
  asm("cvt.rz.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#else
  const std::uint32_t bits = bit_copy<std::uint32_t>(x);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude >= 0x7f800000u)
    half = magnitude == 0x7f800000u ? 0x7c00u : 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  else if (magnitude >= 0x47800000u)
    half = 0x7bffu;  // 65504, the largest number
  else if (magnitude < 0x38800000u)
    half = static_cast<std::uint32_t>(bit_copy<float>(magnitude) * 0x1p24f);  // subnormal
  else
    half = (magnitude - 0x38000000u) >> 13;
  return {static_cast<std::uint16_t>(sign | half)};
#endif
}
GRADCLIP_INLINE void truncate_to(float x, float& to) { to = x; }
GRADCLIP_INLINE void truncate_to(float x, Float16& to) { to = truncated_to_float16(x); }
GRADCLIP_INLINE void truncate_to(float x, BFloat16& to) { to = truncated_to_bfloat16(x); }

// Round to T, to nearest even.
GRADCLIP_INLINE void round_to(float x, float& to) { to = x; }
GRADCLIP_INLINE void round_to(float x, Float16& to) { to = to_float16(x); }
GRADCLIP_INLINE void round_to(float x, BFloat16& to) { to = to_bfloat16(x); }

}  // namespace gradclip
