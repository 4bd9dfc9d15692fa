// The handlers for NVIDIA's GPUs; handlers.cpp has those for CPUs. All is enqueued on XLA's stream and nothing waits for
// the device, so that limits and scales which cannot be used are no errors here, but make NaN.
//
// They are not marked as kCmdBufferCompatible: an engine's work memory is kept from call to call by events, which cannot
// be asked for while a stream is captured, and tables are copied from pinned memory that a later call writes anew.
#include <array>
#include <optional>

#include "cuda/engine.hpp"
#include "jax/arguments.hpp"
#include "jax/handlers.hpp"

namespace gradclip::jax {

// Where a call runs.
struct Place {
  int device;
  cuda::Stream stream;
};

}  // namespace gradclip::jax

template <>
struct xla::ffi::CtxDecoding<gradclip::jax::Place> {
  using Type = gradclip::jax::Place;

  static std::optional<Type> Decode([[maybe_unused]] const XLA_FFI_Api* api,
                                    [[maybe_unused]] XLA_FFI_ExecutionContext* context,
                                    [[maybe_unused]] DiagnosticEngine& diagnostic) {
#if defined(GRADCLIP_EMULATED)
    return Type{0, nullptr};  // called by XLA for CPUs, which has no streams
#else
    const auto device = CtxDecoding<DeviceOrdinal>::Decode(api, context, diagnostic);
    const auto stream =
        CtxDecoding<PlatformStream<gradclip::cuda::Stream> >::Decode(api, context, diagnostic);
    if (!device || !stream) return std::nullopt;
    return Type{*device, *stream};
#endif
  }
};

namespace gradclip::jax {
namespace {

template <class Work>
ffi::Error run_on(const Place& place, Work work) {
  return run([&] {
    const cuda::DeviceGuard guard(place.device);
    work();
  });
}

// Of spans that are whole or have rows, ready for kernels.
cuda::List list_of(const Table<Span>& spans, const Parts& parts, const Groups& groups,
                   const Place& place) {
  if (parts.are_whole()) return {spans, groups, nullptr, place.device, place.stream};
  const RowTable rows = parts.rows(spans);
  return {spans, groups, &rows, place.device, place.stream};
}

cuda::Floats floats_of(const ffi::AnyBuffer& buffer) {
  return {buffer.untyped_data(), buffer.element_type() == ffi::F32};
}

// (leaves ...) -> the sum of every part.
ffi::Error measure(Place place, ffi::RemainingArgs leaves, ffi::Result<Words> words, double ord,
                   Numbers counts) {
  return run_on(place, [&] {
    list_of(spans_of(leaves), {counts}, {}, place)
        .measure_sums(norm_order(ord), words->typed_data(), place.stream);
  });
}

// The sums of shards, of shape (..., shards, parts, 6) -> those of their parts together.
ffi::Error combine(Place place, ffi::AnyBuffer words, ffi::Result<ffi::AnyBuffer> combined,
                   double ord) {
  return run_on(place, [&] {
    const Shards shape(words);
    cuda::combine_sums(norm_order(ord), words.typed_data<std::uint32_t>(), shape.count,
                       shape.shards, shape.parts, combined->typed_data<std::uint32_t>(),
                       place.stream);
  });
}

// Sums of shape (..., parts, 6), limits and scales -> the factor of every part, and what is reported. All have the same
// leading axes, of which each index is a decision of its own.
ffi::Error decide(Place place, ffi::AnyBuffer words, ffi::AnyBuffer limits,
                  ffi::AnyBuffer grad_scale, ffi::Result<ffi::AnyBuffer> factors,
                  ffi::Result<ffi::AnyBuffer> total_norm, ffi::Result<ffi::AnyBuffer> norms,
                  ffi::Result<ffi::AnyBuffer> group_norms, ffi::Result<ffi::AnyBuffer> coefficients,
                  ffi::Result<ffi::AnyBuffer> clipped, ffi::Result<ffi::AnyBuffer> nonfinite,
                  ffi::Dictionary attributes) {
  return run_on(place, [&] {
    const Decider decider(attributes);
    const std::size_t count = total_norm->element_count();
    const cuda::SumDecisions decisions{count,
                                       decider.order,
                                       decider.options,
                                       words.typed_data<std::uint32_t>(),
                                       floats_of(limits),
                                       floats_in(limits) != count,
                                       floats_of(grad_scale),
                                       static_cast<double*>(factors->untyped_data()),
                                       floats_of(*total_norm),
                                       floats_of(*norms),
                                       floats_of(*group_norms),
                                       floats_of(*coefficients),
                                       clipped->typed_data<bool>(),
                                       nonfinite->typed_data<bool>()};
    // Whose memory is somewhere else.
    const Table<Span> spans(decider.parts.counts.size());
    list_of(spans, decider.parts, decider.groups, place).decide_sums(decisions, place.stream);
  });
}

// (factors, leaves ...) -> leaves, of which each part is multiplied by its factor; in place where XLA gives the same
// memory, as it has been asked to.
ffi::Error scale(Place place, Words factors, ffi::RemainingArgs leaves, ffi::RemainingRets scaled,
                 Numbers counts, bool down) {
  return run_on(place, [&] {
    const Table<Span> from = spans_of(leaves), to = spans_of(scaled);
    for (std::size_t i = 0; i < to.size(); ++i)
      if (to[i].data != from[i].data)
        cuda::copy_on_device(to[i].data, from[i].data, static_cast<std::size_t>(to[i].nbytes()),
                             place.stream);
    list_of(to, {counts}, {}, place)
        .scale_by(static_cast<const double*>(factors.untyped_data()), down, place.stream);
  });
}

XLA_FFI_DEFINE_HANDLER(measure_handler, measure, measure_binding(ffi::Ffi::Bind().Ctx<Place>()));
XLA_FFI_DEFINE_HANDLER(combine_handler, combine, combine_binding(ffi::Ffi::Bind().Ctx<Place>()));
XLA_FFI_DEFINE_HANDLER(decide_handler, decide, decide_binding(ffi::Ffi::Bind().Ctx<Place>()));
XLA_FFI_DEFINE_HANDLER(scale_handler, scale, scale_binding(ffi::Ffi::Bind().Ctx<Place>()));

}  // namespace

std::span<const Handler> cuda_handlers() {
  static const std::array all =
      named(measure_handler, combine_handler, decide_handler, scale_handler);
  return all;
}

}  // namespace gradclip::jax
