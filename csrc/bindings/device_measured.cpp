#include "bindings/device_measured.hpp"

#include "bindings/device_call.hpp"

namespace gradclip::bindings {
namespace {

// An array on the device of the gradients, which lives as long as this.
class DeviceArgument {
 public:
  DeviceArgument(py::object value, const EntryName& name, const DeviceGradients& grads,
                 cuda::Stream stream)
      : value_(std::move(value)), reader_(grads.device(), stream, grads.framework(), false) {
    reader_.read(value_.ptr(), name, entry_);
  }
  const Span& span() const { return entry_.span; }
  bool is_dense() const { return !entry_.layout; }
  const double* numbers() const { return reinterpret_cast<const double*>(entry_.span.data); }
  // Once the work that uses it is enqueued.
  void let_producers_wait(cuda::Stream stream) const { reader_.let_producers_wait(stream); }

 private:
  py::object value_;
  DeviceReader reader_;
  Entry entry_;
};

// What `reduce` returns for the sums of this process.
DeviceArgument reduced_sums(const py::object& reduce, const py::object& memory,
                            const cuda::ResultLayout& layout, const DeviceGradients& grads,
                            cuda::Stream stream) {
  const py::object reduced = reduce(memory.attr("float64")(layout.group_sums(), layout.groups));
  const EntryName name("reduce");
  DeviceArgument sums(reduced, name, grads, stream);
  if (sums.span().dtype != DType::float64 || !sums.is_dense() ||
      sums.span().numel != static_cast<std::int64_t>(layout.groups))
    name.problem(Problem::value_error,
                 "dense float64 sums of shape (" + std::to_string(layout.groups) + ",)",
                 std::string(name_of(sums.span().dtype)) + " of " +
                     std::to_string(sums.span().numel) + " elements")
        .raise();
  return sums;
}

// Thresholds or coefficients: as of limits_of_groups(), or an array on the device of the gradients, of one
// number or of one for each group.
class LimitsArgument {
 public:
  LimitsArgument(const py::object& value, const NamedGroups& named, const DeviceGradients& grads,
                 cuda::Stream stream, bool are_coefficients) {
    const std::size_t tensors = grads.gradients().spans().size();
    const DeviceReader reader(grads.device(), stream, grads.framework(), false);
    const EntryName name(are_coefficients ? "coefficients" : "max_norm");
    const bool is_on_device = reader.is_device_array(value);
    if (!is_plain(value) && !(is_on_device && reader.is_of_framework(value)) &&
        cuda::is_capturing(stream))
      name.problem(Problem::value_error,
                   "a number or an array on the stream that is captured into a CUDA graph",
                   full_type_name(value))
          .raise();
    if (!is_on_device) {
      const Table<double> numbers = limits_of_groups(value, named, tensors, are_coefficients);
      limits_.value = numbers.empty() ? 0.0 : numbers[0];
      if (numbers.size() < 2) return;
      const std::size_t bytes = numbers.size() * sizeof(double);
      memory_ = grads.allocate(bytes);
      limits_.device = pointer_of(memory_);
      limits_.per_group = true;
      cuda::copy_to_device(pointer_of(memory_), numbers.data(), bytes, stream);
      return;
    }
    const bool is_global = named.groups.kind == Groups::all;
    array_.emplace(value, name, grads, stream);
    const py::tuple shape(value.attr("shape"));
    limits_.per_group = shape.size() == 1 && !is_global;
    if (limits_.per_group ? shape[0].cast<std::size_t>() != named.groups.count(tensors)
                          : !shape.empty())
      name.problem(Problem::value_error,
                   is_global ? "a number or a 0-d array"
                             : "a number, a 0-d array or an array of shape (" +
                                   std::to_string(named.groups.count(tensors)) + ",)",
                   "an array of shape " + repr_text(shape))
          .raise();
    if (!array_->is_dense())
      name.problem(Problem::value_error, "a dense array", "a strided one").raise();
    if (is_complex(array_->span().dtype))
      name.problem(Problem::type_error, "a real number", name_of(array_->span().dtype)).raise();
    limits_.device = array_->span().data;
    limits_.dtype = array_->span().dtype;
  }
  const cuda::Limits& operator*() const { return limits_; }
  void let_producers_wait(cuda::Stream stream) const {
    if (array_) array_->let_producers_wait(stream);
  }

 private:
  cuda::Limits limits_;
  py::object memory_;
  std::optional<DeviceArgument> array_;
};

void refuse_to_wait(const DeviceCall& call, NonFinite nonfinite) {
  if (nonfinite == NonFinite::raise && call.is_capturing())
    throw py::value_error(
        "nonfinite: expected 'skip', 'zero' or 'propagate' while the stream is captured into a "
        "CUDA graph, got 'raise', which waits for the device");
}

// What is made of pairs, if there are any.
std::shared_ptr<const PairTable> table_of(const DevicePair* pair, const MeasureArguments& measure) {
  if (!pair) return nullptr;
  return std::make_shared<const PairTable>(
      pair->pair().table(measure.grad_scale, measure.groups.rows.get()));
}
bool always_changes(const DevicePair* pair) { return pair && !pair->pair().is_difference(); }
void require_writable(const DeviceGradients& grads, const DevicePair* pair) {
  pair ? pair->pair().require_writable() : grads.gradients().require_writable();
}
void require_unchanged(DeviceGradients& grads, DevicePair* pair) {
  grads.gradients().require_unchanged(grads.reader());
  if (pair) pair->pair().second().require_unchanged(pair->reader());
}

// The end of a clip whose work is enqueued: waits where it is to raise.
py::tuple finish(DeviceCall& call, const DeviceGradients& grads, const py::object& memory,
                 const py::object& made, const ClipOptions& options) {
  py::object counts = py::none();
  if (options.nonfinite == NonFinite::raise) {
    cuda::ResultFlags flags{};
    const std::byte* const place = pointer_of(memory) + call.list().layout().flags();
    {
      const GilRelease release;
      cuda::copy_to_host(&flags, place, sizeof(flags), call.stream());
    }
    if (flags.bad_limit)
      throw py::value_error(
          options.are_coefficients
              ? "coefficients: expected finite numbers, got an array on the device holding "
                "another; "
                "nothing was written"
              : "max_norm: expected a number that is not negative, got an array on the device "
                "holding a negative number or NaN; nothing was written");
    if (flags.nonfinite_norm) counts = grads.count_nonfinite(call.list(), call.stream());
  }
  call.end();
  return py::make_tuple(made, counts);
}

}  // namespace

DeviceMeasured DeviceMeasured::measure(std::shared_ptr<DeviceGradients> grads,
                                       std::shared_ptr<DevicePair> pair, const MeasureCall& call,
                                       std::uintptr_t stream) {
  const MeasureArguments arguments(grads->gradients(), call);
  call.recheck(grads->gradients(), grads->reader());
  if (pair) call.recheck(pair->pair().second(), pair->reader());
  return {std::move(grads), arguments, stream, std::move(pair)};
}

py::tuple DeviceMeasured::clip(DeviceGradients& grads, DevicePair* pair, const ClipCall& given,
                               std::uintptr_t stream, const py::object& make) {
  const cuda::DeviceGuard guard(grads.device());
  const Gradients& list = grads.gradients();
  const MeasureArguments measure(list, given.measure);
  const LimitsArgument limits(given.max_norm, measure.groups, grads, as_stream(stream), false);
  const bool is_alone = measure.reduce.is_none();
  cuda::Decision decision{
      *limits, clip_options(given.nonfinite, given.formula, measure.grad_scale, measure.order,
                            is_alone && (pair || list.has_only_float64()))};
  decision.options.always_changes = always_changes(pair);
  const NonFinite policy = decision.options.nonfinite;
  require_writable(grads, pair);
  given.recheck(list, grads.reader());
  if (pair) given.recheck(pair->pair().second(), pair->reader());

  const auto pairs = table_of(pair, measure);
  DeviceCall call(grads, stream, measure.groups, pair, pairs.get());
  refuse_to_wait(call, policy);
  const cuda::ResultLayout layout = call.list().layout();
  const py::object memory = call.allocate();
  std::byte* const result = pointer_of(memory);
  // Before anything is written, so that nothing can fail after.
  const py::object made =
      make(memory, layout.groups, measure.groups.groups.kind == Groups::all, measure.groups.names);
  if (is_alone) {
    list.mark_written();  // for all that is known here
    const GilRelease release;
    call.list().measure(measure.order, measure.grad_scale, result, call.stream(), &decision);
    call.list().change(decision.options, result, call.stream());
  } else {
    {
      const GilRelease release;
      call.list().measure(measure.order, measure.grad_scale, result, call.stream());
    }
    const DeviceArgument sums = reduced_sums(measure.reduce, memory, layout, grads, call.stream());
    require_unchanged(grads, pair);
    list.mark_written();
    {
      const GilRelease release;
      call.list().take_sums(measure.order, measure.grad_scale, sums.numbers(), result,
                            call.stream(), &decision);
      call.list().change(decision.options, result, call.stream());
    }
    sums.let_producers_wait(call.stream());
  }
  limits.let_producers_wait(call.stream());
  return finish(call, grads, memory, made, decision.options);
}

DeviceMeasured::DeviceMeasured(std::shared_ptr<DeviceGradients> grads,
                               const MeasureArguments& arguments, std::uintptr_t stream,
                               std::shared_ptr<DevicePair> pair)
    : grads_(std::move(grads)),
      pair_(std::move(pair)),
      pairs_(table_of(pair_.get(), arguments)),
      named_(arguments.groups),
      grad_scale_(arguments.grad_scale),
      order_(arguments.order),
      is_alone_(arguments.reduce.is_none()) {
  DeviceCall call(*grads_, stream, named_, pair_.get(), pairs_.get());
  groups_ = call.list().layout().groups;
  memory_ = call.allocate();
  std::byte* const result = pointer_of(memory_);
  {
    const GilRelease release;
    call.list().measure(arguments.order, grad_scale_, result, call.stream());
  }
  if (!arguments.reduce.is_none()) {
    const DeviceArgument sums =
        reduced_sums(arguments.reduce, memory_, call.list().layout(), *grads_, call.stream());
    {
      const GilRelease release;
      call.list().take_sums(arguments.order, grad_scale_, sums.numbers(), result, call.stream());
    }
    sums.let_producers_wait(call.stream());
  }
  call.end();
}

DeviceMeasured::DeviceMeasured(std::shared_ptr<DeviceGradients> grads, const py::object& norm,
                               std::uintptr_t stream)
    : grads_(std::move(grads)) {
  DeviceCall call(*grads_, stream);
  const EntryName name("norm");
  const DeviceArgument total(norm, name, *grads_, call.stream());
  if (total.span().dtype != DType::float64 || total.span().numel != 1)
    name.problem(Problem::value_error, "one float64 number",
                 std::to_string(total.span().numel) + " of " + name_of(total.span().dtype))
        .raise();
  const cuda::ResultLayout layout = call.list().layout();
  memory_ = call.allocate();
  for (const std::size_t place : {layout.total_norm(), layout.group_norms()})
    cuda::copy_on_device(pointer_of(memory_) + place, total.numbers(), sizeof(double),
                         call.stream());
  total.let_producers_wait(call.stream());
  call.end();
}

py::tuple DeviceMeasured::clip_measured(const py::object& max_norm, const py::object& nonfinite,
                                        const py::object& formula, std::uintptr_t stream,
                                        const py::object& make) {
  return apply(max_norm, false,
               clip_options(nonfinite, formula, grad_scale_, order_,
                            is_alone_ && (pair_ || grads_->gradients().has_only_float64())),
               stream, make);
}

py::tuple DeviceMeasured::scale_measured(const py::object& coefficients,
                                         const py::object& nonfinite, std::uintptr_t stream,
                                         const py::object& make) {
  return apply(coefficients, true,
               {.nonfinite = nonfinite_policy(nonfinite),
                .grad_scale = grad_scale_,
                .are_coefficients = true},
               stream, make);
}

py::tuple DeviceMeasured::apply(const py::object& limits_given, bool are_coefficients,
                                ClipOptions options, std::uintptr_t stream,
                                const py::object& make) {
  options.always_changes = always_changes(pair_.get());
  const cuda::DeviceGuard guard(grads_->device());
  const LimitsArgument limits(limits_given, named_, *grads_, as_stream(stream), are_coefficients);
  if (is_used_) refuse_second_use();
  const Gradients& list = grads_->gradients();
  require_writable(*grads_, pair_.get());
  require_unchanged(*grads_, pair_.get());

  DeviceCall call(*grads_, stream, named_, pair_.get(), pairs_.get());
  refuse_to_wait(call, options.nonfinite);
  if (call.is_capturing() && !memory_.is(call.allocate()))
    throw std::runtime_error(
        "measured: expected gradients that were measured while the stream is captured into a CUDA "
        "graph, as this call is, got ones that were measured before");
  const py::object made = make(memory_, groups_, is_global(), named_.names);
  list.mark_written();
  std::byte* const result = pointer_of(memory_);
  {
    const GilRelease release;
    call.list().decide({*limits, options}, result, call.stream());
    call.list().change(options, result, call.stream());
  }
  limits.let_producers_wait(call.stream());
  py::tuple finished = finish(call, *grads_, memory_, made, options);
  is_used_ = finished[1].is_none();
  return finished;
}

}  // namespace gradclip::bindings
