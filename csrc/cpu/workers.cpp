#include "cpu/workers.hpp"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <memory>

#include "cpu/float_environment.hpp"
#include "cpu/openmp.hpp"
#include "cpu/pool.hpp"
#include "cpu/team.hpp"

namespace gradclip::cpu {
namespace {

// The right to have helpers, which one call at a time has. What the caller of a fork had taken is
// free in the child.
class Turn {
 public:
  Turn() : is_mine_(!taken().test_and_set(std::memory_order_acquire)) {}
  ~Turn() {
    if (is_mine_) taken().clear(std::memory_order_release);
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  explicit operator bool() const { return is_mine_; }

 private:
  static std::atomic_flag& taken() {
    static std::atomic_flag flag;
    static const bool once = [] {
      pthread_atfork(nullptr, nullptr, [] { flag.clear(); });
      return true;
    }();
    static_cast<void>(once);
    return flag;
  }
  bool is_mine_;
};

struct alignas(64) Share {
  std::atomic<std::size_t> taken{0};
  std::size_t begin = 0, size = 0;
};

using Task = std::function<void(std::size_t)>;

std::atomic<const char*> the_helpers_of_last_call{"none"};

void run_alone(std::size_t tasks, Pass pass, const Task& work) {
  for (std::size_t i = 0; i < tasks; ++i) work(pass == Pass::backward ? tasks - 1 - i : i);
}

// `run` calls what it is given with the numbers of threads, 0 on the calling one.
template <class Run>
void share_out(std::size_t tasks, int threads, Pass pass, const Task& work, Run run) {
  const auto shares = static_cast<std::size_t>(threads);
  const auto share = std::make_unique<Share[]>(shares);
  for (std::size_t s = 0; s < shares; ++s) {
    share[s].begin = tasks * s / shares;
    share[s].size = tasks * (s + 1) / shares - share[s].begin;
  }
  run([&](int thread) {
    if (thread >= threads) return;  // of a borrowed team, which may be larger
    for (std::size_t s = 0; s < shares; ++s) {
      Share& mine = share[(static_cast<std::size_t>(thread) + s) % shares];
      for (;;) {
        const std::size_t i = mine.taken.fetch_add(1, std::memory_order_relaxed);
        if (i >= mine.size) break;
        work(mine.begin + (pass == Pass::backward ? mine.size - 1 - i : i));
      }
    }
  });
}

void run_helped(std::size_t tasks, int threads, Pass pass, Helpers helpers, const Task& work) {
  share_out(tasks, threads, pass, work, [&](const Work& run_thread) {
    helpers == Helpers::borrowed ? openmp::run(run_thread) : team::run(threads, run_thread);
  });
}

Helpers best_helpers(int threads) {
  if (openmp::is_awake(threads)) return Helpers::borrowed;
  return team::is_awake(threads) ? Helpers::awake : Helpers::asleep;
}

}  // namespace

void run_tasks(std::size_t tasks, int threads, Pass pass, const Task& work, std::int64_t bytes,
               Experiences* experiences) {
  const DefaultFloatEnvironment environment;
  threads = static_cast<int>(std::min(static_cast<std::size_t>(threads), tasks));
  if (threads <= 1) return run_alone(tasks, pass, work);
  if (Pool* const pool = PoolScope::current()) {
    threads = std::min(threads, pool->threads() + 1);  // this one may be none of its own
    return share_out(tasks, threads, pass, work,
                     [&](const Work& run_thread) { pool::run(*pool, threads, run_thread); });
  }
  const Turn turn;
  if (!turn) return run_alone(tasks, pass, work);
  const Helpers helpers = best_helpers(threads);
  if (!experiences || !Experiences::is_open(bytes)) {
    return run_helped(tasks, threads, pass, helpers, work);
  }
  // To start a thread is not what the next call pays for.
  const bool is_first = helpers == Helpers::asleep && team::num_started() < threads - 1;
  Experience& experience = experiences->of(helpers, bytes, num_threads());
  const bool help = experience.chooses_help();
  using Clock = std::chrono::steady_clock;
  const Clock::time_point start = Clock::now();
  help ? run_helped(tasks, threads, pass, helpers, work) : run_alone(tasks, pass, work);
  if (!help || !is_first)
    experience.learn(help, std::chrono::duration<double>(Clock::now() - start).count());
  the_helpers_of_last_call = !help ? "none" : helpers == Helpers::borrowed ? "openmp" : "team";
}

const char* helpers_of_last_call() { return the_helpers_of_last_call; }

}  // namespace gradclip::cpu
