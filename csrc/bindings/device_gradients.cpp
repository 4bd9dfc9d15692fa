#include "bindings/device_gradients.hpp"

#include <algorithm>

#include "bindings/arguments.hpp"
#include "bindings/device_call.hpp"

namespace gradclip::bindings {
namespace {

bool same(const RowTable* a, const RowTable* b) {
  return a && b ? std::ranges::equal(a->gradients, b->gradients) : a == b;
}
bool same(const NamedGroups& a, const NamedGroups& b) {
  return a.groups.kind == b.groups.kind && a.groups.label == b.groups.label &&
         same(a.rows.get(), b.rows.get());
}

}  // namespace

DeviceGradients::DeviceGradients(const py::object& grads, int device, std::uintptr_t stream,
                                 const std::string& framework, py::object allocate, bool is_kept,
                                 bool is_update)
    : device_(device),
      framework_(DeviceReader::framework_named(framework)),
      allocate_(std::move(allocate)),
      reader_(device, as_stream(stream), framework_, is_kept),
      gradients_([&] {
        const cuda::DeviceGuard guard(device);
        if (cuda::is_capturing(as_stream(stream)))
          throw std::runtime_error(
              "grads: expected a Plan made before the stream was captured into a CUDA graph, got "
              "arrays that have to be read and placed first");
        return Gradients(grads, reader_, is_update ? "new" : "grads");
      }()),
      is_kept_(is_kept) {
  if (!is_kept) return;
  const cuda::DeviceGuard guard(device);
  kept({}, false);
}

DeviceGradients::~DeviceGradients() {
  if (kept_.empty()) return;
  std::optional<cuda::DeviceGuard> guard;
  try {
    guard.emplace(device_);
  } catch (const std::exception&) {
    // At the end of the process the driver may be gone, and with it what is freed here.
    guard.reset();
  }
  const GilRelease release;
  for (Kept& kept : kept_) const cuda::List freed(std::move(kept.list));  // which may wait
}

DeviceGradients::Kept& DeviceGradients::kept(const NamedGroups& named, bool is_capturing) {
  {
    const std::scoped_lock lock(kept_mutex_);
    const auto found = std::ranges::find_if(
        kept_, [&](const Kept& candidate) { return same(candidate.named, named); });
    if (found != kept_.end()) return *found;
  }
  if (is_capturing)
    throw std::runtime_error(
        "groups: expected a grouping that the plan has seen before the stream is captured into a "
        "CUDA graph (call it once), got a new one");
  cuda::List list = [&] {
    const GilRelease release;
    return cuda::List(gradients_.spans(), named.groups, named.rows.get(), device_);
  }();
  py::object memory = allocate_for(list.layout());
  const std::scoped_lock lock(kept_mutex_);
  kept_.push_back({named, std::move(list), std::move(memory)});  // perhaps by two threads: no harm
  return kept_.back();
}

py::object DeviceGradients::allocate_for(const cuda::ResultLayout& layout) const {
  return allocate_(layout.bytes());
}

py::object DeviceGradients::norms(const py::object& ord, std::uintptr_t stream) {
  const NormOrder order = norm_order(ord);
  gradients_.recheck(reader_, ord);
  DeviceCall call(*this, stream);
  const py::object memory = call.allocate();
  std::byte* const result = pointer_of(memory);
  {
    const GilRelease release;
    call.list().measure(order, 1.0, result, call.stream());
  }
  call.end();
  return memory;
}

py::list DeviceGradients::count_nonfinite(cuda::List& list, cuda::Stream stream) const {
  std::vector<std::int64_t> counts(2 * gradients_.spans().size());
  const std::size_t bytes = counts.size() * sizeof(counts[0]);
  const py::object memory = allocate_(bytes);
  auto* const device_counts = reinterpret_cast<std::int64_t*>(pointer_of(memory));
  {
    const GilRelease release;
    list.count_nonfinite(device_counts, stream);
    cuda::copy_to_host(counts.data(), device_counts, bytes, stream);
  }
  py::list found;
  for (std::size_t i = 0; i < counts.size() / 2; ++i)
    if (counts[2 * i] + counts[2 * i + 1] > 0)
      found.append(py::make_tuple(i, counts[2 * i], counts[2 * i + 1]));
  return found;
}

py::object DeviceGradients::clip_by_value(const py::object& limit, bool to_nearest,
                                          std::uintptr_t stream, const py::object& make) {
  const ValueLimit bound{nonnegative_number(limit, "limit"), to_nearest};
  gradients_.require_real();
  gradients_.require_writable();
  gradients_.recheck(reader_, limit);
  DeviceCall call(*this, stream);
  const py::object memory = call.allocate();
  std::byte* const result = pointer_of(memory);
  py::object made = make(memory, 1, true, py::none());
  gradients_.mark_written();
  {
    const GilRelease release;
    call.list().clip_by_value(bound, result, call.stream());
  }
  call.end();
  return made;
}

void DeviceGradients::scale(const py::object& factor, std::uintptr_t stream) {
  const double number = finite_number(factor, "factor");
  gradients_.require_writable();
  gradients_.recheck(reader_, factor);
  if (number == 1.0) return;
  gradients_.mark_written();
  DeviceCall call(*this, stream);
  {
    const GilRelease release;
    call.list().scale(number, call.stream());
  }
  call.end();
}

}  // namespace gradclip::bindings
