#include "cpu/pool.hpp"

#include <condition_variable>
#include <memory>
#include <mutex>
#include <utility>

#include "cpu/float_environment.hpp"

namespace gradclip::cpu {
namespace {

thread_local Pool* current_pool = nullptr;

// Whoever comes after it was closed goes away; the work is gone then.
class Door {
 public:
  explicit Door(const Work& work) : work_(work) {}

  void enter(int thread) {
    {
      const std::scoped_lock lock(mutex_);
      if (is_closed_) return;
      ++inside_;
    }
    {
      const DefaultFloatEnvironment environment;
      work_(thread);
    }
    const std::scoped_lock lock(mutex_);
    if (--inside_ == 0) is_empty_.notify_one();
  }
  void close() {
    std::unique_lock lock(mutex_);
    is_closed_ = true;
    is_empty_.wait(lock, [&] { return inside_ == 0; });
  }

 private:
  const Work& work_;
  std::mutex mutex_;
  std::condition_variable is_empty_;
  bool is_closed_ = false;
  int inside_ = 0;
};

}  // namespace

PoolScope::PoolScope(Pool& pool) : outer_(std::exchange(current_pool, &pool)) {}
PoolScope::~PoolScope() { current_pool = outer_; }
Pool* PoolScope::current() { return current_pool; }

void pool::run(Pool& pool, int threads, const Work& work) {
  const auto door = std::make_shared<Door>(work);
  for (int thread = 1; thread < threads; ++thread)
    pool.schedule([door, thread] { door->enter(thread); });
  work(0);
  door->close();
}

}  // namespace gradclip::cpu
