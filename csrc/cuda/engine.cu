// Lists of gradients: their tables, and the launches over them.
#include <algorithm>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <type_traits>

#include "cuda/engine.hpp"
#include "cuda/kernels.cuh"
#include "cuda/workspace.hpp"

namespace gradclip::cuda {
namespace {

std::size_t aligned_size(std::size_t bytes) { return (bytes + 15) / 16 * 16; }

// The parts of one piece of memory, one after the other.
class Parts {
 public:
  std::size_t add(std::size_t bytes) {
    const std::size_t at = end_;
    end_ += aligned_size(bytes);
    return at;
  }
  std::size_t end() const { return end_; }

 private:
  std::size_t end_ = 0;
};

// Those of kept lists. A kernel that is loaded by its first launch cannot be captured into a graph.
void load_kernels() {
  const auto load = [](const auto&... kernels) {
    cudaFuncAttributes attributes{};
    (check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernels)),
           "cudaFuncGetAttributes"),
     ...);
  };
  using Measuring = InMemory<MeasureArguments>;
  load(measure_kernel<Measure::squares, Measuring>, measure_kernel<Measure::magnitudes, Measuring>,
       measure_kernel<Measure::largest, Measuring>, measure_kernel<Measure::powers, Measuring>,
       change_kernel<InMemory<ChangeArguments>>, clip_by_value_kernel<InMemory<ValueClipArguments>>,
       decide_kernel);
}

int multiprocessors(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  return count;
}

}  // namespace

struct List::State {
  int device = 0;
  Groups::Kind grouping = Groups::all;
  std::size_t tensors = 0, parts = 0, groups = 1;
  std::vector<TensorEntry> entries;
  std::vector<Axis> axes;
  std::vector<RowEntry> rows;
  std::vector<PairEntry> pairs;
  std::vector<std::uint32_t> labels, members, group_begin;
  bool any_complex = false;
  unsigned blocks = 1;
  unsigned blocks_of_large_kernels = 1;
  bool is_in_memory = false;  // the table: copied there
  TableView table{};
  Scratch scratch{};
  Workspace* workspace = nullptr;
  std::size_t table_bytes = 0;
  bool is_kept = false;
  std::mutex turn;                         // of a list that is kept
  std::optional<unsigned long long> used;  // and the stream that its last work was on
  Stream stream = nullptr;                 // of a list that is not

  State() = default;
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  ~State() {
    if (is_kept)
      delete workspace;
    else if (workspace)
      give_back(workspace, stream);
  }

  void read(std::span<const Span> spans, const Groups& groups_wanted, const RowTable* row_table,
            const PairTable* pair_table);
  void place(Stream on);
  void copy_table(Stream on);

  // Launches that use work memory, behind the last ones that did, whichever stream those were on. The event is
  // recorded in any case: when another stream follows, this one may be gone.
  template <class Launches>
  void in_turn(Stream on, Launches launches) {
    if (!is_kept) return launches();
    const std::scoped_lock lock(turn);
    if (is_capturing(on)) return launches();  // what a graph does when it runs, its owner orders
    unsigned long long id = 0;                // a handle may be that of a stream which is gone
    check(cudaStreamGetId(on, &id), "cudaStreamGetId");
    if (used && used != id) workspace->let_wait(on);
    launches();
    workspace->mark_end(on);
    used = id;
  }
  template <class Arguments>
  void launch_in_memory(void (*kernel)(InMemory<Arguments>), unsigned grid,
                        std::size_t shared_bytes, const Arguments& arguments, Stream on) {
    if (!is_in_memory) copy_table(on);
    InMemory<Arguments> list{arguments};
    list.arguments.table.is_in_argument = false;
    launch(kernel, grid, kThreads, shared_bytes, on, list);
  }
  template <class Arguments, std::uint32_t kEntries>
  void launch_in_argument(void (*kernel)(InArgument<Arguments, kEntries>), std::size_t shared_bytes,
                          const Arguments& arguments, Stream on) const {
    InArgument<Arguments, kEntries> list(arguments);
    std::copy(entries.begin(), entries.end(), list.entries);
    launch(kernel, blocks, kThreads, shared_bytes, on, list);
  }
  // kernel_of(std::type_identity<List>{}) is the kernel for a kind of list.
  template <class Arguments, class KernelOf>
  void launch_over(KernelOf kernel_of, std::size_t shared_bytes, const Arguments& arguments,
                   Stream on) {
    const auto kernel = [&]<class List>() { return kernel_of(std::type_identity<List>{}); };
    if (!table.is_in_argument)
      launch_in_memory(kernel.template operator()<InMemory<Arguments>>(), blocks, shared_bytes,
                       arguments, on);
    else if (tensors <= kFewEntries)
      launch_in_argument(kernel.template operator()<InArgument<Arguments, kFewEntries>>(),
                         shared_bytes, arguments, on);
    else
      launch_in_argument(kernel.template operator()<InArgument<Arguments, kMostEntries>>(),
                         shared_bytes, arguments, on);
  }
  MeasureArguments measure_arguments(const NormOrder& order, double grad_scale, std::byte* result,
                                     const Decision* decision) const {
    return {table,
            scratch,
            ResultPointers({tensors, groups}, result),
            nullptr,
            order,
            grad_scale,
            grouping,
            false,
            decision != nullptr,
            decision ? *decision : Decision{}};
  }
  template <Measure kMeasure>
  void launch_measure(const MeasureArguments& arguments, Stream on) {
    constexpr std::size_t kShared = sizeof(CombineShared<typename AccumulatorOf<kMeasure>::Type>);
    if constexpr (kMeasure != Measure::magnitudes) {
      if (!pairs.empty())
        return launch_in_memory(measure_pairs_kernel<kMeasure>, blocks_of_large_kernels,
                                sizeof(PairShared<typename AccumulatorOf<kMeasure>::Type>),
                                arguments, on);
    }
    if constexpr (kMeasure == Measure::squares)
      launch_over(
          []<class List>(std::type_identity<List>) { return measure_kernel<kMeasure, List>; },
          kShared, arguments, on);
    else
      launch_in_memory(measure_kernel<kMeasure, InMemory<MeasureArguments>>,
                       kMeasure == Measure::powers ? blocks_of_large_kernels : blocks, kShared,
                       arguments, on);
  }
  void measure(MeasureArguments arguments, Stream on) {
    const NormOrder& order = arguments.order;
    in_turn(on, [&] {
      if (needs_unit(order, any_complex)) {
        arguments.units_pass = true;
        launch_measure<Measure::largest>(arguments, on);
        arguments.units_pass = false;
        launch_measure<Measure::powers>(arguments, on);
      } else if (order.kind == NormOrder::two) {
        launch_measure<Measure::squares>(arguments, on);
      } else if (order.kind == NormOrder::one && pairs.empty()) {
        launch_measure<Measure::magnitudes>(arguments, on);
      } else if (order.kind == NormOrder::one) {  // of pairs, which have no kernel of their own
        launch_measure<Measure::powers>(arguments, on);
      } else {
        launch_measure<Measure::largest>(arguments, on);
      }
    });
  }
  void launch_change(const ChangeArguments& arguments, Stream on) {
    if (!pairs.empty())
      return launch_in_memory(change_pairs_kernel, blocks_of_large_kernels, sizeof(Ways), arguments,
                              on);
    launch_over([]<class List>(std::type_identity<List>) { return change_kernel<List>; },
                sizeof(Ways), arguments, on);
  }
};

void List::State::read(std::span<const Span> spans, const Groups& groups_wanted,
                       const RowTable* row_table, const PairTable* pair_table) {
  constexpr auto kMost = std::numeric_limits<std::uint32_t>::max();
  tensors = spans.size();
  grouping = groups_wanted.kind;
  groups = groups_wanted.count(tensors);
  parts = row_table ? row_table->count() : tensors;
  if (tensors >= kMost) throw std::length_error("grads: expected fewer than 2^32 - 1 gradients");
  if (parts >= kMost) throw std::length_error("grads: expected fewer than 2^32 - 1 rows");
  entries.reserve(tensors + 1);
  std::int64_t cost = 0;
  // A tensor, or `count` rows like this one.
  const auto add = [&](const Span& span, std::int64_t count) {
    if (tiles_of(span.nbytes()) >= kMost)
      throw std::length_error("grads: expected gradients of less than 2^46 bytes");
    TensorEntry entry{span.data, count * span.nbytes(),
                      cost,      static_cast<std::uint32_t>(axes.size()),
                      0,         span.dtype};
    if (span.layout) {
      entry.axes = static_cast<std::uint16_t>(span.layout->axes.size());
      axes.insert(axes.end(), span.layout->axes.begin(), span.layout->axes.end());
    }
    any_complex = any_complex || is_complex(span.dtype);
    entries.push_back(entry);
    cost += count * cost_of(span.nbytes());
  };
  const auto first_axis_of = [&](const RowSpan& rows_of) {
    const auto first = static_cast<std::uint32_t>(axes.size());
    if (rows_of.layout)
      axes.insert(axes.end(), rows_of.layout->axes.begin(), rows_of.layout->axes.end());
    return first;
  };
  const auto axes_of = [](const RowSpan& rows_of) {
    return static_cast<std::uint16_t>(rows_of.layout ? rows_of.layout->axes.size() : 0);
  };
  for (std::size_t i = 0; i < tensors; ++i) {
    if (pair_table) {
      const auto& [x, y, formula, dtype] = pair_table->gradients[i];
      auto* const row_0 =
          reinterpret_cast<std::byte*>(kRowZero);  // NOLINT(performance-no-int-to-ptr)
      add({row_0, x.numel, nullptr, dtype}, x.count);
      entries.back().first_axis = static_cast<std::uint32_t>(i);
      const std::uint32_t x_axis = first_axis_of(x), y_axis = first_axis_of(y);
      pairs.push_back({x.first, y.first, x.stride, y.stride, x_axis, y_axis, axes_of(x), axes_of(y),
                       x.dtype, y.dtype, formula});
      if (row_table)
        rows.push_back({1, static_cast<std::uint32_t>(x.count),
                        static_cast<std::uint32_t>(row_table->first[i])});
      continue;
    }
    if (!row_table) {
      add(spans[i], 1);
      continue;
    }
    const RowSpan& gradient = row_table->gradients[i];
    add(gradient[0], gradient.count);
    rows.push_back({gradient.stride, static_cast<std::uint32_t>(gradient.count),
                    static_cast<std::uint32_t>(row_table->first[i])});
  }
  entries.push_back({nullptr, 0, cost, 0, 0, DType::float32});
  if (grouping == Groups::labels) {
    labels.assign(groups_wanted.label.begin(), groups_wanted.label.end());
    group_begin.assign(groups + 1, 0);
    for (const std::uint32_t label : labels) ++group_begin[label + 1];
    for (std::size_t g = 0; g < groups; ++g) group_begin[g + 1] += group_begin[g];
    members.resize(tensors);
    std::vector<std::uint32_t> next(group_begin.begin(), group_begin.end() - 1);
    for (std::uint32_t i = 0; i < tensors; ++i) members[next[labels[i]]++] = i;
  }
  table.tensors = static_cast<std::uint32_t>(tensors);
  table.groups = static_cast<std::uint32_t>(groups);
  table.cost = cost;
  const int count = multiprocessors(device);
  const auto blocks_at = [&](int per_multiprocessor) {
    const std::int64_t resident = static_cast<std::int64_t>(count) * per_multiprocessor;
    return static_cast<unsigned>(std::clamp<std::int64_t>(cost / kLeastCostPerBlock, 1, resident));
  };
  blocks = blocks_at(kBlocksPerMultiprocessor);
  blocks_of_large_kernels = blocks_at(kBlocksOfLargeKernels);
}

void List::State::place(Stream on) {
  table.is_in_argument = !is_kept && tensors <= kMostEntries && axes.empty() && rows.empty() &&
                         pairs.empty() && grouping != Groups::labels;
  Parts all;
  const std::size_t at_entries = all.add(entries.size() * sizeof(TensorEntry));
  const std::size_t at_axes = all.add(axes.size() * sizeof(Axis));
  const std::size_t at_rows = all.add(rows.size() * sizeof(RowEntry));
  const std::size_t at_pairs = all.add(pairs.size() * sizeof(PairEntry));
  const std::size_t at_labels = all.add(labels.size() * sizeof(std::uint32_t));
  const std::size_t at_members = all.add(members.size() * sizeof(std::uint32_t));
  const std::size_t at_begin = all.add(group_begin.size() * sizeof(std::uint32_t));
  table_bytes = all.end();
  const auto shares = static_cast<std::size_t>(std::max(
      Shares(table.cost, blocks).count(), Shares(table.cost, blocks_of_large_kernels).count()));
  const std::size_t at_partials = all.add(2 * shares * sizeof(Accumulated));
  const std::size_t at_totals = all.add(blocks * sizeof(Accumulated));
  const std::size_t at_sums = all.add(parts * sizeof(NormSum));
  const std::size_t at_units = all.add(parts * sizeof(Largest));
  const std::size_t at_gradients = all.add(rows.size() * sizeof(NormSum));
  const std::size_t at_pair_totals = all.add(pairs.empty() ? 0 : blocks * sizeof(PairSums));
  workspace->reserve(4 + parts, all.end(), on);

  std::byte* const memory = workspace->memory();
  const auto words = [&](std::size_t at) { return reinterpret_cast<std::uint32_t*>(memory + at); };
  table.entries = reinterpret_cast<TensorEntry*>(memory + at_entries);
  table.axes = reinterpret_cast<Axis*>(memory + at_axes);
  table.rows = rows.empty() ? nullptr : reinterpret_cast<RowEntry*>(memory + at_rows);
  table.pairs = pairs.empty() ? nullptr : reinterpret_cast<PairEntry*>(memory + at_pairs);
  const bool labelled = grouping == Groups::labels;
  table.labels = labelled ? words(at_labels) : nullptr;
  table.members = labelled ? words(at_members) : nullptr;
  table.group_begin = labelled ? words(at_begin) : nullptr;
  scratch.blocks_done = workspace->counters();
  scratch.shares_taken = workspace->counters() + 1;
  scratch.tiles_done = workspace->counters() + 4;
  scratch.partials = reinterpret_cast<Accumulated*>(memory + at_partials);
  scratch.block_totals = reinterpret_cast<Accumulated*>(memory + at_totals);
  scratch.sums = reinterpret_cast<NormSum*>(memory + at_sums);
  scratch.units = reinterpret_cast<Largest*>(memory + at_units);
  scratch.sums_of_gradients = reinterpret_cast<NormSum*>(memory + at_gradients);
  scratch.pair_totals = reinterpret_cast<PairSums*>(memory + at_pair_totals);
  if (!table.is_in_argument) copy_table(on);
}

// To where place() has found room for it.
void List::State::copy_table(Stream on) {
  std::byte* const memory = workspace->memory();
  std::byte* const pinned = workspace->pinned(table_bytes);
  const auto put = [&](const void* to, const auto& items) {
    if (!items.empty())
      std::memcpy(pinned + (static_cast<const std::byte*>(to) - memory), items.data(),
                  items.size() * sizeof(items[0]));
  };
  put(table.entries, entries);
  put(table.axes, axes);
  put(table.rows, rows);
  put(table.pairs, pairs);
  put(table.labels, labels);
  put(table.members, members);
  put(table.group_begin, group_begin);
  check(cudaMemcpyAsync(memory, pinned, table_bytes, cudaMemcpyHostToDevice, on),
        "cudaMemcpyAsync");
  is_in_memory = true;
}

List::List(std::span<const Span> spans, const Groups& groups, const RowTable* rows, int device,
           Stream stream, const PairTable* pairs)
    : state_(std::make_unique<State>()) {
  state_->device = device;
  state_->stream = stream;
  state_->read(spans, groups, rows, pairs);
  state_->workspace = take_workspace(device, stream);
  state_->place(stream);
}

List::List(std::span<const Span> spans, const Groups& groups, const RowTable* rows, int device)
    : state_(std::make_unique<State>()) {
  state_->device = device;
  state_->is_kept = true;
  state_->read(spans, groups, rows, nullptr);
  state_->workspace = new Workspace(device);
  load_kernels();
  state_->place(nullptr);
  check(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
}

List::List(List&&) noexcept = default;
List::~List() = default;

ResultLayout List::layout() const { return {state_->tensors, state_->groups}; }

void List::measure(const NormOrder& order, double grad_scale, std::byte* result, Stream stream,
                   const Decision* decision) {
  state_->measure(state_->measure_arguments(order, grad_scale, result, decision), stream);
}

void List::measure_sums(const NormOrder& order, std::uint32_t* words, Stream stream) {
  if (state_->parts == 0) return;
  // Where a result would be is never looked at.
  MeasureArguments arguments =
      state_->measure_arguments(order, 1.0, reinterpret_cast<std::byte*>(words), nullptr);
  arguments.words = words;
  state_->measure(arguments, stream);
}

void List::decide_sums(const SumDecisions& decisions, Stream stream) {
  const State& s = *state_;
  if (decisions.count == 0) return;
  const std::size_t blocks = std::min(decisions.count, kMostBlocksOfSums);
  Parts all;
  const std::size_t at_sums = all.add(blocks * s.tensors * sizeof(NormSum));
  const std::size_t at_norms = all.add(blocks * s.groups * sizeof(double));
  const std::size_t at_coefficients = all.add(blocks * s.groups * sizeof(double));
  const BorrowedWorkspace workspace(s.device, stream);
  workspace->reserve(0, all.end(), stream);
  std::byte* const memory = workspace->memory();
  const DecideSumsArguments arguments{s.table,
                                      s.grouping,
                                      static_cast<std::uint32_t>(s.parts),
                                      decisions,
                                      reinterpret_cast<NormSum*>(memory + at_sums),
                                      reinterpret_cast<double*>(memory + at_norms),
                                      reinterpret_cast<double*>(memory + at_coefficients)};
  launch(decide_sums_kernel, static_cast<unsigned>(blocks), kThreads, kThreads * sizeof(ExactSum),
         stream, arguments);
}

void combine_sums(const NormOrder& order, const std::uint32_t* words, std::size_t count,
                  std::size_t shards, std::size_t parts, std::uint32_t* combined, Stream stream) {
  if (count == 0 || parts == 0) return;
  const std::size_t blocks =
      std::min((count * parts + kWarps - 1) / std::size_t{kWarps}, kMostBlocksOfSums);
  const CombineSumsArguments arguments{
      order,   words, count, static_cast<std::uint32_t>(shards), static_cast<std::uint32_t>(parts),
      combined};
  launch(combine_sums_kernel, static_cast<unsigned>(blocks), kThreads, kThreads * sizeof(ExactSum),
         stream, arguments);
}

void List::take_sums(const NormOrder& order, double grad_scale, const double* sums,
                     std::byte* result, Stream stream, const Decision* decision) {
  const DecideArguments arguments{state_->measure_arguments(order, grad_scale, result, decision),
                                  sums};
  launch(decide_kernel, 1u, kThreads, kThreads * sizeof(ExactSum), stream, arguments);
}

void List::decide(const Decision& decision, std::byte* result, Stream stream) {
  take_sums({}, decision.options.grad_scale, nullptr, result, stream, &decision);
}

void List::change(const ClipOptions& options, const std::byte* result, Stream stream) {
  const ResultPointers pointers(layout(), const_cast<std::byte*>(result));
  state_->launch_change({state_->table, pointers.flags, pointers.coefficients, options.grad_scale,
                         1.0, state_->grouping == Groups::sample, options.rounds_down()},
                        stream);
}

void List::scale(double factor, Stream stream) {
  state_->launch_change({state_->table, nullptr, nullptr, 1.0, factor, false, false}, stream);
}

void List::scale_by(const double* factors, bool down, Stream stream) {
  state_->launch_change({state_->table, nullptr, nullptr, 1.0, 1.0, false, down, factors}, stream);
}

void List::clip_by_value(const ValueLimit& limit, std::byte* result, Stream stream) {
  State& s = *state_;
  const ValueClipArguments arguments{s.table, s.scratch, ResultPointers(layout(), result), limit};
  s.in_turn(stream, [&] {
    s.launch_in_memory(clip_by_value_kernel<InMemory<ValueClipArguments>>,
                       s.blocks_of_large_kernels, sizeof(CombineShared<Largest>), arguments,
                       stream);
  });
}

void List::count_nonfinite(std::int64_t* counts, Stream stream) {
  State& s = *state_;
  check(cudaMemsetAsync(counts, 0, 2 * s.tensors * sizeof(*counts), stream), "cudaMemsetAsync");
  s.launch_in_memory(
      s.pairs.empty() ? count_nonfinite_kernel<OfGradients> : count_nonfinite_kernel<OfPairs>,
      s.blocks, sizeof(Ways),
      CountArguments{s.table, reinterpret_cast<unsigned long long*>(counts)}, stream);
}

}  // namespace gradclip::cuda
