// The OpenMP team that PyTorch keeps in this process, borrowed.
//
// After each parallel operation its threads go on looking for work for some milliseconds. To them a
// call costs a microsecond, where our own helpers would have to wake up on processors that are taken.
// The one who calls waits for all of them: so the team is borrowed only while it is seen to run.
#pragma once

#include "cpu/team.hpp"

namespace gradclip::cpu::openmp {

// Look for the team, once PyTorch is loaded; to be called when the first tensor has been read.
void find();

// Whether the calling thread has a team there that looks for work now, of at least half of `threads`.
// Never in the child of a fork.
bool is_awake(int threads);

// Run work(0) here and work(1 ...) on the team's other threads, as many as it has, and wait for all.
void run(const Work& work);

}  // namespace gradclip::cpu::openmp
