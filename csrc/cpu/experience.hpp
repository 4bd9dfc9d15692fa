// Whether help pays: learned from how long calls took, each against its own kind.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace gradclip::cpu {

// How a call may be helped. Whoever is asleep has to wake up first; see openmp.hpp of `borrowed`.
enum class Helpers : std::uint8_t { asleep, awake, borrowed };

// What calls of one kind took alone and with help.
class Experience {
 public:
  // Whether the next call shall have help. Both ways are tried at first; then the better one is
  // taken, and the other one now and then, the more rarely the worse it was: that costs 1 %.
  bool chooses_help() {
    if (alone_.samples < kTrials || helped_.samples < kTrials)
      return helped_.samples <= alone_.samples;
    const bool help = helped_.expected() <= alone_.expected();
    const double ratio =
        help ? alone_.expected() / helped_.expected() : helped_.expected() / alone_.expected();
    if (++calls_ < kCallsBetweenTrials * ratio * ratio) return help;
    calls_ = 0;
    return !help;
  }
  void learn(bool helped, double seconds) { (helped ? helped_ : alone_).add(seconds); }

 private:
  static constexpr int kTrials = 3;
  static constexpr double kCallsBetweenTrials = 32.0;

  // A mean and a mean deviation that forget. To be late now and then counts as much as to be late
  // always: somebody waits for the slowest of many.
  struct Times {
    double mean = 0.0, deviation = 0.0;
    int samples = 0;

    void add(double seconds) {
      samples += samples < kMemory;
      const double off = seconds - mean;
      mean += off / samples;
      if (samples > 1) deviation += (std::abs(off) - deviation) / samples;
    }
    double expected() const { return mean + deviation; }

    static constexpr int kMemory = 8;
  };

  Times alone_, helped_;
  double calls_ = 0.0;
};

// Of one place in the code: by who would help and by the size of the work, to a power of two.
class Experiences {
 public:
  static constexpr std::int64_t kLeast = std::int64_t{512} << 10, kMost = std::int64_t{32} << 20;

  // For less nobody is woken; to more help always pays.
  static bool is_open(std::int64_t bytes) { return bytes >= kLeast && bytes < kMost; }

  Experience& of(Helpers helpers, std::int64_t bytes, int threads) {
    if (threads_ != threads) *this = {};
    threads_ = threads;
    const auto size = std::bit_width(static_cast<std::uint64_t>(bytes / kLeast)) - 1;
    return kinds_[static_cast<std::size_t>(helpers)][static_cast<std::size_t>(size)];
  }

 private:
  static constexpr std::size_t kSizes =
      std::bit_width(static_cast<std::uint64_t>(kMost / kLeast)) - 1;
  int threads_ = 0;
  std::array<std::array<Experience, kSizes>, 3> kinds_;
};

}  // namespace gradclip::cpu
