#include "jax/handlers.hpp"

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/engine.hpp"
#include "cpu/pool.hpp"
#include "cpu/workers.hpp"
#include "jax/arguments.hpp"

namespace gradclip::jax {
namespace {

class XlaPool final : public cpu::Pool {
 public:
  explicit XlaPool(ffi::ThreadPool& pool) : pool_(pool) {}
  int threads() const override { return static_cast<int>(pool_.num_threads()); }
  void schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }

 private:
  ffi::ThreadPool& pool_;
};

Table<NormSum> load_sums(const std::uint32_t* words, std::size_t count) {
  Table<NormSum> sums;
  sums.reserve(count);
  for (std::size_t i = 0; i < count; ++i) sums.push_back(load_sum(words + i * kSumWords));
  return sums;
}
void store_sums(const Table<NormSum>& sums, std::uint32_t* words) {
  for (std::size_t i = 0; i < sums.size(); ++i) store_sum(sums[i], words + i * kSumWords);
}

double load_float(const ffi::AnyBuffer& buffer, std::size_t i) {
  if (buffer.element_type() == ffi::F32) return double{buffer.typed_data<float>()[i]};
  if (buffer.element_type() == ffi::F64) return buffer.typed_data<double>()[i];
  double value = 0.0;
  std::memcpy(&value, buffer.typed_data<std::uint32_t>() + i * kFloatWords, 8);
  return value;
}
void store_float(const ffi::AnyBuffer& buffer, std::size_t i, double value) {
  if (buffer.element_type() == ffi::F32)
    buffer.typed_data<float>()[i] = static_cast<float>(value);
  else
    buffer.typed_data<double>()[i] = value;
}

cpu::ChunkPlan make_plan(const Table<Span>& spans) {
  Table<std::int64_t> bytes;
  bytes.reserve(spans.size());
  for (const Span& span : spans) bytes.push_back(span.nbytes());
  return cpu::make_plan(bytes);
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
      store_sums(cpu::measure(spans, make_plan(spans), order), words->typed_data());
      return;
    }
    const RowTable rows = parts.rows(spans);
    store_sums(cpu::measure_rows(rows, cpu::make_plan(rows), order), words->typed_data());
  });
}

// The sums of shards, of shape (..., shards, parts, 6) -> those of their parts together.
ffi::Error combine(ffi::AnyBuffer words, ffi::Result<ffi::AnyBuffer> combined, double ord) {
  return run([&] {
    const NormOrder order = norm_order(ord);
    const Shards shape(words);
    std::vector<std::size_t> part(shape.shards * shape.parts);
    for (std::size_t i = 0; i < part.size(); ++i) part[i] = i % shape.parts;
    const std::size_t words_each = shape.parts * kSumWords;
    for (std::size_t b = 0; b < shape.count; ++b) {
      const auto* const from = words.typed_data<std::uint32_t>() + b * shape.shards * words_each;
      store_sums(group_sums(order, load_sums(from, part.size()), part, shape.parts),
                 combined->typed_data<std::uint32_t>() + b * words_each);
    }
  });
}

// Sums of shape (..., parts, 6), limits and scales -> the factor of every part, and what is reported. All have the same
// leading axes, of which each index is a decision of its own.
ffi::Error decide(ffi::AnyBuffer words, ffi::AnyBuffer limits, ffi::AnyBuffer grad_scale,
                  ffi::Result<ffi::AnyBuffer> factors, ffi::Result<ffi::AnyBuffer> total_norm,
                  ffi::Result<ffi::AnyBuffer> norms, ffi::Result<ffi::AnyBuffer> group_norms,
                  ffi::Result<ffi::AnyBuffer> coefficients, ffi::Result<ffi::AnyBuffer> clipped,
                  ffi::Result<ffi::AnyBuffer> nonfinite, ffi::Dictionary attributes) {
  return run([&] {
    const Decider decider(attributes);
    const std::vector<std::size_t> first = decider.parts.first();
    ClipOptions options = decider.options;
    const std::size_t tensors = decider.parts.counts.size(), total_parts = first.back();
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
      const PartsDecision decided = decide_parts(decider.order, load_sums(sums, total_parts), first,
                                                 decider.groups, limit, options);
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
        store_float(*coefficients, b * groups + g, decided.clip.coefficients[g]);
      }
      clipped->typed_data<bool>()[b] = decided.clip.clipped;
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
                       measure_binding(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_DEFINE_HANDLER(combine_handler, combine, combine_binding(ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER(decide_handler, decide, decide_binding(ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER(scale_handler, scale,
                       scale_binding(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

}  // namespace

std::span<const Handler> handlers() {
  static const std::array all =
      named(measure_handler, combine_handler, decide_handler, scale_handler);
  return all;
}

}  // namespace gradclip::jax
