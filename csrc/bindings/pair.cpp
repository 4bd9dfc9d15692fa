#include "bindings/pair.hpp"

#include <algorithm>
#include <stdexcept>

#include "bindings/arguments.hpp"
#include "bindings/convert.hpp"
#include "bindings/text.hpp"

namespace gradclip::bindings {
namespace {

std::string shape_text(const Axes& axes) {
  py::tuple shape(axes.size());
  for (std::size_t a = 0; a < axes.size(); ++a) shape[a] = axes[a].size;
  return str_text(shape);
}

}  // namespace

// The second list in the order of the gradients: by their names, if they have any.
py::object Pair::in_order(const py::object& second) const {
  const bool by_name = is_mapping(second);
  if (by_name != !grads_->names().is_none())
    throw py::type_error(std::string(argument()) + ": expected a " +
                         (by_name ? "sequence" : "mapping of names") + ", as " +
                         grads_->argument() + " is, got " + Py_TYPE(second.ptr())->tp_name);
  if (!by_name) return second;
  return values_by_name(second, grads_->names(), argument(),
                        (std::string("entries of ") + grads_->argument()).c_str());
}

void Pair::check_entries() const {
  const std::size_t expected = grads_->spans().size();
  if (second_.spans().size() != expected)
    throw py::value_error(std::string(argument()) + ": expected " + std::to_string(expected) +
                          " arrays, one for each entry of " + grads_->argument() + ", got " +
                          std::to_string(second_.spans().size()));
  if (is_accumulation()) check_accumulators();
  for (std::size_t i = 0; i < expected; ++i) check_entry(i);
  if (terms_.l1 != 0.0) second_.require_real();
}

void Pair::check_entry(std::size_t i) const {
  const auto refuse = [&](Problem::Kind kind, const std::string& expected, const std::string& got) {
    second_.name_at(i)
        .problem(kind, expected + ", as " + grads_->name_at(i)() + " has", got)
        .raise();
  };
  if (grads_->is_missing(i) || second_.is_missing(i)) {
    if (second_.is_missing(i) && (grads_->is_missing(i) || is_accumulation())) return;
    second_.name_at(i)
        .problem(
            Problem::type_error,
            (grads_->is_missing(i) ? "None, as " : "an array, as ") + grads_->name_at(i)() + " is",
            grads_->is_missing(i) ? "an array" : "None")
        .raise();
  }
  const Axes x = grads_->array_of(i).axes, y = second_.array_of(i).axes;
  if (!std::ranges::equal(x, y, {}, &StridedLayout::Axis::size, &StridedLayout::Axis::size))
    refuse(Problem::value_error, "shape " + shape_text(x), shape_text(y));
  const DType here = grads_->spans()[i].dtype, there = second_.spans()[i].dtype;
  if (is_difference() ? here != there : is_complex(here) != is_complex(there))
    refuse(Problem::type_error,
           is_difference()    ? std::string("dtype ") + name_of(here)
           : is_complex(here) ? "a complex dtype"
                              : "a real dtype",
           name_of(there));
  if (is_accumulation() && size_of(here) < size_of(there))
    refuse(Problem::type_error, std::string("a dtype no wider than ") + name_of(here),
           name_of(there));
}

// Sums of many gradients are lost in 16 bits.
void Pair::check_accumulators() const {
  for (std::size_t i = 0; i < grads_->spans().size(); ++i) {
    const DType dtype = grads_->spans()[i].dtype;
    if (!grads_->is_missing(i) && size_of(real_of(dtype)) < sizeof(float))
      grads_->name_at(i)
          .problem(Problem::type_error,
                   "an accumulator of dtype float32, float64, complex64 or complex128",
                   name_of(dtype))
          .raise();
  }
}

Pair::Terms Pair::Terms::of_params(const py::object& l2, const py::object& l1) {
  const auto number = [](const py::object& value, const char* name) {
    const double factor = finite_number(value, name);
    if (factor < 0.0)
      throw py::value_error(std::string(name) + ": expected a number that is not negative, got " +
                            repr_text(value));
    return factor;
  };
  const double l2_number = number(l2, "l2");
  return {.l2 = l2_number, .l1 = number(l1, "l1")};
}

Pair::Terms Pair::Terms::of_scale(const py::object& scale) {
  return {.kind = accumulation, .scale = finite_number(scale, "scale")};
}

namespace {

// So that the bytes of what is made of them can be counted.
constexpr std::int64_t kMostElements = std::int64_t{1} << 58;

}  // namespace

PairFormula Pair::formula(double grad_scale) const {
  if (is_difference()) return PairFormula::difference();
  if (is_accumulation()) return {terms_.scale};
  return {terms_.l2 * grad_scale, terms_.l1 * grad_scale, false, terms_.l2, terms_.l1};
}

PairTable Pair::table(double grad_scale, const RowTable* rows) const {
  PairTable table;
  const PairFormula formula = table.formula = decide([&] { return this->formula(grad_scale); });
  if (!is_finite(formula.factor) || !is_finite(formula.sign_factor))
    throw py::value_error(
        "grad_scale: expected one whose products with l2 and l1 are finite, got a larger one");
  for (std::size_t i = 0; i < grads_->spans().size(); ++i) {
    const Span &x_span = grads_->spans()[i], &y_span = second_.spans()[i];
    PairRows pair{{nullptr, 1, 0, 0, nullptr, x_span.dtype},
                  {nullptr, 1, 0, 0, nullptr, y_span.dtype},
                  formula,
                  wide_type(x_span.dtype)};
    if (grads_->is_missing(i)) {
      pair.x.count = rows ? 0 : 1;
      table.add(pair);
      continue;
    }
    check_entry(i);
    if (second_.is_missing(i)) {
      table.add(pair);
      continue;
    }
    StridedArray x = grads_->array_of(i), y = second_.array_of(i);
    if (rows) {
      const bool has_rows =
          lead_with_rows(x.axes, rows->kind) && lead_with_rows(y.axes, rows->kind);
      if (!has_rows || x.axes[0].size != rows->gradients[i].count)
        grads_->name_at(i)
            .problem(Problem::value_error,
                     std::to_string(rows->gradients[i].count) + " rows, as when groups were made",
                     "an array of shape " + shape_text(x.axes))
            .raise();
      pair.x.count = x.axes[0].size;
      pair.x.stride = x.axes[0].stride;
      pair.y.stride = y.axes[0].stride;
      x.axes.erase(x.axes.begin());
      y.axes.erase(y.axes.begin());
    }
    if (x_span.numel > kMostElements)
      throw std::length_error("grads: expected gradients of at most 2^58 elements, got more");
    if (x_span.numel > 0) {
      pair.x.numel = pair.y.numel = x_span.numel / pair.x.count;
      auto [ordered_x, ordered_y] = order_pair(x, y);
      const auto place = [&](RowSpan& to, OrderedAxes& ordered) {
        to.first = ordered.data;
        if (ordered.layout) to.layout = &table.layouts.emplace_back(std::move(*ordered.layout));
      };
      place(pair.x, ordered_x);
      place(pair.y, ordered_y);
    }
    table.add(pair);
  }
  return table;
}

void Pair::require_writable() const {
  grads_->require_writable();
  std::vector<Span> all(grads_->spans().begin(), grads_->spans().end());
  all.insert(all.end(), second_.spans().begin(), second_.spans().end());
  const std::size_t count = grads_->spans().size();
  const auto shared = find_shared_memory(all, count);
  if (!shared) return;
  grads_->name_at(shared->first)
      .problem(Problem::value_error, "memory of its own",
               "memory shared with " + second_.name_at(shared->second - count)())
      .raise();
}

}  // namespace gradclip::bindings
