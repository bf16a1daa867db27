// Splits a range over threads. Threads are started per call: tens of microseconds, spent only on work that is longer
// and no second OpenMP runtime beside torch's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace seer::cpu {

// Calls body(begin, end) on disjoint parts of [0, count). `cost` is the number of elements that one item touches.
template <class Body>
void parallel_for(int64_t count, int64_t cost, int threads, const Body& body) {
  constexpr int64_t kElementsPerThread = 1 << 19;  // some 200 microseconds: less is not worth a start
  const int64_t useful = std::min<int64_t>({threads, count, count * cost / kElementsPerThread});
  if (useful <= 1) {
    body(int64_t{0}, count);
    return;
  }
  std::vector<std::thread> workers;
  workers.reserve(useful - 1);
  for (int64_t t = 1; t < useful; ++t) {
    workers.emplace_back([&body, count, useful, t] { body(count * t / useful, count * (t + 1) / useful); });
  }
  body(int64_t{0}, count / useful);
  for (std::thread& worker : workers) worker.join();
}

}  // namespace seer::cpu
