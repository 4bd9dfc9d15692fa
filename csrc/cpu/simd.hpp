// Blocks of 64 bytes, 16 float32 or 8 float64, in one, two or four registers.
//
// Arithmetic is GCC's vector extension; intrinsics stand only where it has no word for the
// instruction (halves of registers, 16-bit floats). For kernels.inc.hpp alone, which is compiled once
// per instruction set: everything here is in an unnamed namespace, so that no copy is shared.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "core/float_bits.hpp"

namespace gradclip::cpu {
namespace {

#if defined(__AVX512F__)
inline constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kRegisterBytes = 32;
#else
inline constexpr int kRegisterBytes = 16;  // SSE2, NEON, or whatever the compiler makes of it
#endif
inline constexpr int kRegisters = 64 / kRegisterBytes;  // of a block

typedef float FloatRegister __attribute__((vector_size(kRegisterBytes)));
typedef double DoubleRegister __attribute__((vector_size(kRegisterBytes)));
typedef std::uint32_t WordRegister __attribute__((vector_size(kRegisterBytes)));
typedef std::uint64_t LongRegister __attribute__((vector_size(kRegisterBytes)));

// N registers, as halves of halves: GCC keeps nested members in registers, but arrays in memory.
template <class Register, int N = kRegisters>
struct Block {
  Block<Register, N / 2> low, high;
};
template <class Register>
struct Block<Register, 1> {
  Register part;
};
using Floats = Block<FloatRegister>;    // 16 float32
using Doubles = Block<DoubleRegister>;  // 8 float64
using Words = Block<WordRegister>;      // 64 bytes of memory as 16 words of 32 bits

// f of every register.
template <class F, class R>
GRADCLIP_INLINE auto map(F f, const Block<R, 1>& a) {
  return Block<decltype(f(a.part)), 1>{f(a.part)};
}
template <class F, class R, int N>
GRADCLIP_INLINE auto map(F f, const Block<R, N>& a) {
  using Result = decltype(f(R{}));
  return Block<Result, N>{map(f, a.low), map(f, a.high)};
}
template <class F, class R>
GRADCLIP_INLINE auto zip(F f, const Block<R, 1>& a, const Block<R, 1>& b) {
  return Block<R, 1>{f(a.part, b.part)};
}
template <class F, class R, int N>
GRADCLIP_INLINE auto zip(F f, const Block<R, N>& a, const Block<R, N>& b) {
  return Block<R, N>{zip(f, a.low, b.low), zip(f, a.high, b.high)};
}

template <class R, int N>
GRADCLIP_INLINE Block<R, N> operator+(const Block<R, N>& a, const Block<R, N>& b) {
  return zip([](R x, R y) { return x + y; }, a, b);
}
template <class R, int N>
GRADCLIP_INLINE Block<R, N> operator*(const Block<R, N>& a, const Block<R, N>& b) {
  return zip([](R x, R y) { return x * y; }, a, b);
}
template <class R, int N>
GRADCLIP_INLINE Block<R, N> operator|(const Block<R, N>& a, const Block<R, N>& b) {
  return zip([](R x, R y) { return x | y; }, a, b);
}
GRADCLIP_INLINE Words operator&(const Words& a, std::uint32_t mask) {
  return map([=](WordRegister x) { return x & mask; }, a);
}
GRADCLIP_INLINE Words operator<<(const Words& a, int by) {
  return map([=](WordRegister x) { return x << by; }, a);
}
GRADCLIP_INLINE Words operator>>(const Words& a, int by) {
  return map([=](WordRegister x) { return x >> by; }, a);
}

// Keeps GCC from moving a load before or behind another one: it does not care for their order, but
// the prefetchers do. Out of order, the norms of float64 ran at 15 GB/s from memory instead of 24.
template <class R>
GRADCLIP_INLINE void keep_in_order(R& loaded) {
#if defined(__x86_64__)
  asm volatile("" : "+v"(loaded));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(loaded));
#endif
}

// Loads and stores at any address.
template <class R>
GRADCLIP_INLINE void load(const std::byte* address, Block<R, 1>& block) {
  __builtin_memcpy(&block.part, address, sizeof(R));
  keep_in_order(block.part);
}
template <class R, int N>
GRADCLIP_INLINE void load(const std::byte* address, Block<R, N>& block) {
  load(address, block.low);
  load(address + sizeof(block.low), block.high);
}
template <class B>
GRADCLIP_INLINE B load(const std::byte* address) {
  B block;
  load(address, block);
  return block;
}
template <class R>
GRADCLIP_INLINE void store(std::byte* address, const Block<R, 1>& block) {
  __builtin_memcpy(address, &block.part, sizeof(R));
}
template <class R, int N>
GRADCLIP_INLINE void store(std::byte* address, const Block<R, N>& block) {
  store(address, block.low);
  store(address + sizeof(block.low), block.high);
}

GRADCLIP_INLINE Floats broadcast(float value) {
  return map([=](FloatRegister zero) { return value - zero; }, Floats{});
}
GRADCLIP_INLINE Doubles broadcast(double value) {
  return map([=](DoubleRegister zero) { return value - zero; }, Doubles{});
}

GRADCLIP_INLINE Words bits_of(const Floats& x) {
  return map([](FloatRegister r) { return (WordRegister)r; }, x);
}
GRADCLIP_INLINE Floats floats_of(const Words& x) {
  return map([](WordRegister r) { return (FloatRegister)r; }, x);
}

GRADCLIP_INLINE Floats magnitude(const Floats& x) { return floats_of(bits_of(x) & 0x7fffffffu); }
template <int N>
GRADCLIP_INLINE Block<DoubleRegister, N> magnitude(const Block<DoubleRegister, N>& x) {
  constexpr std::uint64_t kMask = 0x7fffffffffffffffu;
  return map([](DoubleRegister r) { return (DoubleRegister)((LongRegister)r & kMask); }, x);
}

// float32 as float64, in twice as many registers.
GRADCLIP_INLINE Block<DoubleRegister, 2> widen(const Block<FloatRegister, 1>& x) {
#if defined(__AVX512F__)
  const __m512 v = (__m512)x.part;
  return {{(DoubleRegister)_mm512_cvtps_pd(_mm512_castps512_ps256(v))},
          {(DoubleRegister)_mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))}};
#elif defined(__AVX2__)
  const __m256 v = (__m256)x.part;
  return {{(DoubleRegister)_mm256_cvtps_pd(_mm256_castps256_ps128(v))},
          {(DoubleRegister)_mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))}};
#elif defined(__SSE2__)
  const __m128 v = (__m128)x.part;
  return {{(DoubleRegister)_mm_cvtps_pd(v)}, {(DoubleRegister)_mm_cvtps_pd(_mm_movehl_ps(v, v))}};
#else
  return {{DoubleRegister{x.part[0], x.part[1]}}, {DoubleRegister{x.part[2], x.part[3]}}};
#endif
}
template <int N>
GRADCLIP_INLINE Block<DoubleRegister, 2 * N> widen(const Block<FloatRegister, N>& x) {
  return {widen(x.low), widen(x.high)};
}
using DoublePair = Block<DoubleRegister, 2 * kRegisters>;  // 16 float64

// --- 16-bit floats: words of memory hold two, the lower address in the low half ---------------------

struct FloatPair {
  Floats low, high;
};

GRADCLIP_INLINE WordRegister choose(WordRegister mask, WordRegister yes, WordRegister no) {
  return (mask & yes) | (~mask & no);
}

// 16 float16, each in the low half of a word, as float32.
GRADCLIP_INLINE Floats from_halves(const Words& halves) {
#if defined(__AVX512F__)
  return {(FloatRegister)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)halves.part))};
#elif defined(__AVX2__)
  const __m256i packed = _mm256_permute4x64_epi64(
      _mm256_packus_epi32((__m256i)halves.low.part, (__m256i)halves.high.part), 0xd8);
  return {{(FloatRegister)_mm256_cvtph_ps(_mm256_castsi256_si128(packed))},
          {(FloatRegister)_mm256_cvtph_ps(_mm256_extracti128_si256(packed, 1))}};
#else
  // As to_float(Float16) in core/float_bits.hpp.
  return map(
      [](WordRegister half) {
        const WordRegister magnitude = (half & 0x7fffu) << 13, sign = (half & 0x8000u) << 16;
        const WordRegister scaled = (WordRegister)((FloatRegister)magnitude * 0x1p112f);
        const WordRegister special = (WordRegister)(magnitude >= 0x0f800000u);
        return (FloatRegister)(sign | choose(special, magnitude | 0x70000000u, scaled));
      },
      halves);
#endif
}

GRADCLIP_INLINE FloatPair split(const Words& words, Float16) {
  return {from_halves(words & 0xffffu), from_halves(words >> 16)};
}
GRADCLIP_INLINE FloatPair split(const Words& words, BFloat16) {
  return {floats_of(words << 16), floats_of(words & 0xffff0000u)};
}

// Round products of a bfloat16 to 16 bits, each in the low half of a word, to nearest even. NaN needs
// no care: its low 16 bits are 0, as they were in the factors, so rounding adds no carry.
GRADCLIP_INLINE Words round_words(const Floats& x, BFloat16) {
  return map([](WordRegister bits) { return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16; },
             bits_of(x));
}

// Products that have been rounded to nearest, for those that must not be above the exact ones: as
// below_if_subnormal() in core/element.hpp.
GRADCLIP_INLINE Floats below_if_subnormal(const Floats& x) {
  return floats_of(map(
      [](WordRegister bits) {
        return bits + (WordRegister)((bits & 0x7fffffffu) - 1u < 0x7fffffu);  // a mask is -1
      },
      bits_of(x)));
}
GRADCLIP_INLINE Doubles below_if_subnormal(const Doubles& x) {
  return map(
      [](DoubleRegister r) {
        const LongRegister bits = (LongRegister)r;
        constexpr std::uint64_t kMask = 0x7fffffffffffffffu, kSubnormals = 0xfffffffffffffu;
        return (DoubleRegister)(bits + (LongRegister)((bits & kMask) - 1u < kSubnormals));
      },
      x);
}

// 16 halves of words, each in the low half of a word of its own, in the order of memory.
GRADCLIP_INLINE Words unpack(const std::byte* halves) {
#if defined(__AVX512F__)
  const auto* const from = reinterpret_cast<const __m256i_u*>(halves);
  return {(WordRegister)_mm512_cvtepu16_epi32(_mm256_loadu_si256(from))};
#elif defined(__AVX2__)
  const auto* const from = reinterpret_cast<const __m128i_u*>(halves);
  return {{(WordRegister)_mm256_cvtepu16_epi32(_mm_loadu_si128(from))},
          {(WordRegister)_mm256_cvtepu16_epi32(_mm_loadu_si128(from + 1))}};
#else
  std::uint16_t from[16];
  std::uint32_t words[16];
  __builtin_memcpy(from, halves, sizeof(from));
  for (int i = 0; i < 16; ++i) words[i] = from[i];
  Words block;
  __builtin_memcpy(&block, words, sizeof(block));
  return block;
#endif
}

// 16 numbers as float64.
GRADCLIP_INLINE DoublePair load_wide(const std::byte* from, float) {
  return widen(load<Floats>(from));
}
GRADCLIP_INLINE DoublePair load_wide(const std::byte* from, double) {
  return load<DoublePair>(from);
}
GRADCLIP_INLINE DoublePair load_wide(const std::byte* from, BFloat16) {
  return widen(floats_of(unpack(from) << 16));
}
GRADCLIP_INLINE DoublePair load_wide(const std::byte* from, Float16) {
  return widen(from_halves(unpack(from)));
}

#if defined(__F16C__)
// 8 float16 as float64, and back to nearest.
typedef float EightFloats __attribute__((vector_size(32)));
typedef double EightDoubles __attribute__((vector_size(64)));
GRADCLIP_INLINE void widen_eight(const std::byte* from, double* to) {
  const auto halves = _mm_loadu_si128(reinterpret_cast<const __m128i_u*>(from));
  const auto wide = __builtin_convertvector((EightFloats)_mm256_cvtph_ps(halves), EightDoubles);
  __builtin_memcpy(to, &wide, sizeof(wide));
}
GRADCLIP_INLINE void narrow_eight(const double* from, std::byte* to) {
  EightDoubles wide;
  __builtin_memcpy(&wide, from, sizeof(wide));
  const EightFloats floats = __builtin_convertvector(wide, EightFloats);
  _mm_storeu_si128(reinterpret_cast<__m128i_u*>(to),
                   _mm256_cvtps_ph((__m256)floats, _MM_FROUND_TO_NEAREST_INT));
}
#endif

enum class Rounding { nearest, down };

// As truncated_to_bfloat16. NaN needs no care, as above.
GRADCLIP_INLINE Words truncate_words(const Floats& x, BFloat16) {
  return bits_of(below_if_subnormal(x)) >> 16;
}
template <Rounding kRounding, class Half>
GRADCLIP_INLINE Words product_words(const Floats& x, const Floats& factors, Half) {
  if constexpr (kRounding == Rounding::down)
    return truncate_words(x * factors, Half{});
  else
    return round_words(x * factors, Half{});
}

// Multiply 32 elements in place.
template <Rounding kRounding>
GRADCLIP_INLINE void scale_block(std::byte* block, float factor, BFloat16) {
  const Floats factors = broadcast(factor);
  const FloatPair pair = split(load<Words>(block), BFloat16{});
  store(block, product_words<kRounding>(pair.low, factors, BFloat16{}) |
                   (product_words<kRounding>(pair.high, factors, BFloat16{}) << 16));
}

#if defined(__AVX512F__)
template <Rounding kRounding>
GRADCLIP_INLINE void scale_block(std::byte* block, float factor, Float16) {
  // Products that are subnormal in float32 are 0 here: truncated, whatever they were rounded to.
  constexpr int kMode =
      kRounding == Rounding::down ? _MM_FROUND_TO_ZERO : _MM_FROUND_TO_NEAREST_INT;
  for (int half = 0; half < 2; ++half) {
    auto* address = reinterpret_cast<__m256i_u*>(block + 32 * half);
    const __m512 x = _mm512_cvtph_ps(_mm256_loadu_si256(address));
    const __m512 product = _mm512_mul_ps(x, _mm512_set1_ps(factor));
    _mm256_storeu_si256(address, _mm512_cvtps_ph(product, kMode));
  }
}
#elif defined(__AVX2__)
template <Rounding kRounding>
GRADCLIP_INLINE void scale_block(std::byte* block, float factor, Float16) {
  constexpr int kMode =
      kRounding == Rounding::down ? _MM_FROUND_TO_ZERO : _MM_FROUND_TO_NEAREST_INT;
  for (int quarter = 0; quarter < 4; ++quarter) {
    auto* address = reinterpret_cast<__m128i_u*>(block + 16 * quarter);
    const __m256 x = _mm256_cvtph_ps(_mm_loadu_si128(address));
    const __m256 product = _mm256_mul_ps(x, _mm256_set1_ps(factor));
    _mm_storeu_si128(address, _mm256_cvtps_ph(product, kMode));
  }
}
#else
// As to_float16 in core/float_bits.hpp, in the low half of every word.
GRADCLIP_INLINE Words round_words(const Floats& x, Float16) {
  return map(
      [](WordRegister bits) {
        const WordRegister magnitude = bits & 0x7fffffffu;
        const WordRegister subnormal =
            (WordRegister)((FloatRegister)magnitude + 0.5f) - 0x3f000000u;
        WordRegister half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
        half = choose((WordRegister)(magnitude < 0x38800000u), subnormal, half);
        half = choose((WordRegister)(magnitude >= 0x477ff000u), WordRegister{} + 0x7c00u, half);
        half = choose((WordRegister)(magnitude > 0x7f800000u),
                      ((magnitude >> 13) & 0x3ffu) | 0x7e00u, half);
        return ((bits >> 16) & 0x8000u) | half;
      },
      bits_of(x));
}
// As truncated_to_float16.
GRADCLIP_INLINE Words truncate_words(const Floats& x, Float16) {
  return map(
      [](WordRegister bits) {
        typedef std::int32_t SignedRegister __attribute__((vector_size(kRegisterBytes)));
        const WordRegister magnitude = bits & 0x7fffffffu;
        const auto is_subnormal = (WordRegister)(magnitude < 0x38800000u);
        const auto small = (FloatRegister)(magnitude & is_subnormal) * 0x1p24f;
        const auto subnormal = (WordRegister) __builtin_convertvector(small, SignedRegister);
        WordRegister half = choose(is_subnormal, subnormal, (magnitude - 0x38000000u) >> 13);
        half = choose((WordRegister)(magnitude >= 0x47800000u), WordRegister{} + 0x7bffu, half);
        half = choose((WordRegister)(magnitude == 0x7f800000u), WordRegister{} + 0x7c00u, half);
        half = choose((WordRegister)(magnitude > 0x7f800000u),
                      ((magnitude >> 13) & 0x3ffu) | 0x7e00u, half);
        return ((bits >> 16) & 0x8000u) | half;
      },
      bits_of(x));
}
template <Rounding kRounding>
GRADCLIP_INLINE void scale_block(std::byte* block, float factor, Float16) {
  const Floats factors = broadcast(factor);
  const FloatPair pair = split(load<Words>(block), Float16{});
  store(block, product_words<kRounding>(pair.low, factors, Float16{}) |
                   (product_words<kRounding>(pair.high, factors, Float16{}) << 16));
}
#endif

}  // namespace
}  // namespace gradclip::cpu
