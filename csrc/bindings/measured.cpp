#include "bindings/measured.hpp"

#include <structmember.h>

#include <array>
#include <stdexcept>

#include "bindings/convert.hpp"
#include "bindings/text.hpp"

namespace gradclip::bindings {
namespace {

Table<double> plain_sums(const NormOrder& order, const Table<NormSum>& sums) {
  return decide([&] {
    Table<double> plain;
    plain.reserve(sums.size());
    for (const NormSum& sum : sums) plain.push_back(to_plain(order, sum));
    return plain;
  });
}

// Hand this process's sums to the caller's `reduce` and take the sums over all processes. What its code
// raises, also as an array is made of what it returns, goes on as it is.
Table<NormSum> reduce_sums(const py::object& reduce, const NormOrder& order,
                           const Table<NormSum>& sums) {
  const Table<double> plain = plain_sums(order, sums);
  const py::object as_array = py::module_::import("numpy").attr("asarray");
  const py::array any = as_array(reduce(to_array(plain)));
  const char kind = any.dtype().kind();
  if (kind != 'f' && kind != 'i' && kind != 'u')
    throw py::type_error("reduce: expected an array of float64 sums, got dtype " +
                         str_text(any.dtype()));
  const py::array_t<double> reduced = as_array(any, "float64");
  if (reduced.ndim() != 1 || reduced.shape(0) != static_cast<py::ssize_t>(plain.size()))
    throw py::value_error("reduce: expected sums of shape (" + std::to_string(plain.size()) +
                          ",), got shape " + str_text(reduced.attr("shape")));
  Table<NormSum> result;
  decide([&] {
    for (py::ssize_t g = 0; g < reduced.shape(0); ++g) {
      const double sum = reduced.at(g);
      if (sum < 0.0)
        throw py::value_error("reduce: expected sums that are not negative, got " +
                              std::to_string(sum) + " for group " + std::to_string(g));
      result.push_back(from_plain(sum + 0.0));  // no -0
    }
  });
  return result;
}

// Of those tensors that hold elements which are not finite. A sum that is not finite need not mean that:
// the magnitude of a finite complex128 element can be beyond float64.
std::vector<NonFiniteEntry> count_nonfinite(const Gradients& grads, const PairTable* pairs,
                                            const std::vector<std::size_t>& tensors) {
  std::vector<NonFiniteEntry> counts;
  if (tensors.empty()) return counts;
  run(grads.nbytes(), [&] {
    for (const std::size_t i : tensors) {
      const cpu::NonFiniteCounts count = pairs ? cpu::count_nonfinite(pairs->gradients[i])
                                               : cpu::count_nonfinite(grads.spans()[i]);
      if (count.nan + count.infinity > 0) counts.push_back({i, count});
    }
  });
  return counts;
}

// The threshold and the policy of a clip, whose groups are known.
struct ClipArguments {
  Table<double> thresholds;
  ClipOptions options;

  ClipArguments(const py::object& max_norm, const py::object& nonfinite, const py::object& formula,
                const NamedGroups& groups, const Gradients& grads, const Pair* pair,
                double grad_scale, const NormOrder& order, bool is_alone)
      : thresholds(limits_of_groups(max_norm, groups, grads.spans().size(), false)),
        options(clip_options(nonfinite, formula, grad_scale, order,
                             is_alone && (pair || grads.has_only_float64()))) {
    options.always_changes = pair && !pair->is_difference();
  }
};

}  // namespace

namespace {

py::object in_result_module(const char* name) {
  return checked(PyImport_ImportModule("gradclip._result")).attr(name);
}

// A gradclip.ClipResult. Its frozen fields are slots, which are filled here: its own __init__ takes as long
// as to measure a small gradient.
class ResultMaker {
 public:
  ResultMaker() : type_(in_result_module("ClipResult")) {
    const char* const names[kFields] = {"total_norm",  "norms",   "coefficient", "clipped",
                                        "nonfinite",   "missing", "names",       "_group_norms",
                                        "group_names", "penalty"};
    for (std::size_t i = 0; i < kFields; ++i) {
      const py::object slot = type_.attr(names[i]);
      if (Py_TYPE(slot.ptr()) != &PyMemberDescr_Type)
        throw std::logic_error(std::string("ClipResult: expected slots, got another ") + names[i]);
      offsets_[i] = reinterpret_cast<PyMemberDescrObject*>(slot.ptr())->d_member->offset;
    }
  }
  static constexpr std::size_t kFields = 10;

  py::object make(const std::array<py::object, kFields>& values) const {
    auto* const type = reinterpret_cast<PyTypeObject*>(type_.ptr());
    py::object result = checked(type->tp_alloc(type, 0));
    for (std::size_t i = 0; i < kFields; ++i)
      *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(result.ptr()) + offsets_[i]) =
          py::object(values[i]).release().ptr();
    return result;
  }

 private:
  py::object type_;
  Py_ssize_t offsets_[kFields];
};

[[noreturn]] void raise_nonfinite(const std::vector<NonFiniteEntry>& entries,
                                  const Gradients& grads, const py::object& norms) {
  const py::object counts = checked(PyList_New(0));
  for (const auto& [tensor, elements] : entries) {
    const py::object entry = checked(Py_BuildValue("(nLL)", static_cast<Py_ssize_t>(tensor),
                                                   static_cast<long long>(elements.nan),
                                                   static_cast<long long>(elements.infinity)));
    if (PyList_Append(counts.ptr(), entry.ptr()) != 0) throw py::error_already_set();
  }
  const py::object error =
      in_result_module("nonfinite_error")(counts, grads.names(), norms, grads.argument());
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
  throw py::error_already_set();
}

}  // namespace

py::object make_result(double total, const Table<double>& norms, const py::object& coefficient,
                       bool clipped, const std::vector<std::size_t>& nonfinite,
                       const Gradients& grads, const py::object& group_norms,
                       const py::object& group_names, double penalty) {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<ResultMaker> storage;
  const ResultMaker& maker =
      storage.call_once_and_store_result([] { return ResultMaker(); }).get_stored();
  const py::object& names = grads.names();
  return maker.make({to_float(total), to_array(norms), coefficient, py::bool_(clipped),
                     to_named(nonfinite, names), to_named(grads.missing(), names), names,
                     group_norms, group_names, to_float(penalty)});
}

Measured::Measured(std::shared_ptr<const Gradients> grads, const MeasureArguments& arguments,
                   std::shared_ptr<const Pair> pair)
    : grads_(std::move(grads)),
      pair_(std::move(pair)),
      order_(arguments.order),
      named_(arguments.groups),
      grad_scale_(arguments.grad_scale),
      is_alone_(arguments.reduce.is_none()) {
  Table<NormSum> sums;
  Table<double> of_rows;  // norms
  if (pair_) {
    measure_pair(sums);
  } else if (!named_.rows) {
    sums = run(grads_->nbytes(),
               [&] { return cpu::measure(grads_->spans(), grads_->plan(), order_); });
    sums_ = decide([&] { return sums_of_groups(order_, sums, named_.groups); });
  } else if (named_.groups.kind == Groups::row && order_.kind == NormOrder::two && is_alone_) {
    cpu::RowNorms norms = run(grads_->nbytes(), [&] {
      return cpu::measure_row_norms(*named_.rows, cpu::make_plan(*named_.rows), grad_scale_);
    });
    sums = std::move(norms.tensors);
    of_rows = std::move(norms.rows);
  } else {
    RowSums both = run(grads_->nbytes(), [&] {
      const RowTable& rows = *named_.rows;
      return sums_of_rows(order_, cpu::measure_rows(rows, cpu::make_plan(rows), order_), rows.first,
                          named_.groups);
    });
    sums = std::move(both.tensors);
    sums_ = std::move(both.groups);
  }
  norms_ = decide([&] {
    return norms_of(order_, sums, named_.groups, sums_, grad_scale_, std::move(of_rows));
  });
  nonfinite_ = count_nonfinite(*grads_, pairs_.get(), norms_.odd);
  join(arguments.reduce);
}

// Norms of this process become those over all.
void Measured::join(const py::object& reduce) {
  if (reduce.is_none()) return;
  const Table<NormSum> reduced = reduce_sums(reduce, order_, sums_);
  decide([&] { take_sums(norms_, order_, reduced, grad_scale_); });
}

// `sums`: of tensors.
void Measured::measure_pair(Table<NormSum>& sums) {
  pairs_ = std::make_shared<const PairTable>(pair_->table(grad_scale_, named_.rows.get()));
  PairSums second;
  run(grads_->nbytes(), [&] {
    Table<NormSum> parts = cpu::measure_pairs(*pairs_, cpu::make_plan(*pairs_), order_, second);
    if (named_.groups.are_of_rows()) {
      RowSums both = sums_of_rows(order_, std::move(parts), pairs_->first, named_.groups);
      sums = std::move(both.tensors);
      sums_ = std::move(both.groups);
    } else {
      sums = std::move(parts);
      sums_ = sums_of_groups(order_, sums, named_.groups);
    }
  });
  penalty_ = decide([&] {
    return penalty_of(second.squares.rounded(), second.magnitudes.rounded(), pairs_->formula.l2,
                      pairs_->formula.l1);
  });
}

Measured::Measured(const Pair& accumulation, const py::object& reduce)
    : grads_(accumulation.gradients()), is_alone_(reduce.is_none()) {
  const PairTable pairs = accumulation.table(1.0, nullptr);
  if (accumulation.adds_something()) grads_->mark_written();
  const Table<NormSum> sums = run(grads_->nbytes(), [&] {
    return accumulation.adds_something() ? cpu::accumulate(grads_->spans(), pairs, grads_->plan())
                                         : cpu::measure(grads_->spans(), grads_->plan(), order_);
  });
  decide([&] {
    sums_ = sums_of_groups(order_, sums, named_.groups);
    norms_ = norms_of(order_, sums, named_.groups, sums_, grad_scale_, {});
  });
  nonfinite_ = count_nonfinite(*grads_, nullptr, norms_.odd);
  join(reduce);
}

Measured::Measured(std::shared_ptr<const Gradients> grads, double norm) : grads_(std::move(grads)) {
  norms_.total = norm;
  norms_.tensors.assign(grads_->spans().size(), quiet_nan());
  norms_.groups.assign(1, norm);
}

Measured Measured::of_shards(const std::shared_ptr<const Gradients>& grads, const MeasureCall& call,
                             bool is_wide, const py::object& sums) {
  const MeasureArguments arguments(*grads, call);
  if (arguments.groups.rows)
    throw py::value_error(
        "groups: expected groups of whole gradients where ranks hold shards, got rows");
  Measured measured;
  measured.grads_ = grads;
  measured.order_ = arguments.order;
  measured.named_ = arguments.groups;
  measured.grad_scale_ = arguments.grad_scale;
  measured.is_wide_ = is_wide;
  const std::size_t count = grads->spans().size();
  Table<ExactSum> exact(count);
  Table<NormSum> tensors;
  if (sums.is_none()) {
    tensors = run(grads->nbytes(), [&] {
      return cpu::measure(grads->spans(), grads->plan(), measured.order_, std::span(exact));
    });
  } else {
    const py::array_t<double> given(sums);
    if (given.ndim() != 1 || given.shape(0) != static_cast<py::ssize_t>(count))
      throw py::value_error("sums: expected shape (" + std::to_string(count) + ",), got " +
                            str_text(given.attr("shape")));
    for (py::ssize_t i = 0; i < given.shape(0); ++i) tensors.push_back(from_plain(given.at(i)));
  }
  const std::size_t width = measured.words_of_one();
  measured.words_.assign(count * width, 0);
  std::vector<std::size_t> odd;
  decide([&] {
    for (std::size_t i = 0; i < count; ++i) {
      std::int64_t* const words = measured.words_.data() + i * width;
      const NormSum& sum = tensors[i];
      if (!is_finite(sum.value) || !is_finite(sum.unit)) odd.push_back(i);
      if (measured.order_.kind == NormOrder::infinity) {
        *words = bit_copy<std::int64_t>(sum.value);  // not negative: greater where the value is
        continue;
      }
      // What needed a unit is rounded, what somebody else has measured is, too.
      const bool is_exact =
          sums.is_none() && !needs_unit(measured.order_, is_complex(grads->spans()[i].dtype));
      if (!is_exact && measured.order_.kind == NormOrder::other)
        exact[i].add(to_plain(measured.order_, sum));
      else if (!is_exact)
        exact[i].add({sum.value, sum.exponent});
      exact[i].store(measured.grid(), words);
    }
  });
  measured.nonfinite_ = count_nonfinite(*grads, nullptr, odd);
  return measured;
}

Table<std::int64_t> Measured::nonfinite_counts() const {
  Table<std::int64_t> counts(2 * grads_->spans().size());
  for (const auto& [tensor, elements] : nonfinite_) {
    counts[2 * tensor] = static_cast<std::int64_t>(elements.nan);
    counts[2 * tensor + 1] = static_cast<std::int64_t>(elements.infinity);
  }
  return counts;
}

void Measured::join_words(const WordArray& words, const WordArray& counts) {
  const std::size_t count = grads_->spans().size(), width = words_of_one();
  const auto has = [](const WordArray& array, std::size_t size) {
    return array.ndim() == 1 && array.shape(0) == static_cast<py::ssize_t>(size);
  };
  if (!has(words, count * width) || !has(counts, 2 * count))
    throw py::value_error("words: expected as many as sum_words and nonfinite_counts have");
  decide([&] {
    Table<NormSum> tensors;
    for (std::size_t i = 0; i < count; ++i) {
      const std::int64_t* const own = words.data() + i * width;
      if (order_.kind == NormOrder::infinity) {
        tensors.push_back({bit_copy<double>(*own), 0, 0.0});
        continue;
      }
      const WideValue sum = ExactSum::load(grid(), own).rounded();
      tensors.push_back(order_.kind == NormOrder::other ? from_plain(narrow(sum))
                                                        : NormSum{sum.value, sum.exponent, 0.0});
    }
    sums_ = sums_of_groups(order_, tensors, named_.groups);
    norms_ = norms_of(order_, tensors, named_.groups, sums_, grad_scale_);
  });
  nonfinite_.clear();
  for (std::size_t i = 0; i < count; ++i) {
    const auto nan = static_cast<std::int64_t>(counts.data()[2 * i]);
    const auto infinity = static_cast<std::int64_t>(counts.data()[2 * i + 1]);
    if (nan + infinity > 0) nonfinite_.push_back({i, {nan, infinity}});
  }
}

Measured Measured::measure(std::shared_ptr<const Gradients> grads, std::shared_ptr<const Pair> pair,
                           const MeasureCall& call) {
  const MeasureArguments arguments(*grads, call);
  call.recheck(*grads, HostReader{});
  if (pair) call.recheck(pair->second(), second_reader());
  return {std::move(grads), arguments, std::move(pair)};
}

py::object Measured::clip(std::shared_ptr<const Gradients> grads, std::shared_ptr<const Pair> pair,
                          const ClipCall& call) {
  const MeasureArguments measure(*grads, call.measure);
  const ClipArguments clip(call.max_norm, call.nonfinite, call.formula, measure.groups, *grads,
                           pair.get(), measure.grad_scale, measure.order, measure.reduce.is_none());
  pair ? pair->require_writable() : grads->require_writable();
  call.recheck(*grads, HostReader{});
  if (pair) call.recheck(pair->second(), second_reader());
  Measured measured(std::move(grads), measure, std::move(pair));
  if (!measure.reduce.is_none()) measured.require_unchanged();
  return measured.apply(clip.thresholds, clip.options);
}

py::object Measured::clip_measured(const py::object& max_norm, const py::object& nonfinite,
                                   const py::object& formula) {
  const ClipArguments clip(max_norm, nonfinite, formula, named_, *grads_, pair_.get(), grad_scale_,
                           order_, is_alone_);
  require_first_use();
  return apply(clip.thresholds, clip.options);
}

py::object Measured::scale_measured(const py::object& coefficients, const py::object& nonfinite) {
  const NonFinite policy = nonfinite_policy(nonfinite);
  const Table<double> numbers =
      limits_of_groups(coefficients, named_, grads_->spans().size(), true);
  require_first_use();
  return apply(numbers, {.nonfinite = policy,
                         .grad_scale = grad_scale_,
                         .are_coefficients = true,
                         .always_changes = pair_ && !pair_->is_difference()});
}

std::vector<std::size_t> Measured::nonfinite() const {
  std::vector<std::size_t> tensors;
  for (const NonFiniteEntry& entry : nonfinite_) tensors.push_back(entry.tensor);
  return tensors;
}

Table<double> Measured::group_sums() const { return plain_sums(order_, sums_); }

void Measured::require_first_use() const {
  if (is_used_) refuse_second_use();
  pair_ ? pair_->require_writable() : grads_->require_writable();
  require_unchanged();
}

void Measured::require_unchanged() const {
  grads_->require_unchanged(HostReader{});
  if (pair_) pair_->second().require_unchanged(second_reader());
}

py::object Measured::apply(const Table<double>& limits, const ClipOptions& options) {
  const ClipDecision decision =
      decide([&] { return decide_clip(norms_, named_.groups, limits, options); });
  if (decision.any_nonfinite && options.nonfinite == NonFinite::raise)
    raise_nonfinite(nonfinite_, *grads_, to_array(norms_.tensors));
  const py::object coefficient =
      is_global() ? to_float(decision.coefficients[0]) : to_array(decision.coefficients);
  const py::object group_norms = is_global() ? py::none() : to_array(norms_.groups);
  py::object result = make_result(norms_.total, norms_.tensors, coefficient, decision.clipped,
                                  nonfinite(), *grads_, group_norms, named_.names, penalty_);
  is_used_ = true;
  if (decision.action == Action::nothing) return result;
  grads_->mark_written();
  run(grads_->nbytes(), [&] { write(decision, options); });
  return result;
}

void Measured::write(const ClipDecision& decision, const ClipOptions& options) const {
  const bool down = options.rounds_down(), are_samples = named_.groups.kind == Groups::sample;
  if (decision.action == Action::zero) {
    if (pair_ && pair_->is_difference())
      cpu::take_second(*pairs_, cpu::make_plan(*pairs_));
    else
      cpu::set_to_zero(grads_->spans(), grads_->plan());
  } else if (pair_) {
    if (named_.rows)
      cpu::scale_pairs(*pairs_, cpu::make_plan(*pairs_), decision.coefficients, options.grad_scale,
                       down, are_samples);
    else
      cpu::scale_pairs(*pairs_, cpu::make_plan(*pairs_), decision.factors, 1.0, down, false);
  } else if (!named_.rows) {
    cpu::scale(grads_->spans(), grads_->plan(), decision.factors, down);
  } else {
    (are_samples ? cpu::scale_samples : cpu::scale_rows)(*named_.rows, cpu::make_plan(*named_.rows),
                                                         decision.coefficients, options.grad_scale,
                                                         down);
  }
}

}  // namespace gradclip::bindings
