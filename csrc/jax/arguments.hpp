// What XLA passes to the handlers of both engines, and what it means.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/clip.hpp"
#include "core/rows.hpp"
#include "core/span.hpp"
#include "core/sum_words.hpp"
#include "cpu/float_environment.hpp"
#include "jax/handlers.hpp"
#include "xla/ffi/api/ffi.h"

namespace gradclip::jax {

namespace ffi = xla::ffi;
using Words = ffi::BufferR2<ffi::U32>;
using Numbers = ffi::Span<const std::int64_t>;

// XLA knows no exceptions, and its threads round subnormal numbers to 0.
template <class Work>
ffi::Error run(Work work) {
  try {
    const cpu::DefaultFloatEnvironment environment;
    work();
    return ffi::Error::Success();
  } catch (const std::invalid_argument& error) {
    return ffi::Error::InvalidArgument(error.what());
  } catch (const std::exception& error) {
    return ffi::Error::Internal(error.what());
  }
}

inline NormOrder norm_order(double ord) {
  if (ord == 2.0) return {NormOrder::two, ord};
  if (ord == 1.0) return {NormOrder::one, ord};
  if (std::isinf(ord)) return {NormOrder::infinity, ord};
  return {NormOrder::other, ord};
}

inline DType dtype_of(ffi::DataType type) {
  switch (type) {
    case ffi::F16: return DType::float16;
    case ffi::BF16: return DType::bfloat16;
    case ffi::F32: return DType::float32;
    case ffi::F64: return DType::float64;
    case ffi::C64: return DType::complex64;
    case ffi::C128: return DType::complex128;
    default: throw std::logic_error("grads: expected real or complex floats");
  }
}

inline Span span_of(const ffi::AnyBuffer& buffer) {
  return {static_cast<std::byte*>(buffer.untyped_data()),
          static_cast<std::int64_t>(buffer.element_count()), nullptr,
          dtype_of(buffer.element_type())};
}
template <class Buffers>
Table<Span> spans_of(const Buffers& buffers) {
  Table<Span> spans;
  spans.reserve(buffers.size());
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    if constexpr (std::is_same_v<Buffers, ffi::RemainingRets>)
      spans.push_back(span_of(**buffers.template get<ffi::AnyBuffer>(i)));
    else
      spans.push_back(span_of(*buffers.template get<ffi::AnyBuffer>(i)));
  }
  return spans;
}

// Floats may be float32, float64 or the words of float64s.
inline constexpr std::size_t kFloatWords = 2;
inline std::size_t floats_in(const ffi::AnyBuffer& buffer) {
  return buffer.element_count() / (buffer.element_type() == ffi::U32 ? kFloatWords : 1);
}

// Of each gradient: 1, itself; n, so many rows, which are its leading axes; -n, so many columns, its trailing ones.
struct Parts {
  Numbers counts;

  bool are_whole() const {
    for (const std::int64_t count : counts)
      if (count != 1) return false;
    return true;
  }
  std::size_t of(std::size_t i) const { return static_cast<std::size_t>(std::abs(counts[i])); }
  std::vector<std::size_t> first() const {
    std::vector<std::size_t> first = {0};
    for (std::size_t i = 0; i < counts.size(); ++i) first.push_back(first.back() + of(i));
    return first;
  }
  RowTable rows(const Table<Span>& spans) const {
    RowTable table;
    for (std::size_t i = 0; i < spans.size(); ++i) {
      const Span& span = spans[i];
      const auto count = static_cast<std::int64_t>(of(i));
      const std::int64_t numel = count == 0 ? 0 : span.numel / count, itemsize = span.itemsize();
      if (counts[i] >= 0 || numel <= 1) {
        table.add({span.data, count, numel * itemsize, numel, nullptr, span.dtype});
      } else {
        StridedLayout column;
        if (count > 1) column.axes = {{numel, count * itemsize}};
        table.layouts.push_back(std::move(column));
        const StridedLayout* const layout = count > 1 ? &table.layouts.back() : nullptr;
        table.add({span.data, count, itemsize, numel, layout, span.dtype});
      }
    }
    return table;
  }
};

// Sums of shape (..., shards, parts, 6).
struct Shards {
  std::size_t count = 0, shards, parts;  // `count`: of the leading axes

  explicit Shards(const ffi::AnyBuffer& words) {
    const auto shape = words.dimensions();
    parts = static_cast<std::size_t>(shape[shape.size() - 2]);
    shards = static_cast<std::size_t>(shape[shape.size() - 3]);
    if (words.element_count() != 0) count = words.element_count() / (shards * parts * kSumWords);
  }
};

// The attributes of decisions, which are all alike but for sums, limits and scales.
struct Decider {
  NormOrder order;
  Groups groups;
  Parts parts;
  ClipOptions options;

  explicit Decider(const ffi::Dictionary& attributes) {
    const auto number = [&](std::string_view name) {
      return attributes.get<std::int64_t>(name).value();
    };
    const auto flag = [&](std::string_view name) { return attributes.get<bool>(name).value(); };
    order = norm_order(attributes.get<double>("ord").value());
    parts.counts = attributes.get<Numbers>("parts").value();
    groups.kind = static_cast<Groups::Kind>(number("groups"));
    groups.used = static_cast<std::size_t>(number("groups_used"));
    if (groups.kind == Groups::labels) {
      const Numbers labels = attributes.get<Numbers>("labels").value();
      groups.label.assign(labels.begin(), labels.end());
    }
    options.nonfinite = static_cast<NonFinite>(number("nonfinite"));
    options.are_coefficients = flag("are_coefficients");
    options.as_reported = flag("as_reported");
    if (flag("down")) options.norm_error = norm_error_bound(order, flag("all_float64"));
  }
};

// The handlers of an engine, by the names that both have.
inline std::array<Handler, 4> named(XLA_FFI_Handler* measure, XLA_FFI_Handler* combine,
                                    XLA_FFI_Handler* decide, XLA_FFI_Handler* scale) {
  return {{{"gradclip_measure", reinterpret_cast<void*>(measure)},
           {"gradclip_combine", reinterpret_cast<void*>(combine)},
           {"gradclip_decide", reinterpret_cast<void*>(decide)},
           {"gradclip_scale", reinterpret_cast<void*>(scale)}}};
}

// --- What the handlers of both engines take, behind what each has of its own ----------------------------

template <class Binding>
auto measure_binding(Binding binding) {
  return std::move(binding)
      .RemainingArgs()
      .template Ret<Words>()
      .template Attr<double>("ord")
      .template Attr<Numbers>("parts");
}
template <class Binding>
auto combine_binding(Binding binding) {
  return std::move(binding)
      .template Arg<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>()
      .template Attr<double>("ord");
}
// (sums, limits, grad_scale) -> factors, total_norm, norms, group_norms, coefficients, clipped, nonfinite.
template <class Binding>
auto decide_binding(Binding binding) {
  return std::move(binding)
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>()
      .Attrs();
}
template <class Binding>
auto scale_binding(Binding binding) {
  return std::move(binding)
      .template Arg<Words>()
      .RemainingArgs()
      .RemainingRets()
      .template Attr<Numbers>("parts")
      .template Attr<bool>("down");
}

}  // namespace gradclip::jax
