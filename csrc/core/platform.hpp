// What lets one header serve every instruction set and, later, nvcc.
#pragma once

// Always inlined: a kernel source is compiled once per instruction set, and an inline function that
// is emitted out of line is merged by the linker, so that a machine without AVX-512 could be given
// the copy that needs it.
#if defined(__CUDACC__)
#define GRADCLIP_INLINE __host__ __device__ __forceinline__
#else
#define GRADCLIP_INLINE inline __attribute__((always_inline))
#endif
