#include "bindings/device_gradients.hpp"

#include <algorithm>

#include "bindings/arguments.hpp"
#include "bindings/gil.hpp"
#include "bindings/on_device.hpp"

namespace gradclip::bindings {
namespace {

cuda::Stream as_stream(std::uintptr_t number) { return reinterpret_cast<cuda::Stream>(number); }

std::byte* pointer_of(const py::object& memory) {
  return reinterpret_cast<std::byte*>(memory.attr("ptr").cast<std::uintptr_t>());
}

bool same(const Groups& a, const Groups& b) { return a.kind == b.kind && a.label == b.label; }

// A number, or an array on the device of the gradients: of one number, or of one for each group.
class ThresholdArgument {
 public:
  ThresholdArgument(const py::object& value, const Groups& groups, std::size_t tensors, int device,
                    cuda::Stream stream, DeviceReader::Leader leader)
      : reader_(device, stream, leader, false) {
    if (!reader_.is_device_array(value)) {
      threshold_.value = nonnegative_number(value, "max_norm");
      return;
    }
    const EntryName name("max_norm");
    if (!reader_.is_leaders(value) && cuda::is_capturing(stream))
      name.problem(Problem::value_error,
                   "a number or an array on the stream that is captured into a CUDA graph",
                   full_type_name(value))
          .raise();
    reader_.read(value.ptr(), name, entry_);
    const py::tuple shape(value.attr("shape"));
    threshold_.per_group = shape.size() == 1 && groups.kind != Groups::all;
    if (threshold_.per_group ? shape[0].cast<std::size_t>() != groups.count(tensors)
                             : shape.size() != 0)
      name.problem(Problem::value_error,
                   groups.kind == Groups::all ? "a number or a 0-d array"
                                              : "a number, a 0-d array or an array of shape (" +
                                                    std::to_string(groups.count(tensors)) + ",)",
                   "an array of shape " + repr_text(shape))
          .raise();
    if (entry_.layout) name.problem(Problem::value_error, "a dense array", "a strided one").raise();
    if (is_complex(entry_.span.dtype))
      name.problem(Problem::type_error, "a real number", name_of(entry_.span.dtype)).raise();
    threshold_.device = entry_.span.data;
    threshold_.dtype = entry_.span.dtype;
  }
  const cuda::Threshold& operator*() const { return threshold_; }
  const DeviceReader& reader() const { return reader_; }

 private:
  DeviceReader reader_;
  Entry entry_;
  cuda::Threshold threshold_;
};

}  // namespace

// One call: the device is the current one, the stream is ordered with the producers' before and after,
// and the list is ready.
class DeviceGradients::Call {
 public:
  Call(DeviceGradients& all, std::uintptr_t stream, const Groups& groups = {})
      : all_(all), stream_(as_stream(stream)), on_device_(all.device_) {
    is_capturing_ = cuda::is_capturing(stream_);
    if (!all.is_kept_) {
      const GilRelease release;
      own_.emplace(all.gradients_.spans(), groups, all.device_, stream_);
    } else {
      if (is_capturing_ && all.reader_.has_producers_beside(stream_))
        throw std::runtime_error(
            "grads: expected a Plan of arrays that are all on the stream which is captured into a "
            "CUDA graph, got some whose producers have streams of their own");
      kept_ = &all.kept(groups, is_capturing_);
      all.reader_.wait_for_producers(stream_);
    }
  }
  // Where an exception ends it, too: what was enqueued will run.
  ~Call() {
    if (is_over_) return;
    try {
      end();
    } catch (const std::exception&) {
      // The exception that is under way says more.
    }
  }
  void end() {
    is_over_ = true;
    own_.reset();
    all_.reader_.let_producers_wait(stream_);
  }

  cuda::List& list() { return kept_ ? kept_->list : *own_; }
  cuda::Stream stream() const { return stream_; }
  bool is_capturing() const { return is_capturing_; }
  py::object allocate() {
    return is_capturing_ ? kept_->memory : all_.allocate_for(list().layout());
  }

 private:
  DeviceGradients& all_;
  cuda::Stream stream_;
  OnDevice on_device_;
  bool is_capturing_ = false, is_over_ = false;
  std::optional<cuda::List> own_;
  Kept* kept_ = nullptr;
};

DeviceGradients::DeviceGradients(const py::object& grads, int device, std::uintptr_t stream,
                                 const std::string& leader, py::object allocate, bool is_kept)
    : device_(device),
      leader_(DeviceReader::leader_named(leader)),
      allocate_(std::move(allocate)),
      reader_(device, as_stream(stream), leader_, is_kept),
      gradients_([&] {
        const OnDevice on_device(device);
        if (cuda::is_capturing(as_stream(stream)))
          throw std::runtime_error(
              "grads: expected a Plan made before the stream was captured into a CUDA graph, got "
              "arrays that have to be read and placed first");
        return Gradients(grads, reader_);
      }()),
      is_kept_(is_kept) {
  gradients_.find_overlaps();
  if (!is_kept) return;
  const OnDevice on_device(device);
  kept({}, false);
}

DeviceGradients::~DeviceGradients() {
  if (kept_.empty()) return;
  const GilRelease release;
  for (Kept& kept : kept_) const cuda::List freed(std::move(kept.list));  // which may wait
}

DeviceGradients::Kept& DeviceGradients::kept(const Groups& groups, bool is_capturing) {
  {
    const std::scoped_lock lock(kept_mutex_);
    const auto found = std::ranges::find_if(
        kept_, [&](const Kept& candidate) { return same(candidate.groups, groups); });
    if (found != kept_.end()) return *found;
  }
  if (is_capturing)
    throw std::runtime_error(
        "groups: expected a grouping that the plan has seen before the stream is captured into a "
        "CUDA graph (call it once), got a new one");
  cuda::List list = [&] {
    const GilRelease release;
    return cuda::List(gradients_.spans(), groups, device_);
  }();
  py::object memory = allocate_for(list.layout());
  const std::scoped_lock lock(kept_mutex_);
  kept_.push_back({groups, std::move(list), std::move(memory)});  // perhaps by two threads: no harm
  return kept_.back();
}

py::object DeviceGradients::allocate_for(const cuda::ResultLayout& layout) const {
  return allocate_(layout.bytes());
}

py::object DeviceGradients::norms(const py::object& ord, std::uintptr_t stream) {
  cuda::Request request;
  request.order = norm_order(ord);
  gradients_.recheck(reader_, ord);
  Call call(*this, stream);
  const py::object memory = call.allocate();
  std::byte* const result = pointer_of(memory);
  {
    const GilRelease release;
    call.list().measure(request, result, call.stream());
  }
  call.end();
  return memory;
}

py::tuple DeviceGradients::clip(const py::object& max_norm, const py::object& ord,
                                const py::object& groups, const py::object& grad_scale,
                                const py::object& nonfinite, const py::object& reduce,
                                std::uintptr_t stream, double epsilon, const py::object& make) {
  const OnDevice on_device(device_);
  const std::size_t tensors = gradients_.spans().size();
  const NamedGroups named = group_labels(groups, gradients_);
  const Groups& grouping = named.groups;
  const ThresholdArgument threshold(max_norm, grouping, tensors, device_, as_stream(stream),
                                    leader_);
  cuda::Request request;
  request.max_norm = *threshold;
  request.epsilon = epsilon;
  request.order = norm_order(ord);
  request.grad_scale = grad_scale_number(grad_scale);
  request.policy = nonfinite_policy(nonfinite);
  check_reduce(reduce, request.order);
  gradients_.require_writable();
  gradients_.recheck(reader_, max_norm, ord, groups, grad_scale, nonfinite);

  Call call(*this, stream, grouping);
  const bool waits = request.policy == NonFinite::raise;
  if (waits && call.is_capturing())
    throw py::value_error(
        "nonfinite: expected 'skip', 'zero' or 'propagate' while the stream is captured into a "
        "CUDA "
        "graph, got 'raise', which waits for the device");
  const cuda::ResultLayout layout = call.list().layout();
  const py::object memory = call.allocate();
  std::byte* const result = pointer_of(memory);
  // Before anything is written, so that nothing can fail after.
  const py::tuple made = py::make_tuple(
      make(memory, layout.groups, grouping.kind == Groups::all, named.names), py::none());
  if (reduce.is_none()) {
    gradients_.mark_written();  // for all that is known here
    const GilRelease release;
    request.until = cuda::Request::clip;
    call.list().measure(request, result, call.stream());
    call.list().change(request.grad_scale, result, call.stream());
  } else {
    request.until = cuda::Request::sums;
    {
      const GilRelease release;
      call.list().measure(request, result, call.stream());
    }
    const py::object reduced = reduce(memory.attr("float64")(layout.group_sums(), layout.groups));
    DeviceReader reader(device_, call.stream(), leader_, false);
    const EntryName name("reduce");
    Entry sums;
    reader.read(reduced.ptr(), name, sums);
    if (sums.span.dtype != DType::float64 || sums.layout ||
        sums.span.numel != static_cast<std::int64_t>(layout.groups))
      name.problem(Problem::value_error,
                   "dense float64 sums of shape (" + std::to_string(layout.groups) + ",)",
                   std::string(name_of(sums.span.dtype)) + " of " +
                       std::to_string(sums.span.numel) + " elements")
          .raise();
    gradients_.require_unchanged(reader_);
    gradients_.mark_written();
    {
      const GilRelease release;
      call.list().decide(request, reinterpret_cast<const double*>(sums.span.data), result,
                         call.stream());
      call.list().change(request.grad_scale, result, call.stream());
    }
    reader.let_producers_wait(call.stream());
  }
  threshold.reader().let_producers_wait(call.stream());

  if (waits) {
    cuda::ResultFlags flags{};
    {
      const GilRelease release;
      cuda::copy_to_host(&flags, result + layout.flags(), sizeof(flags), call.stream());
    }
    if (flags.bad_threshold)
      throw py::value_error(
          "max_norm: expected a number that is not negative, got an array on the device that "
          "holds another one; nothing was written");
    if (flags.nonfinite_norm) {
      py::list counts = count_nonfinite(call.list(), call.stream());
      PyTuple_SetItem(made.ptr(), 1, counts.release().ptr());
    }
  }
  call.end();
  return made;
}

// (index, NaN count, infinity count) of the tensors that hold such elements. Waits.
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

void DeviceGradients::clip_with_norm(const py::object& norm, const py::object& max_norm,
                                     std::uintptr_t stream, double epsilon) {
  const OnDevice on_device(device_);
  const ThresholdArgument threshold(max_norm, {}, gradients_.spans().size(), device_,
                                    as_stream(stream), leader_);
  gradients_.require_writable();
  gradients_.recheck(reader_, max_norm);
  Call call(*this, stream);
  DeviceReader reader(device_, call.stream(), leader_, false);
  const EntryName name("norm");
  Entry total;
  reader.read(norm.ptr(), name, total);
  if (total.span.dtype != DType::float64 || total.span.numel != 1)
    name.problem(Problem::value_error, "one float64 number",
                 std::to_string(total.span.numel) + " of " + name_of(total.span.dtype))
        .raise();
  gradients_.mark_written();
  // The 1-norm is its own sum: what has been measured goes the way of sums that were reduced.
  cuda::Request request{{NormOrder::one, 1.0}, 1.0,    *threshold, NonFinite::propagate,
                        cuda::Request::clip,   epsilon};
  const py::object memory = call.allocate();
  std::byte* const result = pointer_of(memory);
  {
    const GilRelease release;
    call.list().decide(request, reinterpret_cast<const double*>(total.span.data), result,
                       call.stream());
    call.list().change(1.0, result, call.stream());
  }
  reader.let_producers_wait(call.stream());
  threshold.reader().let_producers_wait(call.stream());
  call.end();
}

py::object DeviceGradients::clip_by_value(const py::object& limit, bool to_nearest,
                                          std::uintptr_t stream, const py::object& make) {
  const ValueLimit bound{nonnegative_number(limit, "limit"), to_nearest};
  gradients_.require_real();
  gradients_.require_writable();
  gradients_.recheck(reader_, limit);
  Call call(*this, stream);
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
  Call call(*this, stream);
  {
    const GilRelease release;
    call.list().scale(number, call.stream());
  }
  call.end();
}

namespace {

void require_probeable(const Gradients& grads) {
  for (const Span& span : grads.spans())
    if (span.layout || reinterpret_cast<std::uintptr_t>(span.data) % 16 != 0)
      throw py::value_error("grads: expected dense arrays at multiples of 16 bytes for a probe");
}

}  // namespace

void DeviceGradients::probe_read(std::uintptr_t stream) {
  require_probeable(gradients_);
  gradients_.recheck(reader_);
  Call call(*this, stream);
  call.list().probe_read(pointer_of(call.allocate()), call.stream());
  call.end();
}

void DeviceGradients::probe_read_write(std::uintptr_t stream) {
  require_probeable(gradients_);
  gradients_.require_writable();
  gradients_.recheck(reader_);
  Call call(*this, stream);
  call.list().probe_read_write(call.stream());
  call.end();
}

}  // namespace gradclip::bindings
