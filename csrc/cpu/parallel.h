// Work on the threads of the OpenMP runtime that torch has loaded. They spin for a while after each of torch's
// operators, so threads of our own would wait for a core that one of them holds.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <future>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace seer::cpu {

// What compilers call for a parallel region, which GNU's and Intel's runtime share. Nulls where torch has neither.
struct OpenMp {
  void (*parallel)(void (*work)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*rank)() = nullptr;
  int (*size)() = nullptr;

  static const OpenMp& of_process() {
    static const OpenMp found = [] {
      OpenMp o;
#if defined(__unix__) || defined(__APPLE__)
      o.parallel = reinterpret_cast<decltype(o.parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
      o.rank = reinterpret_cast<decltype(o.rank)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
      o.size = reinterpret_cast<decltype(o.size)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
#endif
      return o;
    }();
    return found;
  }
  explicit operator bool() const { return parallel && rank && size; }
};

// The first exception among several threads: none may leave the one it was thrown on, or the process ends.
class Failure {
 public:
  template <class Work>
  void guard(const Work& work) {
    try {
      work();
    } catch (...) {
      if (!failed_.exchange(true)) exception_ = std::current_exception();
    }
  }
  // For the caller, once all threads are done.
  void rethrow() const {
    if (exception_) std::rethrow_exception(exception_);
  }

 private:
  std::atomic<bool> failed_{false};
  std::exception_ptr exception_;
};

// Calls work(rank, size) for all ranks below size at the same time; the size is `threads`, or less where the runtime
// grants fewer. Throws what one of them throws, after all have ended; work that waits for other ranks must not throw.
template <class Work>
void run_together(int threads, const Work& work) {
  if (threads <= 1) {
    work(0, 1);
    return;
  }
  Failure failure;
  if (const OpenMp& openmp = OpenMp::of_process()) {
    const auto member = [&](int rank, int size) { failure.guard([&] { work(rank, size); }); };
    using Member = decltype(member);
    const auto entry = [](void* data) {
      const OpenMp& openmp = OpenMp::of_process();
      (*static_cast<Member*>(data))(openmp.rank(), openmp.size());
    };
    openmp.parallel(entry, const_cast<void*>(static_cast<const void*>(&member)), unsigned(threads), 0);
    failure.rethrow();
    return;
  }
  // The size is settled once all threads exist: work may wait for every rank.
  std::vector<std::thread> others;
  std::promise<int> granted;
  const std::shared_future<int> size = granted.get_future().share();
  others.reserve(threads - 1);
  for (int rank = 1; rank < threads; ++rank) {
    try {
      others.emplace_back([&failure, &work, rank, size] { failure.guard([&] { work(rank, size.get()); }); });
    } catch (const std::system_error&) {
      break;  // the machine grants no more
    }
  }
  granted.set_value(int(others.size()) + 1);
  failure.guard([&] { work(0, int(others.size()) + 1); });
  for (std::thread& other : others) other.join();
  failure.rethrow();
}

// How many threads pay for `elements` of work.
inline int useful_threads(int64_t elements, int threads) {
  constexpr int64_t kElementsPerThread = 1 << 15;  // some 10 microseconds: less is not worth waking a thread
  return int(std::clamp<int64_t>(elements / kElementsPerThread, 1, threads));
}

// Calls body(begin, end) on disjoint parts of [0, count). `cost` is the number of elements that one item touches.
template <class Body>
void parallel_for(int64_t count, int64_t cost, int threads, const Body& body) {
  run_together(int(std::min<int64_t>(count, useful_threads(count * cost, threads))), [&](int rank, int size) {
    const int64_t begin = count * rank / size, end = count * (rank + 1) / size;
    if (begin < end) body(begin, end);
  });
}

// Calls body(next) on every thread that pays; next() hands out the numbers below `count` and then larger ones, so that
// items of different cost keep all threads busy.
template <class Body>
void parallel_take(int64_t count, int64_t cost, int threads, const Body& body) {
  std::atomic<int64_t> taken{0};
  const auto next = [&] { return taken.fetch_add(1, std::memory_order_relaxed); };
  run_together(int(std::min<int64_t>(count, useful_threads(count * cost, threads))), [&](int, int) { body(next); });
}

}  // namespace seer::cpu
