// The CUDA runtime as the engine uses it. tests/cpp/simt stands in for it where kernels run on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>

namespace gradclip::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorName(error) + " (" +
                           cudaGetErrorString(error) + ")");
}

#if defined(GRADCLIP_EMULATED)
template <class T>
T& shared_memory() {
  return *reinterpret_cast<T*>(simt::dynamic_shared());
}
template <class Arguments>
void launch(void (*kernel)(Arguments), unsigned blocks, unsigned threads, std::size_t shared_bytes,
            cudaStream_t, const Arguments& arguments) {
  simt::note_launch(reinterpret_cast<const void*>(kernel));
  simt::launch(kernel, dim3(blocks), dim3(threads), shared_bytes, arguments);
}
#else
// The block's shared memory as a T, uninitialised.
template <class T>
__device__ T& shared_memory() {
  extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
  return *reinterpret_cast<T*>(dynamic_shared_memory);
}
template <class Arguments>
void launch(void (*kernel)(Arguments), unsigned blocks, unsigned threads, std::size_t shared_bytes,
            cudaStream_t stream, const Arguments& arguments) {
  void* pointers[] = {const_cast<Arguments*>(&arguments)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(threads),
                         pointers, shared_bytes, stream),
        "cudaLaunchKernel");
}
#endif

}  // namespace gradclip::cuda
