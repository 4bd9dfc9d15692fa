// What the GPU does with a list of gradients: the twin of cpu/engine.hpp. Arguments have been checked.
//
// Everything is enqueued on the stream that is given and nothing waits for the device, except where
// it is said. Failures of the CUDA runtime are thrown as std::runtime_error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/clip.hpp"
#include "core/element.hpp"
#include "core/norm.hpp"
#include "core/pair.hpp"
#include "core/rows.hpp"
#include "core/span.hpp"

struct CUstream_st;

namespace gradclip::cuda {

using Stream = CUstream_st*;

// What groups are clipped to, or multiplied by: a number of the host, or floats of the device, which are
// read when the kernels run: one, or one for each group.
struct Limits {
  double value = 0.0;
  const void* device = nullptr;  // of type `dtype`, a real one
  DType dtype = DType::float64;
  bool per_group = false;
};
struct Decision {
  Limits limits;
  ClipOptions options;
};

// Where the parts of a result lie in one buffer of device memory, in bytes. The buffer must be
// aligned to 8 bytes. float64 unless said otherwise.
struct ResultLayout {
  std::size_t tensors, groups;

  std::size_t total_norm() const { return 0; }
  std::size_t coefficients() const { return 8; }               // one per group
  std::size_t group_norms() const { return 8 + 8 * groups; }   // one per group
  std::size_t group_sums() const { return 8 + 16 * groups; }   // one per group, for `reduce`
  std::size_t norms() const { return 8 + 24 * groups; }        // one per tensor
  std::size_t flags() const { return norms() + 8 * tensors; }  // a ResultFlags
  std::size_t penalty() const { return flags() + 8; }          // of pairs
  std::size_t nonfinite() const { return flags() + 16; }       // one byte per tensor, 0 or 1
  std::size_t bytes() const { return (nonfinite() + tensors + 7) / 8 * 8; }
};

struct ResultFlags {
  std::uint8_t clipped;         // 0 or 1
  std::uint8_t nonfinite_norm;  // some norm is not finite
  std::uint8_t bad_limit;       // one of the device that is not usable: nothing is written
  std::uint8_t action;          // an Action
};

class Workspace;

// Floats of device memory: of float64, or of float32.
struct Floats {
  void* data = nullptr;
  bool are_float32 = false;
};

// Decisions from sums of parts that lie in device memory as words (core/sum_words.hpp), `count` of them one after the
// other in each array. What is given and cannot be used makes what comes of it NaN.
struct SumDecisions {
  std::size_t count;
  NormOrder order;
  ClipOptions options;         // grad_scale aside
  const std::uint32_t* words;  // of every part
  Floats limits;               // one, or one for each group
  bool per_group;              // the limits
  Floats grad_scale;
  double* factors;  // of every part, for scale_by()
  Floats total_norm, norms, group_norms, coefficients;
  bool *clipped, *nonfinite;  // the latter of every tensor
};

// The gradients of a call, ready for kernels: where they lie and how they are grouped.
class List {
 public:
  // For one call on `stream` of `device`, the current device: tables that do not fit into a kernel
  // argument are copied from pinned memory. Destroy it once the call's work is enqueued. `rows`: of the
  // gradients, where those have groups. `pairs`: what is measured and written is made of them; a part for each row,
  // if those have groups, or for each gradient.
  List(std::span<const Span> spans, const Groups& groups, const RowTable* rows, int device,
       Stream stream, const PairTable* pairs = nullptr);
  // For many calls, on any streams and threads: everything is copied now (this waits), and nothing
  // afterwards. Calls take turns on the device, for they share work memory; captured ones do not.
  List(std::span<const Span> spans, const Groups& groups, const RowTable* rows, int device);
  List(List&&) noexcept;
  ~List();

  ResultLayout layout() const;

  // Norms of tensors and groups, the sums of groups, and with `decision` what decide() writes. One launch;
  // two where ord is neither 1, 2 nor infinity, or is 1 and a tensor complex.
  void measure(const NormOrder& order, double grad_scale, std::byte* result, Stream stream,
               const Decision* decision = nullptr);
  // The same from sums over all processes (device memory, float64, one per group), but for the norms of
  // tensors. One launch.
  void take_sums(const NormOrder& order, double grad_scale, const double* sums, std::byte* result,
                 Stream stream, const Decision* decision = nullptr);
  // The sum of every part, which is a tensor or a row, as words into device memory. Launches as of measure().
  void measure_sums(const NormOrder& order, std::uint32_t* words, Stream stream);
  // From sums of the parts of a list that need not have memory. One launch, in which one block takes a decision.
  void decide_sums(const SumDecisions& decisions, Stream stream);
  // From the norms of groups in `result` to coefficients and flags. One launch.
  void decide(const Decision& decision, std::byte* result, Stream stream);
  // Multiply or set to zero as the flags and coefficients in `result` say. One launch, which
  // returns early where there is nothing to do.
  void change(const ClipOptions& options, const std::byte* result, Stream stream);

  void scale(double factor, Stream stream);
  // Each part by a number of device memory: where that is 1, its memory is not touched; kSetToZero is obeyed.
  void scale_by(const double* factors, bool down, Stream stream);
  // Real tensors alone. norms, total_norm and flags.clipped and nonfinite of `result` are set.
  void clip_by_value(const ValueLimit& limit, std::byte* result, Stream stream);
  // NaN and infinity counts of every tensor: counts[2 i], counts[2 i + 1] in device memory.
  void count_nonfinite(std::int64_t* counts, Stream stream);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Sums of shards as words, of shape (count, shards, parts) -> those of all shards together, of shape (count, parts).
// One launch.
void combine_sums(const NormOrder& order, const std::uint32_t* words, std::size_t count,
                  std::size_t shards, std::size_t parts, std::uint32_t* combined, Stream stream);

// --- The device -------------------------------------------------------------------------------------

// Why no kernel can run here ("no CUDA driver", "no CUDA device", ...); empty if one can.
std::string missing();

struct DeviceInfo {
  std::string name;
  int major, minor, multiprocessors;
  std::size_t memory_bytes;
};
int device_count();
DeviceInfo device_info(int device);
int runtime_version();        // 13000 is 13.0
int driver_version();         // 0 without a driver
std::string architectures();  // that kernels were compiled for, "75 80 ..."

// While it lives the device is the current one, and nothing that this thread does disturbs somebody else's
// capture of a stream: that would forbid every thread to allocate, free or ask for events.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  const DeviceGuard* outer_;  // of this thread
  int device_;
  bool is_nested_;            // in one of the same device, which has done all
  bool has_entered_ = false;  // the device was not the current one
  int capture_mode_ = 0;
};

bool is_capturing(Stream stream);
// Device memory to host memory; waits.
void copy_to_host(void* to, const void* from, std::size_t bytes, Stream stream);
// To device memory; what is on the host may go when this returns. Not while the stream is captured.
void copy_to_device(void* to, const void* from, std::size_t bytes, Stream stream);
void copy_on_device(void* to, const void* from, std::size_t bytes, Stream stream);
void synchronize(Stream stream);
// `waiting` will not go on before what is now enqueued on `before` is done.
void wait_for(Stream waiting, Stream before);
// The device of a pointer into device memory, and whether it is managed memory; -1 if it is neither.
struct PointerInfo {
  int device;
  bool managed;
};
PointerInfo pointer_info(const void* pointer);

}  // namespace gradclip::cuda
