// What there is of CUDA on this machine.
#include "cuda/engine.hpp"
#include "cuda/runtime.hpp"

namespace gradclip::cuda {

std::string missing() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) return "no CUDA device";
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  if (error == cudaErrorInsufficientDriver && driver_version() == 0) return "no CUDA driver";
  if (error == cudaErrorInsufficientDriver)
    return "a CUDA driver that is too old (it is for CUDA " +
           std::to_string(driver_version() / 1000) + "." +
           std::to_string(driver_version() % 1000 / 10) + ")";
  return std::string(cudaGetErrorName(error)) + " (" + cudaGetErrorString(error) + ")";
}

int device_count() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  return count;
}

DeviceInfo device_info(int device) {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  return {properties.name, properties.major, properties.minor, properties.multiProcessorCount,
          properties.totalGlobalMem};
}

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
  return version;
}

int driver_version() {
  int version = 0;
  check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return version;
}

std::string architectures() { return GRADCLIP_CUDA_ARCHITECTURES; }

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

void set_device(int device) { check(cudaSetDevice(device), "cudaSetDevice"); }

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

void copy_to_host(void* to, const void* from, std::size_t bytes, Stream stream) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync");
  synchronize(stream);
}

// From memory that is not pinned the copy is staged before the function returns.
// https://docs.nvidia.com/cuda/cuda-runtime-api/api-sync-behavior.html
void copy_to_device(void* to, const void* from, std::size_t bytes, Stream stream) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
}

void copy_on_device(void* to, const void* from, std::size_t bytes, Stream stream) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream), "cudaMemcpyAsync");
}

void synchronize(Stream stream) { check(cudaStreamSynchronize(stream), "cudaStreamSynchronize"); }

void wait_for(Stream waiting, Stream before) {
  if (waiting == before) return;
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  cudaError_t error = cudaEventRecord(event, before);
  if (error == cudaSuccess) error = cudaStreamWaitEvent(waiting, event, 0);
  cudaEventDestroy(event);  // freed by the driver once it has been reached
  check(error, "cudaStreamWaitEvent");
}

PointerInfo pointer_info(const void* pointer) {
  cudaPointerAttributes attributes{};
  if (cudaPointerGetAttributes(&attributes, pointer) != cudaSuccess) {
    cudaGetLastError();
    return {-1, false};
  }
  const bool managed = attributes.type == cudaMemoryTypeManaged;
  return {managed || attributes.type == cudaMemoryTypeDevice ? attributes.device : -1, managed};
}

}  // namespace gradclip::cuda
