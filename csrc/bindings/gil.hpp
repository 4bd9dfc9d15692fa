// Work without the GIL.
#pragma once

#include <Python.h>
#include <unistd.h>

namespace gradclip::bindings {

// Releases the GIL while it lives. pybind11's own gil_scoped_release ends the process with
// std::terminate when a daemon thread comes back from a kernel while the interpreter exits: before
// Python 3.14, taking the GIL then calls pthread_exit, which unwinds through a noexcept destructor.
// Such a thread sleeps here until the process is gone, as Python 3.14 lets it.
class GilRelease {
 public:
  GilRelease() : state_(PyEval_SaveThread()) {}
  ~GilRelease() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      for (;;) ::pause();
    }
  }
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace gradclip::bindings
