// How many threads a call may use.
#pragma once

namespace gradclip::cpu {

// The calling thread included. Default: GRADCLIP_NUM_THREADS, else OMP_NUM_THREADS, else the
// processors in the affinity mask.
int num_threads();
// Throws std::invalid_argument outside 1 ... 1024.
void set_num_threads(int n);
// Reads the environment now; throws std::invalid_argument for a GRADCLIP_NUM_THREADS that is no
// number. To be called once, early, so that a mistake is reported early.
void init_num_threads();

}  // namespace gradclip::cpu
