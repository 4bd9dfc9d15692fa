// What travels to the kernels of a call.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/clip.hpp"
#include "core/sum_words.hpp"
#include "cuda/engine.hpp"
#include "cuda/plan.hpp"

namespace gradclip::cuda {

// An accumulator in global memory, whatever its type.
struct Accumulated {
  std::uint64_t words[5];
};

// The largest magnitude, and whether an element is infinite or NaN: of a finite complex element the
// magnitude can be beyond float64.
struct Largest {
  double value = 0.0;
  std::uint32_t nonfinite = 0;  // whether it holds an infinity or a NaN
  std::uint32_t clipped = 0;    // whether a clip by value has changed it

  GRADCLIP_INLINE void add(const Largest& other) {
    value = larger(other.value, value);
    nonfinite |= other.nonfinite;
    clipped |= other.clipped;
  }
};

// Memory of one call at a time. The counters are 0 between calls: whoever is last sets them back.
struct Scratch {
  std::uint32_t* blocks_done;
  std::uint32_t* shares_taken;  // of those kept back
  std::uint32_t* tiles_done;    // of every part that is spread over blocks
  Accumulated*
      partials;  // two per share: of the tensor it ends, or is inside; of the one it begins
  Accumulated* block_totals;
  NormSum* sums;               // of every part
  Largest* units;              // of every part, in the slow orders
  NormSum* sums_of_gradients;  // where parts are rows
  PairSums* pair_totals;       // of pairs, of every block
};

struct ResultPointers {
  double* total_norm;
  double* penalty;  // of pairs
  double* coefficients;
  double* group_norms;
  double* group_sums;
  double* norms;
  ResultFlags* flags;
  std::uint8_t* nonfinite;

  ResultPointers(const ResultLayout& at, std::byte* result)
      : total_norm(reinterpret_cast<double*>(result + at.total_norm())),
        penalty(reinterpret_cast<double*>(result + at.penalty())),
        coefficients(reinterpret_cast<double*>(result + at.coefficients())),
        group_norms(reinterpret_cast<double*>(result + at.group_norms())),
        group_sums(reinterpret_cast<double*>(result + at.group_sums())),
        norms(reinterpret_cast<double*>(result + at.norms())),
        flags(reinterpret_cast<ResultFlags*>(result + at.flags())),
        nonfinite(reinterpret_cast<std::uint8_t*>(result + at.nonfinite())) {}
};

struct MeasureArguments {
  TableView table;
  Scratch scratch;
  ResultPointers result;
  std::uint32_t* words;  // of the sum of every part, in place of a result; else null
  NormOrder order;
  double grad_scale;
  Groups::Kind grouping;
  bool units_pass;    // of two passes the first: largest magnitudes for the second
  bool decides;       // whether `decision` is there
  Decision decision;  // its scale is `grad_scale`
};

struct DecideArguments {
  MeasureArguments measured;
  const double* sums;  // of groups over all processes; null: their norms are in the result
};

// Sums of shards, (count, shards, parts) -> (count, parts).
struct CombineSumsArguments {
  NormOrder order;
  const std::uint32_t* words;
  std::size_t count;
  std::uint32_t shards, parts;
  std::uint32_t* combined;
};

struct DecideSumsArguments {
  TableView table;  // but for entries
  Groups::Kind grouping;
  std::uint32_t parts;
  SumDecisions decisions;
  NormSum* sums_of_tensors;            // those of each block
  double *group_norms, *coefficients;  // the same, of groups
};

struct ChangeArguments {
  TableView table;
  // Either what a clip decided, or one factor for all, or one for every part.
  const ResultFlags* flags;
  const double* coefficients;
  double grad_scale;
  double factor;
  bool are_samples;  // the groups
  bool rounds_down;
  const double* factors = nullptr;  // kSetToZero among them
};

struct ValueClipArguments {
  TableView table;
  Scratch scratch;
  ResultPointers result;
  ValueLimit limit;
};

struct CountArguments {
  TableView table;
  unsigned long long* counts;  // two for every tensor
};

// What a kernel gets: its arguments and the entries of the table, one more than there are tensors (its
// first_cost is the total). They lie in memory, or where the list is short beside the arguments: no
// copy, no memory of the device.
struct EntriesInMemory {
  const TensorEntry* first;
  GRADCLIP_INLINE const TensorEntry& operator[](std::uint32_t i) const { return first[i]; }
};
struct EntriesInArgument {
  const TensorEntry* first;
  GRADCLIP_INLINE const TensorEntry& operator[](std::uint32_t i) const { return first[i]; }
};

template <class Arguments>
struct InMemory {
  Arguments arguments;
  GRADCLIP_INLINE EntriesInMemory view() const { return {arguments.table.entries}; }
};
template <class Arguments, std::uint32_t kEntries>
struct InArgument {
  Arguments arguments;
  TensorEntry entries[kEntries + 1];

  explicit InArgument(const Arguments& given) : arguments(given) {}  // entries are what was there
  GRADCLIP_INLINE EntriesInArgument view() const { return {entries}; }
};

}  // namespace gradclip::cuda
