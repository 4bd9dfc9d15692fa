// How the chunks of a plan are spread over threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/plan.hpp"
#include "cpu/team.hpp"

namespace gradclip::cpu {

// A thread must have this much to do to be worth waking: 256 KB take about 5 us from L2 and 15 us
// from memory, a helper that is awake comes within 1 us.
inline constexpr std::int64_t kBytesPerThread = 256 * 1024;

enum class Pass { forward, backward };

// Call work(chunk) for every chunk of the plan, by as many threads as it is worth.
template <class Work>
void for_each_chunk(const Plan& plan, Pass pass, Work work) {
  const std::int64_t worth = std::max<std::int64_t>(1, plan.total_bytes / kBytesPerThread);
  const int threads = static_cast<int>(std::min<std::int64_t>(num_threads(), worth));
  run_tasks(plan.tasks(), threads, pass == Pass::backward, [&](std::size_t task) {
    for (std::size_t c = plan.task_begin[task]; c < plan.task_begin[task + 1]; ++c)
      work(plan.chunks[c]);
  });
}

}  // namespace gradclip::cpu
