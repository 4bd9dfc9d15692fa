// Device memory that calls work in, kept from call to call: allocating it anew would cost more than a
// small measurement.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/runtime.hpp"

namespace gradclip::cuda {

class Workspace {
 public:
  explicit Workspace(int device) : device_(device) {}
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace();

  // Room for so many counters, which are 0 between calls, and so many other bytes. What there was before is
  // lost where it was not enough.
  void reserve(std::size_t counters, std::size_t bytes, cudaStream_t stream);

  std::uint32_t* counters() const { return counters_; }
  std::byte* memory() const { return memory_; }
  // So many bytes of host memory for copies.
  std::byte* pinned(std::size_t bytes);
  int device() const { return device_; }
  cudaStream_t stream() const { return stream_; }  // of the last call

  // The end of a call's work, and whether the device has come to it.
  void mark_end(cudaStream_t stream);
  // `stream` will not go on before.
  void let_wait(cudaStream_t stream) const;
  bool is_idle() const;
  void wait_until_idle() const;

 private:
  int device_;
  std::uint32_t* counters_ = nullptr;
  std::byte* memory_ = nullptr;
  std::byte* pinned_ = nullptr;
  std::size_t counter_count_ = 0, bytes_ = 0, pinned_bytes_ = 0;
  cudaEvent_t end_ = nullptr;
  cudaStream_t stream_ = nullptr;
};

// One that no call of this process uses. The caller gives it back when its work is enqueued.
Workspace* take_workspace(int device, cudaStream_t stream);
void give_back(Workspace* workspace, cudaStream_t stream) noexcept;

// One for what a function enqueues.
class BorrowedWorkspace {
 public:
  BorrowedWorkspace(int device, cudaStream_t stream)
      : workspace_(take_workspace(device, stream)), stream_(stream) {}
  BorrowedWorkspace(const BorrowedWorkspace&) = delete;
  BorrowedWorkspace& operator=(const BorrowedWorkspace&) = delete;
  ~BorrowedWorkspace() { give_back(workspace_, stream_); }
  Workspace* operator->() const { return workspace_; }

 private:
  Workspace* workspace_;
  cudaStream_t stream_;
};

}  // namespace gradclip::cuda
