#include "cpu/thread_count.hpp"

#include <sched.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>

#include "cpu/environment.hpp"

namespace gradclip::cpu {
namespace {

constexpr int kMaxThreads = 1024;

int allowed_processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned n = std::thread::hardware_concurrency();
  return n == 0 ? 1 : static_cast<int>(n);
}

// A thread count in `text`, or 0 if it is none. OpenMP allows a list, one count per nesting level:
// the first one counts.
int parse_threads(const std::string& text, bool may_be_list) {
  char* end = nullptr;
  const long n = std::strtol(text.c_str(), &end, 10);
  if (end == text.c_str() || n < 1 || n > kMaxThreads) return 0;
  while (may_be_list && *end == ' ') ++end;
  return *end == '\0' || (may_be_list && *end == ',') ? static_cast<int>(n) : 0;
}

int threads_from_environment() {
  if (const auto own = from_environment("GRADCLIP_NUM_THREADS")) {
    const int n = parse_threads(*own, false);
    if (n == 0)
      throw std::invalid_argument("GRADCLIP_NUM_THREADS: expected a number from 1 to 1024, got '" +
                                  *own + "'");
    return n;
  }
  if (const auto openmp = from_environment("OMP_NUM_THREADS"))
    if (const int n = parse_threads(*openmp, true)) return n;
  return allowed_processors();
}

std::atomic<int> chosen_threads{0};

}  // namespace

void init_num_threads() { chosen_threads = threads_from_environment(); }
int num_threads() { return chosen_threads; }

void set_num_threads(int n) {
  if (n < 1 || n > kMaxThreads)
    throw std::invalid_argument("n: expected a number of threads from 1 to 1024, got " +
                                std::to_string(n));
  chosen_threads = n;
}

}  // namespace gradclip::cpu
