#include "cpu/team.hpp"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu/environment.hpp"
#include "cpu/float_environment.hpp"

namespace gradclip::cpu {
namespace {

constexpr int kMaxThreads = 1024;
// A helper looks for work this long before it sleeps: the two passes of one clip find it awake, and
// so does a call that has announced itself. Waking a sleeping thread takes 5 to 50 us.
constexpr auto kSpinTime = std::chrono::microseconds(100);

constexpr int kSpinsBeforeYield = 1000;  // about 20 us

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

using Work = std::function<void(int thread)>;

class Team {
 public:
  // Run work(0) here and work(1 ...) on helpers that come before it is over.
  void run(int threads, const Work& work) {
    int called;
    {
      std::lock_guard lock(mutex_);
      while (static_cast<int>(helpers_.size()) < threads - 1 && start_helper()) {
      }
      work_ = &work;
      joined_ = 0;
      wanted_ = threads - 1;
      generation_.fetch_add(1, std::memory_order_release);
      called = call_up(threads - 1);
    }
    wake(called);
    work(0);
    {
      std::lock_guard lock(mutex_);
      work_ = nullptr;  // nobody may begin now
    }
    // What is left is the end of a task, tens of microseconds: too short to sleep. But a helper that
    // has lost its processor may be waiting for this one.
    for (int spins = 0; active_.load(std::memory_order_acquire) != 0; ++spins)
      spins < kSpinsBeforeYield ? pause() : std::this_thread::yield();
  }

  // Let `count` helpers look for work for a while.
  void alert(int count) {
    if (sleeping_.load(std::memory_order_relaxed) == 0) return;
    int called;
    {
      std::lock_guard lock(mutex_);
      called = call_up(count);
    }
    wake(called);
  }

  int started() {
    std::lock_guard lock(mutex_);
    return static_cast<int>(helpers_.size());
  }

  // The right to use the team, which one call at a time has.
  class Use {
   public:
    explicit Use(Team& team)
        : busy_(team.busy_), mine_(!busy_.test_and_set(std::memory_order_acquire)) {}
    ~Use() {
      if (mine_) busy_.clear(std::memory_order_release);
    }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;
    explicit operator bool() const { return mine_; }

   private:
    std::atomic_flag& busy_;
    bool mine_;
  };

 private:
  // How many have to wake so that `count` are awake: no more, for each takes the caller a microsecond.
  int call_up(int count) {
    const int asleep = sleeping_ - called_, awake = static_cast<int>(helpers_.size()) - asleep;
    const int more = std::clamp(count - awake, 0, asleep);
    called_ += more;
    return more;
  }
  void wake(int count) {
    for (int i = 0; i < count; ++i) wake_.notify_one();
  }

  bool start_helper() {
    // Signals are for the program's own threads: a helper that took one would take it with whatever
    // mask the first large call happened to have.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const bool started = try_start_helper();
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return started;
  }

  bool try_start_helper() {
    try {
      helpers_.emplace_back([this] { help(); });
      helpers_.back().detach();  // they sleep until the process ends
      return true;
    } catch (const std::exception&) {
      return false;  // no thread, or no memory for one: fewer help
    }
  }

  void help() {
    std::uint64_t seen = 0;
    for (;;) {
      wait_for_change(seen);
      const Work* work = nullptr;
      int thread = 0;
      {
        std::lock_guard lock(mutex_);
        seen = generation_.load(std::memory_order_relaxed);
        if (work_ && joined_ < wanted_) {
          work = work_;
          thread = ++joined_;
          active_.fetch_add(1, std::memory_order_relaxed);
        }
      }
      if (!work) continue;
      const DefaultFloatEnvironment environment;
      (*work)(thread);
      active_.fetch_sub(1, std::memory_order_release);
    }
  }

  void wait_for_change(std::uint64_t seen) {
    const auto changed = [&] { return generation_.load(std::memory_order_acquire) != seen; };
    while (!happens_soon(changed)) {
      std::unique_lock lock(mutex_);
      ++sleeping_;
      wake_.wait(lock, [&] { return called_ > 0 || changed(); });
      --sleeping_;
      if (called_ > 0) --called_;
    }
  }

  template <class Condition>
  static bool happens_soon(Condition condition) {
    const auto until = std::chrono::steady_clock::now() + kSpinTime;
    do {
      for (int i = 0; i < 32; ++i) {
        if (condition()) return true;
        pause();
      }
      std::this_thread::yield();  // costs little where nobody else wants the processor
    } while (std::chrono::steady_clock::now() < until);
    return false;
  }

  std::atomic_flag busy_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> helpers_;
  const Work* work_ = nullptr;
  int wanted_ = 0, joined_ = 0;
  std::atomic<int> sleeping_{0};
  int called_ = 0;  // those of them who were called and have not got up yet
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<int> active_{0};
};

// Never destroyed: helpers sleep in it until the process ends. Null in the child of a fork, where
// the helpers do not exist: work is serial there.
std::atomic<Team*> the_team{nullptr};

Team* team() {
  static std::once_flag once;
  std::call_once(once, [] {
    the_team = new Team;
    pthread_atfork(nullptr, nullptr, [] { the_team = nullptr; });
  });
  return the_team.load();
}

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
std::atomic<int> helpers_of_last_call{0};

struct alignas(64) Share {
  std::atomic<std::size_t> taken{0};
  std::size_t begin = 0, size = 0;
};

}  // namespace

void init_num_threads() { chosen_threads = threads_from_environment(); }
int num_threads() { return chosen_threads; }

void set_num_threads(int n) {
  if (n < 1 || n > kMaxThreads)
    throw std::invalid_argument("n: expected a number of threads from 1 to 1024, got " +
                                std::to_string(n));
  chosen_threads = n;
}

int num_started_threads() {
  Team* const helpers = the_team.load();
  return helpers ? helpers->started() : 0;
}

void expect_call() {
  const int count = helpers_of_last_call.load(std::memory_order_relaxed);
  Team* const helpers = the_team.load();
  if (count > 0 && helpers) helpers->alert(count);
}

void run_tasks(std::size_t tasks, int threads, bool last_first,
               const std::function<void(std::size_t)>& work) {
  const DefaultFloatEnvironment environment;
  const auto alone = [&] {
    for (std::size_t i = 0; i < tasks; ++i) work(last_first ? tasks - 1 - i : i);
  };
  if (static_cast<std::size_t>(threads) > tasks) threads = static_cast<int>(tasks);
  helpers_of_last_call.store(threads - 1, std::memory_order_relaxed);
  if (threads <= 1) return alone();
  Team* const helpers = team();
  if (!helpers) return alone();

  const auto shares = static_cast<std::size_t>(threads);
  const auto share = std::make_unique<Share[]>(shares);
  for (std::size_t s = 0; s < shares; ++s) {
    share[s].begin = tasks * s / shares;
    share[s].size = tasks * (s + 1) / shares - share[s].begin;
  }
  const Team::Use use(*helpers);
  if (!use) return alone();
  helpers->run(threads, [&](int thread) {
    for (std::size_t s = 0; s < shares; ++s) {
      Share& mine = share[(static_cast<std::size_t>(thread) + s) % shares];
      for (;;) {
        const std::size_t i = mine.taken.fetch_add(1, std::memory_order_relaxed);
        if (i >= mine.size) break;
        work(mine.begin + (last_first ? mine.size - 1 - i : i));
      }
    }
  });
}

}  // namespace gradclip::cpu
