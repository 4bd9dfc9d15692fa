// Somebody else's threads, in place of our team: where a framework calls us from a thread of its own and has
// more of them, two pools would fight for the processors.
#pragma once

#include <functional>

#include "cpu/team.hpp"

namespace gradclip::cpu {

class Pool {
 public:
  virtual int threads() const = 0;
  // Run the task some time, on any thread; or now.
  virtual void schedule(std::function<void()> task) = 0;

 protected:
  ~Pool() = default;
};

// While it lives the calls of this thread are helped by the pool alone.
class PoolScope {
 public:
  explicit PoolScope(Pool& pool);
  ~PoolScope();
  PoolScope(const PoolScope&) = delete;
  PoolScope& operator=(const PoolScope&) = delete;

  static Pool* current();  // of this thread; null: none

 private:
  Pool* outer_;
};

namespace pool {

// Run work(0) here and work(1 ...) on those of `threads - 1` tasks of the pool that begin before it is over. Only
// they are waited for: the pool may be full of tasks that wait for this one.
void run(Pool& pool, int threads, const Work& work);

}  // namespace pool
}  // namespace gradclip::cpu
