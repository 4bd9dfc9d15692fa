// What several test files need: element types, random numbers, guarded memory, instruction sets.
#pragma once

#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "core/dtype.hpp"
#include "core/float_bits.hpp"
#include "cpu/isa.hpp"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace gradclip::test {

// How much of a sweep to do: sanitizers cost a factor of 5 to 15.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

template <class T>
inline constexpr DType kDTypeOf = DType::float64;
template <>
inline constexpr DType kDTypeOf<Float16> = DType::float16;
template <>
inline constexpr DType kDTypeOf<BFloat16> = DType::bfloat16;
template <>
inline constexpr DType kDTypeOf<float> = DType::float32;

template <class T>
using WordOf = typename FloatBits<T>::Word;
template <class T>
inline constexpr WordOf<T> kMagnitude = static_cast<WordOf<T>>(~FloatBits<T>::sign);

// The same sequence on every machine, where std::*_distribution differs between libraries.
class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  std::uint64_t bits() { return engine_(); }
  std::int64_t between(std::int64_t low, std::int64_t high) {  // both included
    return low + static_cast<std::int64_t>(bits() % static_cast<std::uint64_t>(high - low + 1));
  }
  double unit() { return static_cast<double>(bits() >> 11) * 0x1p-53; }  // [0, 1)
  template <class List>
  void shuffle(List& list) {
    for (std::size_t i = list.size(); i > 1; --i) std::swap(list[i - 1], list[bits() % i]);
  }

 private:
  std::mt19937_64 engine_;
};

// A magnitude with a random mantissa between 2^low and 2^(high + 1).
inline double random_magnitude(Random& random, int low, int high) {
  return std::ldexp(1.0 + random.unit(), static_cast<int>(random.between(low, high)));
}

// A value as the nearest element of T.
template <class T>
T element(double value) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return value;
  } else {
    T result;
    round_to(static_cast<float>(value), result);
    return result;
  }
}

template <class T>
std::span<const std::byte> bytes_of(const std::vector<T>& values) {
  return std::as_bytes(std::span(values));
}

// Any list as a std::vector, to compare with one.
template <class List>
auto listed(const List& list) {
  return std::vector(list.begin(), list.end());
}

// A copy of some bytes, `offset` bytes above a multiple of 64, between guards that must not change
// (under the address sanitizer: must not be touched).
class Guarded {
 public:
  Guarded(std::size_t offset, std::span<const std::byte> content)
      : size_(content.size()), front_(kGuard + offset) {
    const std::size_t total = (front_ + size_ + kGuard + 63) / 64 * 64;
    memory_ = static_cast<std::byte*>(std::aligned_alloc(64, total));
    std::memset(memory_, kPattern, total);
    if (size_ != 0) std::memcpy(data(), content.data(), size_);
    back_ = total - front_ - size_;
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(memory_, front_);
    ASAN_POISON_MEMORY_REGION(data() + size_, back_);
#endif
  }
  ~Guarded() {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(memory_, front_ + size_ + back_);
#endif
    std::free(memory_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  std::byte* data() const { return memory_ + front_; }
  std::size_t size() const { return size_; }
  bool holds(std::span<const std::byte> expected) const {
    return expected.size() == size_ &&
           (size_ == 0 || std::memcmp(data(), expected.data(), size_) == 0);
  }
  bool guards_intact() const {
#if defined(__SANITIZE_ADDRESS__)
    return true;  // a touch would have ended the process
#else
    for (std::size_t i = 0; i < front_; ++i)
      if (memory_[i] != std::byte{kPattern}) return false;
    for (std::size_t i = 0; i < back_; ++i)
      if (data()[size_ + i] != std::byte{kPattern}) return false;
    return true;
#endif
  }

 private:
  static constexpr std::size_t kGuard = 64;
  static constexpr unsigned char kPattern = 0xa5;
  std::byte* memory_;
  std::size_t size_, front_, back_;
};

// Call test(kernels) for every instruction set that this machine has.
template <class Test>
void for_each_isa(Test test) {
  const std::string before = cpu::isa_name();
  for (const std::string& name : cpu::supported_isas()) {
    CAPTURE(name);
    cpu::set_isa(name);
    test(cpu::kernels());
  }
  cpu::set_isa(before);
}

}  // namespace gradclip::test

#define GRADCLIP_ALL_TYPES gradclip::Float16, gradclip::BFloat16, float, double
