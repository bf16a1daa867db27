// The threads that work on one problem, in step: each calls the same functions with its own rank.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

namespace seer::cpu {

class Barrier {
 public:
  // Returns when `size` threads have called it.
  void wait(int size) {
    const int round = round_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      waiting_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins > 1000) std::this_thread::yield();  // somebody else has the core that we wait for
    }
  }

 private:
  std::atomic<int> waiting_{0};
  std::atomic<int> round_{0};
};

struct Team {
  int rank, size;
  Barrier* barrier;

  void sync() const {
    if (size > 1) barrier->wait(size);
  }
  // The part of [0, count) that is this member's, in whole blocks.
  int64_t begin(int64_t count, int64_t block) const { return count / block * rank / size * block; }
  int64_t end(int64_t count, int64_t block) const { return count / block * (rank + 1) / size * block; }
};

}  // namespace seer::cpu
