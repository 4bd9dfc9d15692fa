// Our own team: threads that sleep until a call has work for them.
//
// The caller never waits for a helper to wake up: it begins at once and takes tasks until none is
// left; a helper that comes in time takes some of them. Only helpers that have begun are waited for.
#pragma once

#include <functional>

namespace gradclip::cpu {

// What one thread does; thread 0 is the calling one.
using Work = std::function<void(int thread)>;

namespace team {

// Run work(0) here and work(1 ...) on those of `threads - 1` helpers that come before it is over. For
// one call at a time. Starts helpers that do not exist yet; where that fails, fewer help.
void run(int threads, const Work& work);

// Whether so many threads would run at once: helpers look for work for a while before they sleep.
bool is_awake(int threads);

// Helpers started so far in this process: 0 in the child of a fork, where they are gone and work(0)
// is all that runs.
int num_started();

}  // namespace team
}  // namespace gradclip::cpu
