#include "jax/handlers.hpp"

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/clip.hpp"
#include "cpu/engine.hpp"
#include "cpu/float_environment.hpp"
#include "cpu/pool.hpp"
#include "cpu/workers.hpp"
#include "xla/ffi/api/ffi.h"

namespace gradclip::jax {
namespace {

namespace ffi = xla::ffi;
using Words = ffi::BufferR2<ffi::U32>;
using Numbers = ffi::Span<const std::int64_t>;

class XlaPool final : public cpu::Pool {
 public:
  explicit XlaPool(ffi::ThreadPool& pool) : pool_(pool) {}
  int threads() const override { return static_cast<int>(pool_.num_threads()); }
  void schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }

 private:
  ffi::ThreadPool& pool_;
};

// XLA knows no exceptions.
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

NormOrder norm_order(double ord) {
  if (ord == 2.0) return {NormOrder::two, ord};
  if (ord == 1.0) return {NormOrder::one, ord};
  if (std::isinf(ord)) return {NormOrder::infinity, ord};
  return {NormOrder::other, ord};
}

DType dtype_of(ffi::DataType type) {
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

Span span_of(const ffi::AnyBuffer& buffer) {
  return {static_cast<std::byte*>(buffer.untyped_data()),
          static_cast<std::int64_t>(buffer.element_count()), nullptr,
          dtype_of(buffer.element_type())};
}

// --- Arrays of words --------------------------------------------------------------------------------

constexpr std::size_t kSumWords = 6, kFloatWords = 2;

void store(const NormSum& sum, std::uint32_t* words) {
  const std::int64_t exponent = sum.exponent;
  std::memcpy(words, &sum.value, 8);
  std::memcpy(words + 2, &exponent, 8);
  std::memcpy(words + 4, &sum.unit, 8);
}
NormSum load(const std::uint32_t* words) {
  NormSum sum;
  std::int64_t exponent = 0;
  std::memcpy(&sum.value, words, 8);
  std::memcpy(&exponent, words + 2, 8);
  std::memcpy(&sum.unit, words + 4, 8);
  sum.exponent = static_cast<int>(exponent);
  return sum;
}
Table<NormSum> load_sums(const std::uint32_t* words, std::size_t count) {
  Table<NormSum> sums;
  sums.reserve(count);
  for (std::size_t i = 0; i < count; ++i) sums.push_back(load(words + i * kSumWords));
  return sums;
}
void store(const Table<NormSum>& sums, std::uint32_t* words) {
  for (std::size_t i = 0; i < sums.size(); ++i) store(sums[i], words + i * kSumWords);
}

// Floats of any type that XLA may hold them in: words are those of a float64.
double load_float(const ffi::AnyBuffer& buffer, std::size_t i) {
  if (buffer.element_type() == ffi::F32) return double{buffer.typed_data<float>()[i]};
  if (buffer.element_type() == ffi::F64) return buffer.typed_data<double>()[i];
  double value = 0.0;
  std::memcpy(&value, buffer.typed_data<std::uint32_t>() + i * kFloatWords, 8);
  return value;
}
std::size_t floats_in(const ffi::AnyBuffer& buffer) {
  return buffer.element_count() / (buffer.element_type() == ffi::U32 ? kFloatWords : 1);
}
void store_float(const ffi::AnyBuffer& buffer, std::size_t i, double value) {
  if (buffer.element_type() == ffi::F32)
    buffer.typed_data<float>()[i] = static_cast<float>(value);
  else
    buffer.typed_data<double>()[i] = value;
}

// --- Parts of gradients that have a sum of their own ------------------------------------------------

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

cpu::ChunkPlan make_plan(const Table<Span>& spans) {
  Table<std::int64_t> bytes;
  bytes.reserve(spans.size());
  for (const Span& span : spans) bytes.push_back(span.nbytes());
  return cpu::make_plan(bytes);
}

// --- The handlers -----------------------------------------------------------------------------------

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

// (leaves ...) -> the sum of every part.
ffi::Error measure(ffi::ThreadPool threads, ffi::RemainingArgs leaves, ffi::Result<Words> words,
                   double ord, Numbers counts) {
  return run([&] {
    XlaPool pool(threads);
    const cpu::PoolScope scope(pool);
    const NormOrder order = norm_order(ord);
    const Table<Span> spans = spans_of(leaves);
    const Parts parts{counts};
    if (parts.are_whole()) {
      store(cpu::measure(spans, make_plan(spans), order), words->typed_data());
      return;
    }
    const RowTable rows = parts.rows(spans);
    store(cpu::measure_rows(rows, cpu::make_plan(rows), order), words->typed_data());
  });
}

// The sums of shards, of shape (..., shards, parts, 6) -> those of their parts together.
ffi::Error combine(ffi::AnyBuffer shards, ffi::Result<ffi::AnyBuffer> words, double ord) {
  return run([&] {
    const NormOrder order = norm_order(ord);
    const auto shape = shards.dimensions();
    const auto parts = static_cast<std::size_t>(shape[shape.size() - 2]);
    const auto ranks = static_cast<std::size_t>(shape[shape.size() - 3]);
    std::vector<std::size_t> part(ranks * parts);
    for (std::size_t i = 0; i < part.size(); ++i) part[i] = i % parts;
    const std::size_t words_each = parts * kSumWords;
    const std::size_t batches = words_each == 0 ? 0 : words->element_count() / words_each;
    for (std::size_t b = 0; b < batches; ++b) {
      const auto* const from = shards.typed_data<std::uint32_t>() + b * ranks * words_each;
      store(group_sums(order, load_sums(from, part.size()), part, parts),
            words->typed_data<std::uint32_t>() + b * words_each);
    }
  });
}

// A factor that is no coefficient: set every element to +0, also where it was not finite.
constexpr double kSetToZero = -0.0;
bool sets_to_zero(double factor) { return factor == 0.0 && std::signbit(factor); }

struct Decider {
  NormOrder order;
  Groups groups;
  Parts parts;
  std::vector<std::size_t> first;
  ClipOptions options;
  bool as_reported = false;  // thresholds were made of norms that had been rounded to float32

  struct Decided {
    Norms norms;
    ClipDecision decision;
    Table<double> factors;  // of every part
  };

  Decided decide(Table<NormSum>&& sums, std::span<const double> limits) const {
    Decided decided;
    if (groups.are_of_rows()) {
      const RowSums of_rows = sums_of_rows(order, std::move(sums), first, groups);
      decided.norms = norms_of(order, of_rows.tensors, groups, of_rows.groups, options.grad_scale);
    } else {
      Table<NormSum> tensors = std::move(sums);
      if (!parts.are_whole()) {
        const RowSums of_rows = sums_of_rows(order, std::move(tensors), first, {Groups::row});
        tensors = of_rows.tensors;
      }
      decided.norms = norms_of(order, tensors, groups, sums_of_groups(order, tensors, groups),
                               options.grad_scale);
    }
    Table<double> exact(limits.begin(), limits.end());
    if (as_reported) {
      exact.resize(decided.norms.groups.size(), limits.front());
      for (std::size_t g = 0; g < exact.size(); ++g) {
        const double norm = decided.norms.groups[g];
        if (static_cast<double>(static_cast<float>(norm)) == exact[g]) exact[g] = norm;
      }
    }
    decided.decision = decide_clip(decided.norms, groups, exact, options);
    const ClipDecision& decision = decided.decision;
    decided.factors.assign(first.back(), decision.action == Action::zero ? kSetToZero : 1.0);
    if (decision.action != Action::scale) return decided;
    for (std::size_t i = 0; i < parts.counts.size(); ++i) {
      for (std::size_t part = first[i]; part < first[i + 1]; ++part) {
        const std::size_t group = groups.kind == Groups::row      ? part
                                  : groups.kind == Groups::sample ? part - first[i]
                                                                  : groups.of(i);
        // + 0: a threshold of -0 is one of 0.
        decided.factors[part] = decision.coefficients[group] / options.grad_scale + 0.0;
      }
    }
    return decided;
  }
};

// Sums of shape (..., parts, 6), limits and scales -> the factor of every part, and what is reported. All have the same
// leading axes, of which each index is a decision of its own.
ffi::Error decide(ffi::AnyBuffer words, ffi::AnyBuffer limits, ffi::AnyBuffer grad_scale,
                  ffi::Result<ffi::AnyBuffer> factors, ffi::Result<ffi::AnyBuffer> total_norm,
                  ffi::Result<ffi::AnyBuffer> norms, ffi::Result<ffi::AnyBuffer> group_norms,
                  ffi::Result<ffi::AnyBuffer> coefficients, ffi::Result<ffi::AnyBuffer> clipped,
                  ffi::Result<ffi::AnyBuffer> nonfinite, double ord, Numbers counts, Numbers labels,
                  std::int64_t groups_kind, std::int64_t groups_used, std::int64_t nonfinite_policy,
                  bool rounds_down, bool are_coefficients, bool as_reported, bool all_float64) {
  return run([&] {
    const Parts parts{counts};
    Decider decider{norm_order(ord), {}, parts, parts.first(), {}, as_reported};
    decider.groups.kind = static_cast<Groups::Kind>(groups_kind);
    decider.groups.used = static_cast<std::size_t>(groups_used);
    if (decider.groups.kind == Groups::labels)
      decider.groups.label.assign(labels.begin(), labels.end());
    ClipOptions& options = decider.options;
    options.nonfinite = static_cast<NonFinite>(nonfinite_policy);
    options.are_coefficients = are_coefficients;
    if (rounds_down) options.norm_error = norm_error_bound(decider.order, all_float64);

    const std::size_t tensors = counts.size(), total_parts = decider.first.back();
    const std::size_t groups = decider.groups.count(tensors);
    const std::size_t batches = total_norm->element_count();
    const std::size_t limits_each = batches == 0 ? 0 : floats_in(limits) / batches;
    for (std::size_t b = 0; b < batches; ++b) {
      options.grad_scale = load_float(grad_scale, b);
      if (!is_finite(options.grad_scale) || options.grad_scale <= 0.0)
        throw std::invalid_argument("grad_scale: expected a positive finite number, got " +
                                    std::to_string(options.grad_scale));
      Table<double> limit;
      for (std::size_t g = 0; g < limits_each; ++g) {
        limit.push_back(load_float(limits, b * limits_each + g));
        if (!is_usable(options, limit.back()))
          throw std::invalid_argument("max_norm: expected numbers that are 0 or more, got " +
                                      std::to_string(limit.back()));
      }
      const auto* const sums = words.typed_data<std::uint32_t>() + b * total_parts * kSumWords;
      const Decider::Decided decided = decider.decide(load_sums(sums, total_parts), limit);
      std::memcpy(factors->typed_data<std::uint32_t>() + b * total_parts * kFloatWords,
                  decided.factors.data(), total_parts * sizeof(double));
      store_float(*total_norm, b, decided.norms.total);
      for (std::size_t i = 0; i < tensors; ++i) {
        store_float(*norms, b * tensors + i, decided.norms.tensors[i]);
        nonfinite->typed_data<bool>()[b * tensors + i] = false;
      }
      for (const std::size_t i : decided.norms.odd)
        nonfinite->typed_data<bool>()[b * tensors + i] = true;
      for (std::size_t g = 0; g < groups; ++g) {
        store_float(*group_norms, b * groups + g, decided.norms.groups[g]);
        store_float(*coefficients, b * groups + g, decided.decision.coefficients[g]);
      }
      clipped->typed_data<bool>()[b] = decided.decision.clipped;
    }
  });
}

// (factors, leaves ...) -> leaves, of which each part is multiplied by its factor; in place where XLA gives the same
// memory.
ffi::Error scale(ffi::ThreadPool threads, Words factor_words, ffi::RemainingArgs leaves,
                 ffi::RemainingRets scaled, Numbers counts, bool down) {
  return run([&] {
    XlaPool pool(threads);
    const cpu::PoolScope scope(pool);
    const Table<Span> from = spans_of(leaves);
    const Table<Span> spans = spans_of(scaled);
    const cpu::ChunkPlan plan = make_plan(spans);
    cpu::for_each_chunk(plan, cpu::Pass::forward, [&](const cpu::Chunk& chunk) {
      std::byte* const to = spans[chunk.tensor].data;
      const std::byte* const source = from[chunk.tensor].data;
      if (to != source)
        std::memcpy(to + chunk.first_byte, source + chunk.first_byte,
                    static_cast<std::size_t>(chunk.bytes));
    });

    const Parts parts{counts};
    const std::vector<std::size_t> first = parts.first();
    Table<double> factors(first.back());
    std::memcpy(factors.data(), factor_words.typed_data(), factors.size() * sizeof(double));
    Table<Span> zeros;
    bool any_changes = false;
    const RowTable rows = parts.are_whole() ? RowTable() : parts.rows(spans);
    for (std::size_t i = 0; i < spans.size(); ++i) {
      for (std::size_t part = first[i]; part < first[i + 1]; ++part) {
        if (sets_to_zero(factors[part])) {
          zeros.push_back(parts.are_whole()
                              ? spans[i]
                              : rows.gradients[i][static_cast<std::int64_t>(part - first[i])]);
          factors[part] = 1.0;
        }
        any_changes = any_changes || factors[part] != 1.0;
      }
    }
    if (!zeros.empty()) cpu::set_to_zero(zeros, make_plan(zeros));
    if (!any_changes) return;
    if (parts.are_whole())
      cpu::scale(spans, plan, factors, down);
    else
      cpu::scale_rows(rows, cpu::make_plan(rows), factors, 1.0, down);
  });
}

XLA_FFI_DEFINE_HANDLER(measure_handler, measure,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .RemainingArgs()
                           .Ret<Words>()
                           .Attr<double>("ord")
                           .Attr<Numbers>("parts"));
XLA_FFI_DEFINE_HANDLER(
    combine_handler, combine,
    ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Attr<double>("ord"));
XLA_FFI_DEFINE_HANDLER(decide_handler, decide,
                       ffi::Ffi::Bind()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Attr<double>("ord")
                           .Attr<Numbers>("parts")
                           .Attr<Numbers>("labels")
                           .Attr<std::int64_t>("groups")
                           .Attr<std::int64_t>("groups_used")
                           .Attr<std::int64_t>("nonfinite")
                           .Attr<bool>("down")
                           .Attr<bool>("are_coefficients")
                           .Attr<bool>("as_reported")
                           .Attr<bool>("all_float64"));
XLA_FFI_DEFINE_HANDLER(scale_handler, scale,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<Words>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attr<Numbers>("parts")
                           .Attr<bool>("down"));

}  // namespace

std::span<const Handler> handlers() {
  static const std::array<Handler, 4> all = {{
      {"gradclip_measure", reinterpret_cast<void*>(measure_handler)},
      {"gradclip_combine", reinterpret_cast<void*>(combine_handler)},
      {"gradclip_decide", reinterpret_cast<void*>(decide_handler)},
      {"gradclip_scale", reinterpret_cast<void*>(scale_handler)},
  }};
  return all;
}

}  // namespace gradclip::jax
