// cpu/workers.hpp, team.hpp, pool.hpp, thread_count.hpp: every task once, whoever calls, however often, also in the child of a fork.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/experience.hpp"
#include "cpu/pool.hpp"
#include "cpu/team.hpp"
#include "cpu/thread_count.hpp"
#include "cpu/workers.hpp"
#include "support.hpp"

using namespace gradclip;
using namespace gradclip::test;
using cpu::Experience;
using cpu::Experiences;
using cpu::Helpers;
using cpu::Pass;
using cpu::run_tasks;

namespace {

// Whether every one of `tasks` tasks ran once.
bool each_ran_once(std::size_t tasks, int threads, Pass pass = Pass::forward) {
  std::vector<std::atomic<int>> ran(tasks);
  run_tasks(tasks, threads, pass, [&](std::size_t task) { ++ran[task]; });
  return std::all_of(ran.begin(), ran.end(), [](const auto& count) { return count == 1; });
}

std::vector<std::size_t> order_alone(std::size_t tasks, Pass pass) {
  std::vector<std::size_t> order;
  run_tasks(tasks, 1, pass, [&](std::size_t task) { order.push_back(task); });
  return order;
}

// Threads of somebody else, that run what they are given in order.
class Threads final : public cpu::Pool {
 public:
  explicit Threads(int threads) : threads_(threads) {}
  int threads() const override { return threads_; }
  void schedule(std::function<void()> task) override {
    ++scheduled;
    running_.emplace_back(std::move(task));
  }
  int scheduled = 0;

 private:
  int threads_;
  std::vector<std::jthread> running_;
};

// A pool that is full: what it is given runs when everything is over.
class Late final : public cpu::Pool {
 public:
  int threads() const override { return 4; }
  void schedule(std::function<void()> task) override { tasks_.push_back(std::move(task)); }
  std::size_t run_all() {
    for (const auto& task : tasks_) task();
    return tasks_.size();
  }

 private:
  std::vector<std::function<void()>> tasks_;
};

}  // namespace

// First, while no helper has been started.
TEST_CASE("small work starts no thread") {
  cpu::set_num_threads(8);
  const cpu::ChunkPlan small =
      cpu::make_plan(std::vector<std::int64_t>{2 * cpu::kBytesPerThread - 1});
  cpu::for_each_chunk(small, Pass::forward, [](const cpu::Chunk&) {});
  CHECK(each_ran_once(1, 8));
  CHECK(each_ran_once(100, 1));
  CHECK(cpu::team::num_started() == 0);
}

TEST_CASE("a pool helps in place of the team") {
  for (int call = 0; call < (kSanitized ? 50 : 500); ++call) {
    Threads pool(3);
    const cpu::PoolScope scope(pool);
    CHECK(each_ran_once(100, 8));
    CHECK(pool.scheduled == 3);  // and the calling thread
    CHECK(each_ran_once(1, 8));
    CHECK(each_ran_once(100, 1));
    CHECK(pool.scheduled == 3);
  }
  CHECK(cpu::team::num_started() == 0);
}

TEST_CASE("a pool that is full is not waited for, and comes too late") {
  Late pool;
  {
    const cpu::PoolScope scope(pool);
    CHECK(each_ran_once(100, 8));
  }
  CHECK(pool.run_all() == 4);
}

TEST_CASE("a pool's scope is that of its thread, and ends") {
  Threads outer(1), inner(1);
  CHECK(cpu::PoolScope::current() == nullptr);
  {
    const cpu::PoolScope first(outer);
    {
      const cpu::PoolScope second(inner);
      CHECK(cpu::PoolScope::current() == &inner);
      std::jthread([] { CHECK(cpu::PoolScope::current() == nullptr); });
    }
    CHECK(cpu::PoolScope::current() == &outer);
  }
  CHECK(cpu::PoolScope::current() == nullptr);
}

TEST_CASE("every task runs once, for any number of tasks and threads") {
  for (const int threads : {1, 2, 3, 5, 8})
    for (const std::size_t tasks : {0u, 1u, 2u, 3u, 7u, 8u, 9u, 64u, 1000u})
      for (const Pass pass : {Pass::forward, Pass::backward})
        CHECK(each_ran_once(tasks, threads, pass));
  CHECK(cpu::team::num_started() >= 1);
  CHECK(cpu::team::num_started() <= 7);
}

TEST_CASE("a thread alone goes in order, forward or backward") {
  std::vector<std::size_t> forward(10);
  std::iota(forward.begin(), forward.end(), 0u);
  CHECK(order_alone(10, Pass::forward) == forward);
  CHECK(order_alone(10, Pass::backward) == std::vector(forward.rbegin(), forward.rend()));
}

TEST_CASE("calls that follow each other closely do not mix") {
  for (int call = 0; call < (kSanitized ? 500 : 5000); ++call)
    if (!each_ran_once(static_cast<std::size_t>(1 + call % 40), 1 + call % 4)) FAIL_CHECK(call);
}

TEST_CASE("calls from many threads at once") {
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 8; ++caller)
    callers.emplace_back([&] {
      for (int call = 0; call < 200; ++call) wrong += !each_ran_once(50, 4);
    });
  for (std::thread& caller : callers) caller.join();
  CHECK(wrong == 0);
}

TEST_CASE("what a task wrote is seen by the caller") {
  std::vector<std::size_t> plain(10000);
  for (int call = 0; call < 50; ++call) {
    run_tasks(plain.size(), 4, Pass::forward, [&](std::size_t task) { plain[task] += task; });
    const std::size_t sum = std::accumulate(plain.begin(), plain.end(), std::size_t{0});
    CHECK(sum == (static_cast<std::size_t>(call) + 1) * plain.size() * (plain.size() - 1) / 2);
  }
}

TEST_CASE("a task may run tasks") {
  std::atomic<int> inner{0};
  run_tasks(20, 4, Pass::forward,
            [&](std::size_t) { run_tasks(10, 4, Pass::forward, [&](std::size_t) { ++inner; }); });
  CHECK(inner == 200);
}

TEST_CASE("the child of a fork works alone") {
  CHECK(each_ran_once(100, 4));  // the team exists
  for (int fork_number = 0; fork_number < 5; ++fork_number) {
    const pid_t child = fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      alarm(250);  // a hang ends as a failure
      _exit(each_ran_once(100, 4) && cpu::team::num_started() == 0 ? 0 : 1);
    }
    int status = 0;
    REQUIRE(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
    CHECK(each_ran_once(100, 4));  // and the parent is as it was
  }
}

namespace {

// How many of `calls` calls have help, where calls take so long.
template <class Seconds>
int helped(Experience& experience, int calls, Seconds seconds) {
  int count = 0;
  for (int call = 0; call < calls; ++call) {
    const bool help = experience.chooses_help();
    experience.learn(help, seconds(help, call));
    count += help;
  }
  return count;
}

}  // namespace

TEST_CASE("help is taken where it has paid, and the other way is tried now and then") {
  Experience pays, does_not, is_equal;
  const int tried = helped(pays, 1000, [](bool help, int) { return help ? 1.0 : 1.2; });
  CHECK(tried > 950);
  CHECK(tried < 1000 - 3 - 10);
  const int rare = helped(does_not, 1000, [](bool help, int) { return help ? 2.0 : 1.0; });
  CHECK(rare >= 3 + 4);
  CHECK(rare <= 3 + 1000 / (32 * 2));
  CHECK(helped(is_equal, 1000, [](bool, int) { return 1.0; }) > 950);
}

TEST_CASE("help that is late now and then does not pay, however fast it is else") {
  Experience experience;
  const auto seconds = [](bool help, int call) { return !help ? 1.0 : call % 4 == 0 ? 3.0 : 0.7; };
  helped(experience, 100, seconds);
  CHECK(helped(experience, 1000, seconds) < 100);
}

TEST_CASE("of seven calls one that was disturbed does not count, two do") {
  const auto helps_after = [](int disturbed) {
    Experience experience;
    for (int call = 0; call < 7; ++call) {
      experience.learn(true, 2.0);
      experience.learn(false, call < disturbed ? 100.0 : 1.0);
    }
    return experience.chooses_help();
  };
  CHECK_FALSE(helps_after(1));
  CHECK(helps_after(2));
}

TEST_CASE("what was learned is unlearned when the machine changes") {
  Experience experience;
  helped(experience, 100, [](bool help, int) { return help ? 2.0 : 1.0; });
  helped(experience, 2000, [](bool help, int) { return help ? 0.5 : 1.0; });
  CHECK(helped(experience, 1000, [](bool help, int) { return help ? 0.5 : 1.0; }) > 950);
}

TEST_CASE("each kind of call learns for itself, and anew for another number of threads") {
  Experiences experiences;
  constexpr std::int64_t kLeast = Experiences::kLeast, kMost = Experiences::kMost;
  CHECK(!Experiences::is_open(kLeast - 1));
  CHECK(!Experiences::is_open(kMost));
  std::vector<Experience*> kinds;
  for (const Helpers helpers : {Helpers::asleep, Helpers::awake, Helpers::borrowed})
    for (std::int64_t bytes = kLeast; bytes < kMost; bytes *= 2) {
      kinds.push_back(&experiences.of(helpers, bytes, 4));
      CHECK(&experiences.of(helpers, 2 * bytes - 1, 4) == kinds.back());
    }
  std::sort(kinds.begin(), kinds.end());
  CHECK(std::adjacent_find(kinds.begin(), kinds.end()) == kinds.end());
  const auto slow_help = [](bool help, int) { return help ? 2.0 : 1.0; };
  helped(experiences.of(Helpers::awake, kLeast, 4), 100, slow_help);
  CHECK(!experiences.of(Helpers::awake, kLeast, 4).chooses_help());
  CHECK(experiences.of(Helpers::awake, kLeast, 3).chooses_help());
}

TEST_CASE("calls of several sizes by turns learn, too, though they are worth several threads") {
  cpu::set_num_threads(4);
  Experiences experiences;
  std::string seen;
  for (int call = 0; call < 20; ++call)
    for (const int threads : {2, 4}) {
      run_tasks(
          64, threads, Pass::forward, [](std::size_t) {}, threads * Experiences::kLeast,
          &experiences);
      seen += cpu::helpers_of_last_call();
    }
  CHECK(seen.find("team") != std::string::npos);
  CHECK(seen.find("none") != std::string::npos);
}

TEST_CASE("the number of threads is checked and kept") {
  cpu::set_num_threads(3);
  CHECK(cpu::num_threads() == 3);
  for (const int n : {0, -1, 1025}) CHECK_THROWS_AS(cpu::set_num_threads(n), std::invalid_argument);
  CHECK(cpu::num_threads() == 3);
}

TEST_CASE("the environment gives the number of threads") {
  const auto threads_for = [](const char* own, const char* openmp) {
    own ? setenv("GRADCLIP_NUM_THREADS", own, 1) : unsetenv("GRADCLIP_NUM_THREADS");
    openmp ? setenv("OMP_NUM_THREADS", openmp, 1) : unsetenv("OMP_NUM_THREADS");
    cpu::init_num_threads();
    return cpu::num_threads();
  };
  CHECK(threads_for("3", "5") == 3);
  CHECK(threads_for(nullptr, "5") == 5);
  CHECK(threads_for(nullptr, "4,2") == 4);
  CHECK(threads_for(nullptr, " 4 , 2") == 4);
  // Set to nothing is as good as unset, and blanks do not count.
  CHECK(threads_for("", "5") == 5);
  CHECK(threads_for(" \t", "5") == 5);
  CHECK(threads_for(" 3\n", "5") == 3);
  const int processors = threads_for(nullptr, nullptr);
  CHECK(processors >= 1);
  CHECK(threads_for(nullptr, "many") == processors);
  for (const char* wrong : {"0", "-2", "four", "3,2", "2000"}) {
    CAPTURE(wrong);
    CHECK_THROWS_AS(threads_for(wrong, nullptr), std::invalid_argument);
  }
  threads_for(nullptr, nullptr);
}
