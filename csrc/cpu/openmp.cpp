#include "cpu/openmp.hpp"

#include <dlfcn.h>
#include <pthread.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cpu/float_environment.hpp"

namespace gradclip::cpu::openmp {
namespace {

// The part of an OpenMP runtime that is used: GNU's, and others that speak its language.
// https://gcc.gnu.org/onlinedocs/libgomp/Implementing-PARALLEL-construct.html
struct Runtime {
  // 0 threads: as many as the calling thread's operations have, so that the team stays as it is.
  void (*parallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread_number)();
  int (*max_threads)();
  int (*in_parallel)();
};

// Null before PyTorch is found, and in the child of a fork: the team's threads do not exist there.
std::atomic<const Runtime*> the_runtime{nullptr};

const Runtime* load() {
  // By name only if it is loaded: then this is another reference to it, for good. What PyTorch's own
  // calls find is found by looking where it looks: a process may have several OpenMP runtimes.
  void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (!torch) return nullptr;
  static Runtime found;
  const auto look_up = [torch](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(torch, name));
    return function != nullptr;
  };
  const bool has_all = look_up(found.parallel, "GOMP_parallel") &&
                       look_up(found.thread_number, "omp_get_thread_num") &&
                       look_up(found.max_threads, "omp_get_max_threads") &&
                       look_up(found.in_parallel, "omp_in_parallel");
  return has_all ? &found : nullptr;
}

// To look at a team is to make it, if it is not there: for the first threads that call, of which the one
// that trains is one, and not for every thread of a pool.
constexpr int kMostTeams = 2;
std::atomic<int> teams{0};

// Every thread that calls has a team of its own.
struct BorrowedTeam {
  int threads = 0;                // with which it was looked at last
  std::vector<clockid_t> clocks;  // the processor time of its other threads
  int calls_until_look = 0;
  bool is_one_of_few = teams.fetch_add(1) < kMostTeams;

  BorrowedTeam() = default;
  BorrowedTeam(const BorrowedTeam&) = delete;
  BorrowedTeam& operator=(const BorrowedTeam&) = delete;
  ~BorrowedTeam() { --teams; }
};
thread_local BorrowedTeam the_team;

std::int64_t nanoseconds(clockid_t clock) {
  timespec time;
  if (clock_gettime(clock, &time) != 0) return -1;  // the thread has ended
  return std::int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

// To look wakes the team: now and then, for one that was never seen, or has ended since.
constexpr int kCallsBetweenLooks = 64;

void look(const Runtime& runtime, BorrowedTeam& team) {
  team.threads = runtime.max_threads();
  team.clocks.clear();
  team.calls_until_look = kCallsBetweenLooks;
  std::vector<clockid_t> clocks(static_cast<std::size_t>(std::max(team.threads, 1)), clockid_t{});
  struct Seen {
    const Runtime& runtime;
    std::vector<clockid_t>& clocks;
    std::atomic<std::size_t> threads;
  } seen{runtime, clocks, 1};
  runtime.parallel(
      [](void* data) {
        auto& to = *static_cast<Seen*>(data);
        const auto thread = static_cast<std::size_t>(to.runtime.thread_number());
        if (thread == 0 || thread >= to.clocks.size()) return;
#if defined(__linux__)  // macOS has no such clock: nobody is borrowed there
        if (pthread_getcpuclockid(pthread_self(), &to.clocks[thread]) == 0) ++to.threads;
#endif
      },
      &seen, 0, 0);
  if (seen.threads != clocks.size()) return;  // not all came: dynamic, or nested
  team.clocks.assign(clocks.begin() + 1, clocks.end());
}

}  // namespace

void find() {
  static const bool once = [] {
    the_runtime = load();
    if (the_runtime.load()) pthread_atfork(nullptr, nullptr, [] { the_runtime = nullptr; });
    return true;
  }();
  static_cast<void>(once);
}

bool is_awake(int threads) {
  const Runtime* const runtime = the_runtime;
  if (!runtime || runtime->in_parallel()) return false;
  const int has = runtime->max_threads();
  if (has == 1 || 2 * has < threads) return false;
  BorrowedTeam& team = the_team;
  if (team.threads != has || team.clocks.empty()) {
    if (!team.is_one_of_few || --team.calls_until_look > 0) return false;
    look(*runtime, team);
    if (team.clocks.empty()) return false;
  }
  // One that sleeps now would be waited for. The last and the first: a team is woken as a whole.
  for (const clockid_t clock : {team.clocks.back(), team.clocks.front()}) {
    const std::int64_t before = nanoseconds(clock);
    if (before < 0) {
      team.clocks.clear();
      return false;
    }
    if (nanoseconds(clock) == before) return false;
    if (team.clocks.size() == 1) break;
  }
  return true;
}

void run(const Work& work) {
  struct Call {
    const Runtime& runtime;
    const Work& work;
  } call{*the_runtime, work};
  call.runtime.parallel(
      [](void* data) {
        const auto& to = *static_cast<const Call*>(data);
        const DefaultFloatEnvironment environment;
        to.work(to.runtime.thread_number());
      },
      &call, 0, 0);
}

}  // namespace gradclip::cpu::openmp
