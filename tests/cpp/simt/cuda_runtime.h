// In place of CUDA's: the words of the language that the kernels use, and a runtime over host memory in
// which everything is done at once.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <string>
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
  ++simt::counters().loads;
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
  bool is_busy = false;                // no event that was recorded has been reached yet
  cudaStream_t busy_stream = nullptr;  // no event on this one
  cudaStream_t last_wait = nullptr;    // the stream of the event that the host waited for last
  bool others_capture = false;         // another thread, which forbids all what is unsafe then
  bool is_relaxed = false;             // this thread's mode: its calls disturb nobody
  std::size_t broken_captures = 0;     // of others
  std::set<int> contexts;              // devices of which there is one
  std::vector<int> pushed;             // current devices before those entered
  std::set<const void*> loaded;        // kernels
  std::map<std::string, std::size_t> calls;  // of the runtime, by name
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
inline void count_call(const char* name) { ++machine().calls[name]; }
inline void unsafe_call(const char* name) {
  count_call(name);
  machine().broken_captures += machine().others_capture && !machine().is_relaxed;
}
inline void use_context() { machine().contexts.insert(machine().current_device); }
// Contexts are pushed and popped.
inline void enter_device(int device) {
  count_call("cuCtxPushCurrent");
  machine().pushed.push_back(machine().current_device);
  machine().current_device = device;
  machine().contexts.insert(device);
}
inline void leave_device(int) {
  machine().current_device = machine().pushed.back();
  machine().pushed.pop_back();
}
// A launch loads a kernel that has not been loaded, which a graph cannot hold.
inline void note_launch(const void* kernel) {
  count_call("cudaLaunchKernel");
  use_context();
  if (!machine().loaded.insert(kernel).second) return;
  if (machine().is_capturing) throw Error("a kernel is loaded while a stream is captured");
}
inline Machine::Memory kind_of(const void* pointer) {
  const auto& memory = machine().memory;
  const auto after = memory.upper_bound(reinterpret_cast<std::uintptr_t>(pointer));
  return after == memory.begin() ? Machine::Memory{0, false} : std::prev(after)->second;
}
}  // namespace simt

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  simt::count_call("cudaEventCreateWithFlags");
  *event = new CUevent_st;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  simt::count_call("cudaEventRecord");
  event->recorded_on = stream;
  return cudaSuccess;
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
  simt::unsafe_call("cudaEventQuery");
  const auto& machine = simt::machine();
  const bool is_stalled = machine.busy_stream && event->recorded_on == machine.busy_stream;
  return machine.is_busy || is_stalled ? cudaErrorNotReady : cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  simt::machine().last_wait = event->recorded_on;
  simt::unsafe_call("cudaEventSynchronize");
  ++simt::counters().waits;
  simt::host_waits();
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  simt::count_call("cudaEventDestroy");
  delete event;
  return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t waiting, cudaEvent_t event, unsigned) {
  simt::count_call("cudaStreamWaitEvent");
  // A stream is in order with itself.
  if (waiting != event->recorded_on)
    simt::machine().waits.emplace_back(waiting, event->recorded_on);
  return cudaSuccess;
}
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  simt::count_call("cudaStreamIsCapturing");
  *status =
      simt::machine().is_capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  simt::count_call("cudaThreadExchangeStreamCaptureMode");
  const bool was_relaxed = simt::machine().is_relaxed;
  simt::machine().is_relaxed = *mode == cudaStreamCaptureModeRelaxed;
  *mode = was_relaxed ? cudaStreamCaptureModeRelaxed : cudaStreamCaptureModeGlobal;
  return cudaSuccess;
}
inline cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  simt::count_call("cudaStreamGetId");
  *id = reinterpret_cast<std::uintptr_t>(stream);
  return cudaSuccess;
}
struct cudaFuncAttributes {};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* kernel) {
  simt::machine().loaded.insert(kernel);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  simt::unsafe_call("cudaStreamSynchronize");
  ++simt::counters().waits;
  simt::host_waits();
  return cudaSuccess;
}

// Filled with a pattern: nothing may count on zeros.
inline cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  simt::unsafe_call("cudaMalloc");
  ++simt::counters().allocations;
  simt::use_context();
  *memory = std::malloc(bytes);
  if (!*memory) return cudaErrorMemoryAllocation;
  std::memset(*memory, 0xcd, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* memory) {
  simt::unsafe_call("cudaFree");
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
  simt::count_call("cudaMemcpyAsync");
  // The default stream is the current device's: of another one's work it knows nothing. (CUDA copies,
  // too early.)
  if (kind == cudaMemcpyDeviceToHost && !stream &&
      simt::kind_of(from).device != simt::machine().current_device)
    return cudaErrorInvalidDevice;
  ++simt::counters().copies;
  simt::counters().bytes_copied += bytes;
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  simt::count_call("cudaMemsetAsync");
  if (bytes != 0) std::memset(to, value, bytes);
  return cudaSuccess;
}

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  simt::count_call("cudaDeviceGetAttribute");
  *value = simt::machine().multiprocessors;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = simt::machine().devices;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  simt::count_call("cudaGetDevice");
  *device = simt::machine().current_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  simt::count_call("cudaSetDevice");
  simt::machine().current_device = device;
  simt::use_context();
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
  simt::count_call("cudaPointerGetAttributes");
  const simt::Machine::Memory kind = simt::kind_of(pointer);
  *attributes = {kind.device < 0 ? cudaMemoryTypeUnregistered
                 : kind.managed  ? cudaMemoryTypeManaged
                                 : cudaMemoryTypeDevice,
                 kind.device};
  return cudaSuccess;
}
