// What there is of CUDA on this machine.
#include <type_traits>

#include "cuda/engine.hpp"
#include "cuda/runtime.hpp"

#if !defined(GRADCLIP_EMULATED)
#include <dlfcn.h>
#endif

namespace gradclip::cuda {
namespace {

#if defined(GRADCLIP_EMULATED)
using simt::enter_device;
using simt::leave_device;
#else
// Contexts are pushed and popped. cudaSetDevice would make one (500 MB) where it goes back to a device that
// nobody has used: every thread begins at device 0.
struct Driver {
  int (*get)(int* device, int ordinal) = nullptr;
  int (*retain)(void** context, int device) = nullptr;
  int (*release)(int device) = nullptr;
  int (*push)(void* context) = nullptr;
  int (*pop)(void** context) = nullptr;

  Driver() {
    void* const library = dlopen("libcuda.so.1", RTLD_LAZY);  // never closed
    const auto find = [&](auto& function, const char* name) {
      using Function = std::remove_reference_t<decltype(function)>;
      if (library) function = reinterpret_cast<Function>(dlsym(library, name));
      if (!function) throw std::runtime_error(std::string("CUDA: the driver has no ") + name);
    };
    find(get, "cuDeviceGet");
    find(retain, "cuDevicePrimaryCtxRetain");
    find(release, "cuDevicePrimaryCtxRelease_v2");
    find(push, "cuCtxPushCurrent_v2");
    find(pop, "cuCtxPopCurrent_v2");
  }
};
const Driver& driver() {
  static const Driver driver;
  return driver;
}

void enter_device(int ordinal) {
  int device = 0;
  void* context = nullptr;
  int error = driver().get(&device, ordinal);
  if (error == 0) error = driver().retain(&context, device);
  if (error == 0) error = driver().push(context);
  if (error != 0)
    throw std::runtime_error("CUDA: device " + std::to_string(ordinal) +
                             " cannot be made the current one: error " + std::to_string(error));
}
void leave_device(int ordinal) {
  int device = 0;
  void* context = nullptr;
  driver().pop(&context);
  if (driver().get(&device, ordinal) == 0) driver().release(device);
}
#endif

}  // namespace

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

static thread_local const DeviceGuard* innermost_guard = nullptr;

DeviceGuard::DeviceGuard(int device)
    : outer_(innermost_guard),
      device_(device),
      is_nested_(innermost_guard && innermost_guard->device_ == device) {
  if (!is_nested_) {
    int now = 0;
    check(cudaGetDevice(&now), "cudaGetDevice");
    has_entered_ = now != device;
    if (has_entered_) enter_device(device);
    auto mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    capture_mode_ = mode;
  }
  innermost_guard = this;
}

DeviceGuard::~DeviceGuard() {
  innermost_guard = outer_;
  if (is_nested_) return;
  auto mode = static_cast<cudaStreamCaptureMode>(capture_mode_);
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (has_entered_) leave_device(device_);
}

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
