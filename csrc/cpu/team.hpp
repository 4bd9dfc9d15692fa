// A team of threads that helps the calling thread.
//
// The caller never waits for a helper to wake up: it begins at once and takes tasks until none is
// left; a helper that comes in time takes some of them. Only helpers that have begun are waited for.
// One call at a time has the team; a call that finds it busy (or runs in the child of a fork, where
// the threads are gone) works alone.
#pragma once

#include <cstddef>
#include <functional>

namespace gradclip::cpu {

// How many threads a call may use, the calling thread included. Default: GRADCLIP_NUM_THREADS, else
// OMP_NUM_THREADS, else the processors in the affinity mask.
int num_threads();
// Throws std::invalid_argument outside 1 ... 1024.
void set_num_threads(int n);
// Reads the environment now; throws std::invalid_argument for a GRADCLIP_NUM_THREADS that is no
// number. To be called once, early, so that a mistake is reported early.
void init_num_threads();
// Helpers started so far in this process.
int num_started_threads();

// A call may come in some microseconds: where the last one had helpers, they wake up meanwhile.
void expect_call();

// Call work(task) once for every task in [0, tasks), on the calling thread and at most threads - 1
// helpers. Each thread begins with a share of its own, of neighbouring tasks, and then helps with the
// others' shares. Work must not throw.
// `last_first`: each thread takes its tasks from the last to the first, so that a second pass over
// memory begins with what the first pass left in the cache.
void run_tasks(std::size_t tasks, int threads, bool last_first,
               const std::function<void(std::size_t)>& work);

}  // namespace gradclip::cpu
