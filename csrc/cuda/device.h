// All that the kernels take from CUDA: indices, the barrier, shuffles, shared memory, wide memory accesses, the launch.
// The tests compile the kernels with g++ against their own definitions of the same names and run them on the CPU.
#pragma once

#include <cstdint>

#include "../contrastive.h"

namespace seer::cuda {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;  // of a block

// Where a kernel runs.
struct Place {
  int device;
  std::uintptr_t stream;  // cudaStream_t
};

// Features in half precision, as memory holds them.
struct Bfloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The largest that a kernel's SEER_SHARED memory may be.
constexpr int kStaticSharedBytes = 2048;

}  // namespace seer::cuda

#if !defined(__CUDACC__)
#include "device_shim.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#define SEER_KERNEL(blocks_per_multiprocessor) __global__ void __launch_bounds__(kMaxThreads, blocks_per_multiprocessor)
#define SEER_KERNEL_OF(most_threads) __global__ void __launch_bounds__(most_threads, 1)
#define SEER_SHARED(type, name, count) __shared__ type name[count]

namespace seer::cuda {

// A block is blockDim.y teams of blockDim.x threads, a multiple of kWarp.
SEER_DEVICE inline unsigned block_index() { return blockIdx.x; }
SEER_DEVICE inline int team_count() { return blockDim.y; }
SEER_DEVICE inline int team_index() { return threadIdx.y; }
SEER_DEVICE inline int team_threads() { return blockDim.x; }
SEER_DEVICE inline int team_thread() { return threadIdx.x; }

// For all threads of the block.
SEER_DEVICE inline void barrier() { __syncthreads(); }

// barrier(), and whether any thread came with `flag`.
SEER_DEVICE inline bool barrier_any(bool flag) { return __syncthreads_or(flag); }

// The value of the lane whose index differs in the bits of `mask`; all lanes of the warp take part.
template <class T>
SEER_DEVICE inline T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// The value of lane `from`; all lanes of the warp take part.
template <class T>
SEER_DEVICE inline T shuffle_from(T value, int from) {
  return __shfl_sync(0xffffffffu, value, from);
}

// The same number, though the compiler cannot know: what follows from it is computed anew, and keeps no registers.
SEER_DEVICE inline int recomputed(int value) {
  asm volatile("" : "+r"(value)::"memory");
  return value;
}

// The block's shared memory beyond SEER_SHARED, of the size given to launch().
template <class T>
SEER_DEVICE inline T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

template <int kBytes>
using Bits = std::conditional_t<kBytes == 16, int4, std::conditional_t<kBytes == 8, int2, int>>;

// The pack of kWidth elements at `index`, counted in packs, in one access; `array` must be aligned to a pack.
template <class T, int kWidth>
SEER_DEVICE inline void load(const T* array, int index, T (&pack)[kWidth]) {
  static_assert(sizeof(Bits<sizeof(pack)>) == sizeof(pack));
  const auto bits = reinterpret_cast<const Bits<sizeof(pack)>*>(array)[index];
  memcpy(pack, &bits, sizeof(pack));
}

// load() from memory that nothing writes while the kernel runs: such reads may be moved ahead of writes.
template <class T, int kWidth>
SEER_DEVICE inline void load_constant(const T* array, int index, T (&pack)[kWidth]) {
  static_assert(sizeof(Bits<sizeof(pack)>) == sizeof(pack));
  const auto bits = __ldg(reinterpret_cast<const Bits<sizeof(pack)>*>(array) + index);
  memcpy(pack, &bits, sizeof(pack));
}

template <class T, int kWidth>
SEER_DEVICE inline void store(T* array, int index, const T (&pack)[kWidth]) {
  static_assert(sizeof(Bits<sizeof(pack)>) == sizeof(pack));
  Bits<sizeof(pack)> bits;
  memcpy(&bits, pack, sizeof(pack));
  reinterpret_cast<Bits<sizeof(pack)>*>(array)[index] = bits;
}

// Begins to copy the pack at `index` of `array` to the same place in shared memory. The calling thread, and no other,
// may use it after wait_for_copies().
template <int kWidth, class T>
SEER_DEVICE inline void copy_async(T* shared, const T* array, int index) {
  using Pack = Bits<sizeof(T) * kWidth>;
  __pipeline_memcpy_async(reinterpret_cast<Pack*>(shared) + index, reinterpret_cast<const Pack*>(array) + index,
                          sizeof(Pack));
}

SEER_DEVICE inline void wait_for_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

SEER_DEVICE inline float widen(float value) { return value; }
SEER_DEVICE inline double widen(double value) { return value; }
SEER_DEVICE inline float widen(Bfloat16 value) { return __bfloat162float(__ushort_as_bfloat16(value.bits)); }
SEER_DEVICE inline float widen(Half value) { return __half2float(__ushort_as_half(value.bits)); }

// Rounded to the nearest F.
template <class F, class T>
SEER_DEVICE inline F narrowed(T value) {
  if constexpr (std::is_same_v<F, Bfloat16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
  } else if constexpr (std::is_same_v<F, Half>) {
    return {__half_as_ushort(__float2half_rn(value))};
  } else {
    return value;
  }
}

// Between the blocks of a launch: what a thread publishes before its fence(), any thread sees by read_published() after
// a fence() of its own, or of its block before a barrier, if in between a ticket went from the one block to the other.
template <class T>
SEER_DEVICE inline void publish(T* address, T value) {
  __stcg(address, value);
}

template <class T>
SEER_DEVICE inline T read_published(const T* address) {
  return __ldcg(address);
}

SEER_DEVICE inline void fence() { __threadfence(); }

// How many have drawn before, from a ticket that was zero.
SEER_DEVICE inline int draw_ticket(int* ticket) { return atomicAdd(ticket, 1); }

inline void check(cudaError_t error, const char* kernel, int device) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forget it: the next launch is not to blame
  throw std::runtime_error(std::string(kernel) + " on cuda:" + std::to_string(device) + " failed: " +
                           cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

// Makes a device current for a scope. This copy of the CUDA runtime is linked statically, so it knows nothing of the
// device that torch has chosen, and must leave no trace in it.
class CurrentDevice {
 public:
  CurrentDevice(const char* kernel, int device) : device_(device) {
    check(cudaGetDevice(&previous_), kernel, device);
    if (previous_ != device_) check(cudaSetDevice(device_), kernel, device);
  }
  ~CurrentDevice() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int device_, previous_ = 0;
};

inline int attribute(cudaDeviceAttr which, const char* kernel, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), kernel, device);
  return value;
}

// What a block may use if two are to share a multiprocessor, in bytes.
inline int shared_memory_of_half_a_multiprocessor(const char* kernel, Place place) {
  return attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, kernel, place.device) / 2 -
         attribute(cudaDevAttrReservedSharedMemoryPerBlock, kernel, place.device);
}

// The most dynamic shared memory that a block may ask for, in bytes.
inline int most_shared_memory(const char* kernel, Place place) {
  return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, kernel, place.device) - kStaticSharedBytes;
}

inline int multiprocessors(const char* kernel, Place place) {
  return attribute(cudaDevAttrMultiProcessorCount, kernel, place.device);
}

// Queues zeros for `bytes` bytes on the place's stream; graphs can capture it.
inline void queue_zeros(const char* name, Place place, void* memory, int64_t bytes) {
  const CurrentDevice current(name, place.device);
  check(cudaMemsetAsync(memory, 0, size_t(bytes), reinterpret_cast<cudaStream_t>(place.stream)), name, place.device);
}

// Queues `blocks` blocks of `teams` x `threads` threads. Nothing waits and nothing is allocated: graphs can capture it.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Place place, int64_t blocks, int teams, int threads,
            int shared_bytes, const Arguments&... arguments) {
  constexpr int kFree = (48 << 10) - kStaticSharedBytes;  // more must be asked for
  const CurrentDevice current(name, place.device);
  if (shared_bytes > kFree) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name, place.device);
  }
  kernel<<<dim3(unsigned(blocks)), dim3(threads, teams), shared_bytes, reinterpret_cast<cudaStream_t>(place.stream)>>>(
      arguments...);
  check(cudaGetLastError(), name, place.device);
}

}  // namespace seer::cuda
#endif
