// Where a thread is among the warps of its team, and how the lanes of a warp put together what they have.
#pragma once

#include <cmath>

#include "device.h"

namespace seer::cuda {
namespace {

SEER_DEVICE inline int lane() { return team_thread() % kWarp; }
SEER_DEVICE inline int warp() { return team_thread() / kWarp; }
SEER_DEVICE inline int warps() { return team_threads() / kWarp; }

template <class T>
SEER_DEVICE inline T warp_sum(T value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

template <class T>
SEER_DEVICE inline T warp_max(T value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = std::fmax(value, shuffle_xor(value, mask));
  return value;
}

// Sums kCount values over each group of `lanes` neighbouring lanes. The sum of value k is left in lanes / kCount of
// them, from lanes / kCount * k on: every step leaves a lane half of the values.
template <int kCount, class T>
SEER_DEVICE inline T scattered_sum(const T* values, int lanes = kWarp) {
  if constexpr (kCount == 1) {
    T sum = values[0];
    for (int mask = lanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    return sum;
  } else {
    const bool upper = lane() & lanes / 2;
    T half[kCount / 2];
#pragma unroll
    for (int k = 0; k < kCount / 2; ++k) {
      const T low = values[k], high = values[k + kCount / 2];
      half[k] = (upper ? high : low) + shuffle_xor(upper ? low : high, lanes / 2);
    }
    return scattered_sum<kCount / 2>(half, lanes / 2);
  }
}

}  // namespace
}  // namespace seer::cuda
