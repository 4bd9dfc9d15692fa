// Whether help pays: learned from how long calls took, each against its own kind.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace gradclip::cpu {

// How a call may be helped. Whoever is asleep has to wake up first; see openmp.hpp of `borrowed`.
enum class Helpers : std::uint8_t { asleep, awake, borrowed };

// What calls of one kind took alone and with help.
class Experience {
 public:
  // Whether the next call shall have help. Both ways are tried at first; then the better one is
  // taken, and the other one now and then, the more rarely the worse it was: that costs 3 % at most.
  bool chooses_help() {
    if (alone_.count < kTrials || helped_.count < kTrials) return helped_.count <= alone_.count;
    const double alone = alone_.expected(), helped = helped_.expected();
    const bool help = helped <= alone;
    if (++calls_ * std::min(alone, helped) < kCallsBetweenTrials * std::max(alone, helped))
      return help;
    calls_ = 0;
    return !help;
  }
  void learn(bool helped, double seconds) { (helped ? helped_ : alone_).add(seconds); }

 private:
  static constexpr unsigned kTrials = 3;
  static constexpr int kCallsBetweenTrials = 32;

  // The last few, of which one that was disturbed does not count, but every fourth does: somebody
  // waits for the slowest of many.
  struct Times {
    std::array<double, 7> last{};
    unsigned count = 0;  // begins anew after 2^32

    void add(double seconds) { last[count++ % last.size()] = seconds; }
    double expected() const {
      std::array<double, 7> sorted = last;
      const auto size = std::min<std::size_t>(count, sorted.size());
      std::sort(sorted.begin(), sorted.begin() + static_cast<std::ptrdiff_t>(size));
      return (sorted[size / 2] + sorted[size * 3 / 4]) / 2;
    }
  };

  Times alone_, helped_;
  int calls_ = 0;
};

// Of one place in the code: by who would help and by the size of the work, to a power of two.
class Experiences {
 public:
  static constexpr std::int64_t kLeast = std::int64_t{512} << 10, kMost = std::int64_t{32} << 20;

  // For less nobody is woken; to more help always pays.
  static bool is_open(std::int64_t bytes) { return bytes >= kLeast && bytes < kMost; }

  // `allowed_threads`: the user's setting, not what a call of this size is worth. Another one makes all
  // that was learned void.
  Experience& of(Helpers helpers, std::int64_t bytes, int allowed_threads) {
    if (allowed_threads_ != allowed_threads) *this = {};
    allowed_threads_ = allowed_threads;
    const auto size = std::bit_width(static_cast<std::uint64_t>(bytes / kLeast)) - 1;
    return kinds_[static_cast<std::size_t>(helpers)][static_cast<std::size_t>(size)];
  }

 private:
  static constexpr std::size_t kSizes =
      std::bit_width(static_cast<std::uint64_t>(kMost / kLeast)) - 1;
  int allowed_threads_ = 0;
  std::array<std::array<Experience, kSizes>, 3> kinds_;
};

}  // namespace gradclip::cpu
