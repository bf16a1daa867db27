// Splits a range over the threads of the OpenMP runtime that torch has loaded. They spin for a while after each of
// torch's operators, so threads of our own would wait for a core that one of them holds.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace seer::cpu {

// Runs work(data) on `threads` threads at once and waits for them: the entry point that compilers call for a parallel
// region, which GNU's and Intel's runtime share. Null where torch came with neither.
using ParallelRegion = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

inline ParallelRegion parallel_region() {
#if defined(__unix__) || defined(__APPLE__)
  static const auto region = reinterpret_cast<ParallelRegion>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return region;
#else
  return nullptr;
#endif
}

// Calls body(begin, end) on disjoint parts of [0, count). `cost` is the number of elements that one item touches.
template <class Body>
void parallel_for(int64_t count, int64_t cost, int threads, const Body& body) {
  constexpr int64_t kElementsPerThread = 1 << 15;  // some 10 microseconds: less is not worth waking a thread
  const int64_t parts = std::min<int64_t>({threads, count, count * cost / kElementsPerThread});
  if (parts <= 1) {
    body(int64_t{0}, count);
    return;
  }
  struct Work {
    const Body& body;
    const int64_t count, parts;
    std::atomic<int64_t> next{0};

    void run() {  // the runtime may grant fewer threads than asked for, so parts are taken, not assigned
      for (int64_t part; (part = next.fetch_add(1)) < parts;) body(count * part / parts, count * (part + 1) / parts);
    }
  } work{body, count, parts};
  const auto run = [](void* data) { static_cast<Work*>(data)->run(); };
  if (const ParallelRegion region = parallel_region()) {
    region(run, &work, unsigned(parts), 0);
    return;
  }
  std::vector<std::thread> workers;
  workers.reserve(parts - 1);
  for (int64_t t = 1; t < parts; ++t) workers.emplace_back(run, &work);
  work.run();
  for (std::thread& worker : workers) worker.join();
}

}  // namespace seer::cpu
