#include "cpu/team.hpp"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/float_environment.hpp"

namespace gradclip::cpu::team {
namespace {

// A helper looks for work this long before it sleeps: the two passes of one clip find it awake.
// Waking a sleeping thread takes 5 to 50 us, on a virtual machine 80 to 130.
constexpr auto kSpinTime = std::chrono::microseconds(100);

constexpr int kSpinsBeforeYield = 1000;  // about 20 us

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

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

  bool is_awake(int threads) {
    std::lock_guard lock(mutex_);
    return static_cast<int>(helpers_.size()) - sleeping_ >= threads - 1;
  }

  int started() {
    std::lock_guard lock(mutex_);
    return static_cast<int>(helpers_.size());
  }

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

  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> helpers_;
  const Work* work_ = nullptr;
  int wanted_ = 0, joined_ = 0;
  int sleeping_ = 0;
  int called_ = 0;  // those of them who were called and have not got up yet
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<int> active_{0};
};

// Never destroyed: helpers sleep in it until the process ends. Null in the child of a fork, where
// the helpers do not exist.
std::atomic<Team*> the_team{nullptr};

Team* team() {
  static std::once_flag once;
  std::call_once(once, [] {
    the_team = new Team;
    pthread_atfork(nullptr, nullptr, [] { the_team = nullptr; });
  });
  return the_team.load();
}

}  // namespace

void run(int threads, const Work& work) {
  Team* const helpers = team();
  helpers ? helpers->run(threads, work) : work(0);
}

bool is_awake(int threads) {
  Team* const helpers = the_team.load();
  return helpers && helpers->is_awake(threads);
}

int num_started() {
  Team* const helpers = the_team.load();
  return helpers ? helpers->started() : 0;
}

}  // namespace gradclip::cpu::team
