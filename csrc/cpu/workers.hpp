// Who runs the chunks of a plan: the calling thread, with the help of our team, of a borrowed one, or of a pool.
// What they compute does not depend on it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>

#include "cpu/experience.hpp"
#include "cpu/plan.hpp"
#include "cpu/thread_count.hpp"

namespace gradclip::cpu {

// A thread must have this much to do to be worth waking: 256 KB take about 5 us from L2 and 15 us
// from memory, a helper that is awake comes within 1 us.
inline constexpr std::int64_t kBytesPerThread = 256 * 1024;

// Backward: each thread takes its tasks from the last to the first, so that a second pass over memory
// begins with what the first pass left in the cache.
enum class Pass { forward, backward };

// Call work(task) once for every task in [0, tasks), on the calling thread and at most threads - 1
// others. Each thread begins with a share of its own, of neighbouring tasks, and then helps with the
// others' shares. Work must not throw. One call at a time has helpers; a call that finds them taken
// works alone. With `experiences` of so many bytes of this work: so does a call that is better off. (In a
// PoolScope neither holds: the pool knows how to share.)
void run_tasks(std::size_t tasks, int threads, Pass pass,
               const std::function<void(std::size_t)>& work, std::int64_t bytes = 0,
               Experiences* experiences = nullptr);

// Call work(chunk) for every chunk of the plan, by as many threads as it is worth.
template <class Work>
void for_each_chunk(const ChunkPlan& plan, Pass pass, Work work) {
  static Experiences experiences;  // of this kind of work
  const std::int64_t worth = std::max<std::int64_t>(1, plan.total_bytes / kBytesPerThread);
  const int threads = static_cast<int>(std::min<std::int64_t>(num_threads(), worth));
  const auto run_task = [&](std::size_t task) {
    for (std::size_t c = plan.task_begin[task]; c < plan.task_begin[task + 1]; ++c)
      work(plan.chunks[c]);
  };
  run_tasks(plan.tasks(), threads, pass, run_task, plan.total_bytes, &experiences);
}

// Of the last call whose work was neither so little nor so much that experience does not count:
// "none", "team" or "openmp".
const char* helpers_of_last_call();

}  // namespace gradclip::cpu
