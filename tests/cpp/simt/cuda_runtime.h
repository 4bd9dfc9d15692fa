// In place of CUDA's: the words of the language that the kernels use, and a runtime over host memory in
// which everything is done at once.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "simt.hpp"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_size())
#define gridDim (simt::grid_size())

#define SIMT_HERE (simt::Place{__FILE__, __LINE__})
#define __syncthreads() ((void)simt::block_barrier(0, SIMT_HERE))
#define __syncthreads_or(vote) (simt::block_barrier((vote), SIMT_HERE) != 0)
#define __syncwarp() ((void)simt::warp_exchange(0xffffffffu, simt::Slot{}, SIMT_HERE))
#define __shfl_xor_sync(mask, value, step) \
  (simt::shuffle((mask), (value), simt::lane() ^ static_cast<unsigned>(step), SIMT_HERE))
#define __ballot_sync(mask, vote) (simt::ballot((mask), (vote), SIMT_HERE))
#define __any_sync(mask, vote) (simt::ballot((mask), (vote), SIMT_HERE) != 0)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
// One thread runs at a time: every access is atomic, and all memory is seen at once.
template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = static_cast<T>(before + value);
  return before;
}
inline void __threadfence() {}
template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
void __stcg(T* at, T value) {
  *at = value;
}
template <class T>
T __ldcg(const T* at) {
  return *at;
}

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNotReady = 600
};
inline const char* cudaGetErrorName(cudaError_t) { return "cudaError"; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

using cudaStream_t = struct CUstream_st*;
struct CUevent_st {
  cudaStream_t recorded_on = nullptr;
};
using cudaEvent_t = CUevent_st*;
enum { cudaEventDisableTiming = 2 };

namespace simt {
// The machine that is emulated, as tests choose it, and what they want to know about a call.
struct Machine {
  int multiprocessors = 1;  // of each device: the size of grids
  int devices = 2;
  int current_device = 0;
  bool is_capturing = false;
  bool is_busy = false;  // no event that was recorded has been reached yet
  struct Memory {
    int device;  // -1: not of a device
    bool managed;
  };
  std::map<std::uintptr_t, Memory> memory;  // by first address, to the next one; else of device 0
  std::vector<std::pair<cudaStream_t, cudaStream_t>> waits;  // (waiting, before), in order
  void (*on_host_wait)() = nullptr;  // called where a GPU could make the host wait
};
inline Machine& machine() {
  static Machine machine;
  return machine;
}
inline void host_waits() {
  if (machine().on_host_wait) machine().on_host_wait();
}
inline Machine::Memory kind_of(const void* pointer) {
  const auto& memory = machine().memory;
  const auto after = memory.upper_bound(reinterpret_cast<std::uintptr_t>(pointer));
  return after == memory.begin() ? Machine::Memory{0, false} : std::prev(after)->second;
}
}  // namespace simt

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->recorded_on = stream;
  return cudaSuccess;
}
inline cudaError_t cudaEventQuery(cudaEvent_t) {
  return simt::machine().is_busy ? cudaErrorNotReady : cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) {
  ++simt::counters().waits;
  simt::host_waits();
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t waiting, cudaEvent_t event, unsigned) {
  // A stream is in order with itself.
  if (waiting != event->recorded_on)
    simt::machine().waits.emplace_back(waiting, event->recorded_on);
  return cudaSuccess;
}
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status =
      simt::machine().is_capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  ++simt::counters().waits;
  simt::host_waits();
  return cudaSuccess;
}

// Filled with a pattern: nothing may count on zeros.
inline cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  ++simt::counters().allocations;
  *memory = std::malloc(bytes);
  if (!*memory) return cudaErrorMemoryAllocation;
  std::memset(*memory, 0xcd, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* memory) {
  if (memory) simt::host_waits();
  std::free(memory);
  return cudaSuccess;
}
inline cudaError_t cudaMallocHost(void** memory, std::size_t bytes) {
  return cudaMalloc(memory, bytes);
}
inline cudaError_t cudaFreeHost(void* memory) { return cudaFree(memory); }
enum cudaMemcpyKind {
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3
};
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes,
                                   cudaMemcpyKind kind, cudaStream_t stream) {
  // The default stream is the current device's: of another one's work it knows nothing. (CUDA copies,
  // too early.)
  if (kind == cudaMemcpyDeviceToHost && !stream &&
      simt::kind_of(from).device != simt::machine().current_device)
    return cudaErrorInvalidDevice;
  ++simt::counters().copies;
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  if (bytes != 0) std::memset(to, value, bytes);
  return cudaSuccess;
}

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = simt::machine().multiprocessors;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = simt::machine().devices;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = simt::machine().current_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  simt::machine().current_device = device;
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }
struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount;
  std::size_t totalGlobalMem;
};
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {"emulated", 0, 0, simt::machine().multiprocessors, std::size_t{1} << 30};
  return cudaSuccess;
}
enum cudaMemoryType {
  cudaMemoryTypeUnregistered,
  cudaMemoryTypeHost,
  cudaMemoryTypeDevice,
  cudaMemoryTypeManaged
};
struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
};
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes,
                                            const void* pointer) {
  const simt::Machine::Memory kind = simt::kind_of(pointer);
  *attributes = {kind.device < 0 ? cudaMemoryTypeUnregistered
                 : kind.managed  ? cudaMemoryTypeManaged
                                 : cudaMemoryTypeDevice,
                 kind.device};
  return cudaSuccess;
}
