#include "cuda/workspace.hpp"

#include <algorithm>
#include <bit>
#include <mutex>
#include <vector>

namespace gradclip::cuda {

Workspace::~Workspace() {
  // At the end of the process the driver may be gone already: nothing to report then.
  cudaFree(counters_);
  cudaFree(memory_);
  cudaFreeHost(pinned_);
  if (end_) cudaEventDestroy(end_);
}

void Workspace::reserve(std::size_t counters, std::size_t bytes, cudaStream_t stream) {
  if (counters > counter_count_) {
    const std::size_t count = std::bit_ceil(std::max<std::size_t>(counters, 1024));
    check(cudaFree(counters_), "cudaFree");
    counters_ = nullptr;
    counter_count_ = 0;
    void* memory = nullptr;
    check(cudaMalloc(&memory, count * sizeof(std::uint32_t)), "cudaMalloc");
    counters_ = static_cast<std::uint32_t*>(memory);
    counter_count_ = count;
    check(cudaMemsetAsync(counters_, 0, count * sizeof(std::uint32_t), stream), "cudaMemsetAsync");
  }
  if (bytes > bytes_) {
    const std::size_t size = std::bit_ceil(std::max<std::size_t>(bytes, std::size_t{1} << 18));
    check(cudaFree(memory_), "cudaFree");
    memory_ = nullptr;
    bytes_ = 0;
    void* memory = nullptr;
    check(cudaMalloc(&memory, size), "cudaMalloc");
    memory_ = static_cast<std::byte*>(memory);
    bytes_ = size;
  }
}

std::byte* Workspace::pinned(std::size_t bytes) {
  if (bytes > pinned_bytes_) {
    const std::size_t size = std::bit_ceil(std::max<std::size_t>(bytes, std::size_t{1} << 16));
    check(cudaFreeHost(pinned_), "cudaFreeHost");
    pinned_ = nullptr;
    pinned_bytes_ = 0;
    void* memory = nullptr;
    check(cudaMallocHost(&memory, size), "cudaMallocHost");
    pinned_ = static_cast<std::byte*>(memory);
    pinned_bytes_ = size;
  }
  return pinned_;
}

void Workspace::mark_end(cudaStream_t stream) {
  if (!end_) check(cudaEventCreateWithFlags(&end_, cudaEventDisableTiming), "cudaEventCreate");
  check(cudaEventRecord(end_, stream), "cudaEventRecord");
  stream_ = stream;
}

void Workspace::let_wait(cudaStream_t stream) const {
  if (end_) check(cudaStreamWaitEvent(stream, end_, 0), "cudaStreamWaitEvent");
}

bool Workspace::is_idle() const { return !end_ || cudaEventQuery(end_) == cudaSuccess; }

void Workspace::wait_until_idle() const {
  if (end_) check(cudaEventSynchronize(end_), "cudaEventSynchronize");
}

namespace {

// Never destroyed: at the end of the process the driver goes first.
struct Pool {
  std::mutex mutex;
  std::vector<Workspace*> free;  // those that were found busy last
};
Pool& pool() {
  static Pool* const pool = new Pool;
  return *pool;
}

// A host that runs ahead of the device needs one for every call in flight. Beyond this many it waits.
constexpr std::ptrdiff_t kMostInFlight = 64;

}  // namespace

Workspace* take_workspace(int device, cudaStream_t stream) {
  Pool& all = pool();
  std::unique_lock lock(all.mutex);
  const auto of_device = [&](const Workspace* w) { return w->device() == device; };
  const auto is_ready = [&](const Workspace* w) { return of_device(w) && w->is_idle(); };
  auto found = std::ranges::find_if(all.free, is_ready);
  const bool is_idle = found != all.free.end();
  if (!is_idle) {
    if (std::ranges::count_if(all.free, of_device) < kMostInFlight) return new Workspace(device);
    // One whose end this stream comes to before this call in any case; others may be stalled.
    found = std::ranges::find_if(
        all.free, [&](const Workspace* w) { return of_device(w) && w->stream() == stream; });
    if (found == all.free.end()) found = std::ranges::find_if(all.free, of_device);
  }
  Workspace* const workspace = *found;
  // The next call shall not ask first those that were busy now.
  if (is_idle) std::rotate(all.free.begin(), found, all.free.end());
  all.free.erase(std::ranges::find(all.free, workspace));
  lock.unlock();  // others go on
  if (!is_idle) workspace->wait_until_idle();
  return workspace;
}

void give_back(Workspace* workspace, cudaStream_t stream) noexcept {
  try {
    workspace->mark_end(stream);
    Pool& all = pool();
    const std::scoped_lock lock(all.mutex);
    all.free.push_back(workspace);
  } catch (...) {
    delete workspace;  // the device is lost: whatever was on it is gone
  }
}

}  // namespace gradclip::cuda
