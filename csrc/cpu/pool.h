// Threads that wait between calls. Whoever is not needed after all is not waited for: a thread that wakes up late finds
// the work done.
#pragma once

#include <pthread.h>

#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

namespace seer::cpu {

class Pool {
 public:
  // Calls body(rank) for rank 0 here and for ranks up to `threads` - 1 on other threads, as far as they come before
  // rank 0 returns. False, and nothing called, where another call has the pool.
  static bool run(int threads, const std::function<void(int)>& body) {
    Pool& pool = instance();
    std::unique_lock<std::mutex> alone(pool.alone_, std::try_to_lock);
    if (!alone.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(pool.mutex_);
      for (; pool.workers_ < threads - 1; ++pool.workers_) std::thread([&pool] { pool.work(); }).detach();
      pool.body_ = &body;
      pool.next_rank_ = 1;
      pool.ranks_ = threads;
    }
    pool.wake_.notify_all();
    body(0);
    std::unique_lock<std::mutex> lock(pool.mutex_);
    pool.ranks_ = 0;
    pool.done_.wait(lock, [&] { return pool.running_ == 0; });
    return true;
  }

 private:
  // Never destroyed, as its threads never end; a forked process has none of them and makes a pool of its own.
  static Pool& instance() {
    static std::once_flag once;
    std::call_once(once, [] {
      current() = new Pool;
      pthread_atfork(nullptr, nullptr, [] { current() = new Pool; });
    });
    return *current();
  }
  static Pool*& current() {
    static Pool* pool = nullptr;
    return pool;
  }

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return next_rank_ < ranks_; });
      const int rank = next_rank_++;
      const std::function<void(int)>* body = body_;
      ++running_;
      lock.unlock();
      (*body)(rank);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex alone_, mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int)>* body_ = nullptr;
  int workers_ = 0, next_rank_ = 0, ranks_ = 0, running_ = 0;
};

}  // namespace seer::cpu
